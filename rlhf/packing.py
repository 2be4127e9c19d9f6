"""Documents packed into rows without padding: none sees another, and each comes out as a pass of its own would.

For pretraining, an endless stream of full rows in a seeded order. For alignment, rows of whole documents, of which
only the trained tokens are predicted.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from rlhf.errors import DataError
from rlhf.rows import PROMPT, MicroBatch, Piece
from rlhf.seeds import shuffle_seed

Ids = NDArray[np.integer]


class Documents(Protocol):
    """Documents by index, as a token cache has them."""

    @property
    def key(self) -> str:
        """What they are known by: other documents, another key."""
        ...

    def document(self, index: int) -> Ids:
        """Token ids [T], T ≥ 1."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """One rank's share of a global batch of rows."""

    micro_batches: tuple[MicroBatch, ...]  # of this rank; there may be none
    num_targets: int  # tokens that the rows of all ranks predict: what the loss is divided by
    num_parts: int  # documents and parts of documents in the rows of all ranks: what `answer` counts


class RowStream:
    """Full rows of documents, epoch after epoch, each in an order of its own.

    A document that is longer than what is left of a row goes on in the next one, from its last token again: so every
    token but a document's first is predicted once in an epoch. A row that an epoch ends in goes on with the next one.
    """

    def __init__(self, documents: Documents, indices: NDArray[Any], *, row_tokens: int, seed: int) -> None:
        """`indices` [D]: the documents of an epoch; one that is there twice is seen twice. `row_tokens` ≥ 2."""
        assert len(indices) and row_tokens >= 2
        self._documents, self._indices = documents, indices
        self._row_tokens, self._seed = row_tokens, seed
        self._epoch = self._document = self._offset = 0
        self._order = self._shuffled()
        digest = hashlib.sha256(f"{documents.key}|{seed}|{indices.dtype.str}|".encode())
        digest.update(np.ascontiguousarray(indices).data)
        self._fingerprint = digest.hexdigest()[:16]

    @property
    def epoch(self) -> int:
        """The epoch, from 0, that the next row begins in."""
        return self._epoch

    def take(self, num_rows: int, *, rank: int = 0, world_size: int = 1, rows_per_pass: int = 1) -> Batch:
        """The next `num_rows` rows, of which the batch holds this rank's, so many in a micro-batch.

        Which rows they are does not depend on the number of ranks, nor do `answer` and the counts: ranks that take
        alike stay together. Each rank has consecutive rows, one more or less where they do not divide evenly.
        """
        mine = range(num_rows * rank // world_size, num_rows * (rank + 1) // world_size)
        assert 0 <= rank < world_size
        made: list[MicroBatch] = []
        held: list[Ids] = []  # the parts of the micro-batch under way
        num_parts = 0
        for number in range(num_rows):
            parts = self._next_row()
            num_parts += len(parts)
            if number in mine:
                held += parts
                if number + 1 == mine.stop or (number + 1 - mine.start) % rows_per_pass == 0:
                    made.append(_lay_out(held, None, np.arange(num_parts - len(held), num_parts)))
                    held = []
        return Batch(tuple(made), num_rows * self._row_tokens - num_parts, num_parts)

    def state(self) -> dict[str, object]:
        """The position: the epoch, the document's place in its order, the token that the next row begins with."""
        return {"epoch": self._epoch, "document": self._document, "offset": self._offset, "data": self._fingerprint}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state` was taken. Raises DataError if documents, weights or seed are others by now."""
        if state["data"] != self._fingerprint:
            raise DataError(
                f"The corpus changed since the checkpoint: fingerprint {state['data']} then, {self._fingerprint} now. "
                "It covers files, tokenizer, weights, held-out share and seed.",
                remedy="Bring them back as they were, or start a run with another name.",
            )
        self._epoch, self._document, self._offset = (int(state[name]) for name in ("epoch", "document", "offset"))
        self._order = self._shuffled()

    def _next_row(self) -> list[Ids]:
        parts: list[Ids] = []
        room = self._row_tokens
        while room:
            some, self._document, self._offset = _fill(self._documents, self._order, self._document, self._offset, room)
            parts += some
            room -= sum(map(len, some))
            if self._document == len(self._order):
                self._epoch, self._document, self._offset = self._epoch + 1, 0, 0
                self._order = self._shuffled()
        return parts

    def _shuffled(self) -> NDArray[Any]:
        return self._indices[seeded_order(len(self._indices), shuffle_seed(self._seed, "pretrain", self._epoch))]


def one_pass(documents: Documents, indices: NDArray[Any], row_tokens: int) -> Iterator[MicroBatch]:
    """Rows of these documents in this order, once; each token but a document's first is predicted once.

    The last row ends where the documents do. `answer` counts the parts of documents from the first row on.
    """
    assert row_tokens >= 2
    document = offset = num_parts = 0
    while document < len(indices):
        parts, document, offset = _fill(documents, indices, document, offset, row_tokens)
        yield _lay_out(parts, None, np.arange(num_parts, num_parts + len(parts)))
        num_parts += len(parts)


def pack(documents: Sequence[tuple[ArrayLike, ArrayLike]], max_tokens: int) -> list[MicroBatch]:
    """Micro-batches of at most `max_tokens` tokens that hold each document once, as a whole.

    Best-fit decreasing: the longest document first, into the fullest row that has room for it (at most 11/9 of the
    fewest rows, plus 4: Johnson 1974). The same documents give the same rows.

    Args:
        documents: token ids [T] and, for each, whether it is trained on (bool [T]). `answer` counts them, `step`
            counts a document's predicted tokens. A document's first token is never predicted, trained on or not.

    Raises DataError for a document that is longer than `max_tokens`.
    """
    examples = [(np.asarray(ids, np.int64), np.asarray(trained, bool)) for ids, trained in documents]
    assert all(len(ids) and ids.shape == trained.shape for ids, trained in examples)
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # what is left of each row, and its number; ascending
    for index in sorted(range(len(examples)), key=lambda i: (-len(examples[i][0]), i)):
        need = len(examples[index][0])
        if need > max_tokens:
            raise DataError(
                f"Document {index} has {need} tokens.",
                limit=f"A row holds {max_tokens}.",
                remedy="Raise the row's length, as far as memory allows, or leave the document out.",
            )
        at = bisect_left(rooms, (need, -1))
        if at == len(rooms):
            rows.append([])
            rooms.append((max_tokens, len(rows) - 1))
        room, number = rooms.pop(at)
        rows[number].append(index)
        insort(rooms, (room - need, number))
    return [_lay_out([examples[i][0] for i in row], [examples[i][1] for i in row], np.array(row)) for row in rows]


def seeded_order(num: int, seed: int) -> NDArray[np.int64]:
    """A permutation of 0 … num - 1 that hangs on `seed` alone, whatever the version of numpy.

    Places are sorted by SplitMix64 (Steele, Lea, Flood 2014), which is one-to-one: no two are equal.
    """
    with np.errstate(over="ignore"):
        mixed = np.arange(1, num + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    return np.argsort(mixed, kind="stable")


def _fill(
    documents: Documents, order: NDArray[Any], document: int, offset: int, room: int
) -> tuple[list[Ids], int, int]:
    """Parts of documents for a row with so much room, fewer tokens only where the order ends; the position after."""
    parts: list[Ids] = []
    while room and document < len(order):
        ids = documents.document(int(order[document]))
        part = ids[offset : offset + room]
        parts.append(part)
        room -= len(part)
        if offset + len(part) == len(ids):
            document, offset = document + 1, 0
        else:
            offset += len(part) - 1  # its last token predicts the next part's first
    return parts, document, offset


def _lay_out(parts: Sequence[Ids], trained: Sequence[NDArray[np.bool_]] | None, indices: Ids) -> MicroBatch:
    """A micro-batch of these parts, one behind the other; `trained` None: each token is predicted that can be."""
    token_ids = torch.from_numpy(np.concatenate(parts).astype(np.int64))
    lengths = torch.tensor([len(part) for part in parts])
    number = torch.repeat_interleave(torch.arange(len(parts)), lengths)  # of each token's part
    ends = lengths.cumsum(0)
    position_ids = torch.arange(len(token_ids)) - (ends - lengths)[number]
    wanted = position_ids > 0
    if trained is not None:
        wanted &= torch.from_numpy(np.concatenate(trained))
    target = wanted.nonzero().squeeze(1)
    counts = torch.bincount(number[target], minlength=len(parts))
    answer = torch.from_numpy(np.asarray(indices, np.int64))
    return MicroBatch(
        token_ids=token_ids[None],
        position_ids=position_ids[None],
        row=number,
        branch=torch.full_like(number, PROMPT),
        pieces=tuple(Piece(len(part), None) for part in parts),
        predict=target - 1,
        target_ids=token_ids[target],
        answer=answer[number[target]],
        step=torch.arange(len(target)) - (counts.cumsum(0) - counts)[number[target]],
        last=ends - 1,
        last_answer=answer,
    )
