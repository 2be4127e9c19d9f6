"""Whole texts in batches, epoch after epoch, each in an order of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf.errors import DataError
from rlhf.masks import TrainedText
from rlhf.minibatches import deal
from rlhf.packing import Batch, pack, seeded_order
from rlhf.rows import MicroBatch
from rlhf.seeds import shuffle_seed

Example = tuple[NDArray[np.int32], NDArray[np.bool_]]  # token ids [T], which of them are trained [T]


class TextStream:
    """Batches of texts of nearly equal number; each text is seen once in an epoch.

    A batch hangs on the seed and its number alone, not on the number of ranks that share it.
    """

    def __init__(self, examples: Sequence[Example], *, batch_texts: int, max_tokens: int, seed: int) -> None:
        """`max_tokens`: of a micro-batch; a longer text has one of its own."""
        assert examples
        self._examples, self._seed = examples, seed
        self._max_tokens = max(max_tokens, max(len(ids) for ids, _ in examples))
        self.batches_per_epoch = -(-len(examples) // batch_texts)
        self._step = 0
        digest = hashlib.sha256(f"{seed}|{batch_texts}|".encode())
        for ids, trained in examples:
            digest.update(ids.tobytes() + trained.tobytes() + b"|")
        self._fingerprint = digest.hexdigest()[:16]

    @property
    def epoch(self) -> float:
        """Epochs that were taken so far."""
        return self._step / self.batches_per_epoch

    def take(self, *, rank: int = 0, world_size: int = 1) -> Batch:
        """The next batch, of which it holds this rank's micro-batches; there may be none."""
        epoch, number = divmod(self._step, self.batches_per_epoch)
        order = seeded_order(len(self._examples), shuffle_seed(self._seed, "sft", epoch))
        first, last = (len(order) * n // self.batches_per_epoch for n in (number, number + 1))
        micro_batches = pack([self._examples[place] for place in order[first:last]], self._max_tokens)
        self._step += 1
        return Batch(share(micro_batches, rank, world_size), sum(len(m.predict) for m in micro_batches), last - first)

    def state(self) -> dict[str, object]:
        """The position, and what it is a position in."""
        return {"step": self._step, "data": self._fingerprint}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state` was taken. Raises DataError if the texts or the seed are others by now."""
        if state["data"] != self._fingerprint:
            raise DataError(
                f"The conversations changed since the checkpoint: fingerprint {state['data']} then, "
                f"{self._fingerprint} now. It covers texts, template, batch size and seed.",
                remedy="Bring them back as they were, or start a run with another name.",
            )
        self._step = int(state["step"])


def share(micro_batches: Sequence[MicroBatch], rank: int, world_size: int) -> tuple[MicroBatch, ...]:
    """This rank's micro-batches, balanced by tokens."""
    dealt = deal([micro_batch.num_tokens for micro_batch in micro_batches], world_size)
    return tuple(micro_batches[place] for place in dealt[rank])


def examples_of(texts: Sequence[TrainedText]) -> list[Example]:
    """The texts as arrays: a tenth of the memory."""
    return [(np.array(text.token_ids, np.int32), np.array(text.trained, bool)) for text in texts]
