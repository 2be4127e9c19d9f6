"""Rows: a prompt is computed once for all its answers.

A row is a prompt followed by one or several of its answers. Position ids restart after the prompt for each answer, and
a token sees the prompt and its own answer only, so a row gives what separate sequences give. Rows lie one behind the
other in a micro-batch, without padding; a token never sees another row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Literal

import torch

from rlhf.records import AnswerGroup

PROMPT = 0  # the branch of prompt tokens; answers of a row are branches 1, 2, …

# What attention costs: so much per (query, key) pair, where everything else costs 1 per token. Measured by
# benchmarks/rows.py on a 135M model on a CPU; it falls as models get wider, and then shared rows win by more.
PAIR_COST = 4e-4

Rows = Literal["auto", "shared", "separate"]
MaskRule = Callable[[object, object, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt and some of its answers, in the order in which they are laid out."""

    prompt: tuple[int, ...]  # token ids
    answers: tuple[tuple[int, ...], ...]  # token ids of each
    indices: tuple[int, ...]  # of each answer among all N

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + sum(map(len, self.answers))


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of consecutive tokens. Each sees its piece up to itself, and the whole of one earlier piece."""

    length: int
    sees: int | None  # index of the earlier piece: an answer's prompt


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """One forward pass: rows one behind the other.

    L tokens, K answer tokens that are predicted, M answers. Every answer lies in one micro-batch as a whole.
    """

    token_ids: torch.Tensor  # [1, L]
    position_ids: torch.Tensor  # [1, L] restart after the prompt for each answer
    row: torch.Tensor  # [L] which row a token is in
    branch: torch.Tensor  # [L] PROMPT, or 1, 2, … for the row's answers
    pieces: tuple[Piece, ...]  # what `row` and `branch` say, for attention that skips what is not visible
    predict: torch.Tensor  # [K] position whose hidden state predicts the token; a prompt's last serves all its answers
    target_ids: torch.Tensor  # [K] the predicted token
    answer: torch.Tensor  # [K] its answer's index among all N
    step: torch.Tensor  # [K] its index within the answer
    last: torch.Tensor  # [M] position of each answer's last token
    last_answer: torch.Tensor  # [M] that answer's index among all N

    @property
    def num_tokens(self) -> int:
        """L, all tokens of the forward pass."""
        return self.token_ids.shape[1]

    @property
    def mask(self) -> torch.Tensor:
        """bool [1, 1, L, L], true where a query (third axis) sees a key (fourth)."""
        at = torch.arange(self.num_tokens, device=self.row.device)
        return visible(self.row, self.branch)(None, None, at[:, None], at[None, :])[None, None]

    def to(self, device: torch.device | str) -> MicroBatch:
        """The same micro-batch on `device`."""
        moved = {part.name: getattr(self, part.name).to(device) for part in fields(self) if part.name != "pieces"}
        return replace(self, **moved)


def visible(row: torch.Tensor, branch: torch.Tensor) -> MaskRule:
    """The rule of what a token sees, as a function (batch, head, query, key) → bool, the form FlexAttention takes.

    Nothing later, nothing of another row, and of its own row the prompt and its own branch.

    Args:
        row: [L] row of each token.
        branch: [L] branch of each token.
    """

    def rule(_batch: object, _head: object, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        same_branch = (branch[key] == branch[query]) | (branch[key] == PROMPT)
        return (key <= query) & (row[key] == row[query]) & same_branch

    return rule


def make_micro_batches(
    groups: Sequence[AnswerGroup], indices: Sequence[int] | None = None, *, rows: Rows = "auto", max_tokens: int
) -> list[MicroBatch]:
    """Micro-batches that hold each chosen answer once, in order.

    Args:
        groups: whose answers, flat and in order, are the N answers that `indices` counts.
        indices: flat indices of the answers to include; None: all.
        rows: shared: a group is one row, or as many as `max_tokens` asks for; separate: a row per answer; auto: what
            is cheaper, group by group.
        max_tokens: at most so many tokens in a micro-batch, unless a prompt with a single answer is longer: such a
            row is a micro-batch of its own.
    """
    assert max_tokens > 0
    chosen = None if indices is None else set(indices)
    batches: list[list[Row]] = []
    room = 0
    for row in _rows(groups, chosen, rows, max_tokens):
        if row.num_tokens > room:
            batches.append([])
            room = max_tokens
        batches[-1].append(row)
        room -= row.num_tokens
    return [_join(batch) for batch in batches]


def choose_rows(prompt_len: int, answer_lens: Sequence[int]) -> Literal["shared", "separate"]:
    """What is cheaper for one group: tokens, plus PAIR_COST for each (query, key) pair that attention computes.

    A causal sequence of n tokens computes n²/2 pairs. An answer in a shared row takes the whole of its prompt and of
    itself, since the kernel for it does not skip what the mask hides.
    """
    sequences = [prompt_len + length for length in answer_lens]
    separate = sum(sequences) + PAIR_COST * sum(n * n / 2 for n in sequences)
    pairs = prompt_len**2 / 2 + sum(length * (prompt_len + length) for length in answer_lens)
    shared = prompt_len + sum(answer_lens) + PAIR_COST * pairs
    return "shared" if shared < separate else "separate"


def scatter(values: torch.Tensor, micro_batch: MicroBatch, out: torch.Tensor) -> None:
    """Nothing; `out` [N, T] now holds `values` [K] at the answer tokens of `micro_batch`."""
    out[micro_batch.answer.to(out.device), micro_batch.step.to(out.device)] = values.detach().to(out)


def _rows(groups: Sequence[AnswerGroup], chosen: set[int] | None, rows: Rows, max_tokens: int) -> Iterator[Row]:
    """Yields rows of at most `max_tokens`, or of one answer."""
    first = 0
    for group in groups:
        prompt = group.prompt.token_ids
        answers = {first + i: answer.token_ids for i, answer in enumerate(group.answers)}
        first += len(group.answers)
        if chosen is not None:
            answers = {index: ids for index, ids in answers.items() if index in chosen}
        lengths = [len(ids) for ids in answers.values()]
        assert prompt and all(lengths), "a prompt and an answer have a token at least (an answer's EOS counts)"
        how = choose_rows(len(prompt), lengths) if rows == "auto" else rows
        limit = max_tokens if how == "shared" else 0
        held: list[int] = []
        size = len(prompt)
        for index, ids in answers.items():
            if held and size + len(ids) > limit:
                yield Row(prompt, tuple(answers[i] for i in held), tuple(held))
                held, size = [], len(prompt)
            held.append(index)
            size += len(ids)
        if held:
            yield Row(prompt, tuple(answers[i] for i in held), tuple(held))


def _join(rows: Sequence[Row]) -> MicroBatch:
    starts = [0, *accumulate(row.num_tokens for row in rows)]
    columns: dict[str, list[int]] = {
        name: [] for name in ("position_ids", "row", "branch", "predict", "answer", "step", "last", "last_answer")
    }
    pieces: list[Piece] = []
    for number, (row, start) in enumerate(zip(rows, starts, strict=False)):
        size = len(row.prompt)
        pieces += _pieces(row, len(pieces))
        columns["position_ids"] += range(size)
        columns["branch"] += [PROMPT] * size
        columns["row"] += [number] * row.num_tokens
        at = start + size
        for branch, (ids, index) in enumerate(zip(row.answers, row.indices, strict=True), start=1):
            count = len(ids)
            columns["position_ids"] += range(size, size + count)
            columns["branch"] += [branch] * count
            columns["predict"] += [start + size - 1, *range(at, at + count - 1)]
            columns["answer"] += [index] * count
            columns["step"] += range(count)
            columns["last"].append(at + count - 1)
            columns["last_answer"].append(index)
            at += count
    tensors = {name: torch.tensor(column) for name, column in columns.items()}
    tensors["position_ids"] = tensors["position_ids"][None]
    return MicroBatch(
        token_ids=torch.tensor([[token for row in rows for ids in (row.prompt, *row.answers) for token in ids]]),
        target_ids=torch.tensor([token for row in rows for ids in row.answers for token in ids]),
        pieces=tuple(pieces),
        **tensors,
    )


def _pieces(row: Row, first: int) -> list[Piece]:
    if len(row.answers) == 1:  # plainly causal: one piece, for which kernels have a fast path
        return [Piece(row.num_tokens, None)]
    return [Piece(len(row.prompt), None), *(Piece(len(ids), first) for ids in row.answers)]
