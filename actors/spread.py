"""Passes over a base that is spread over the ranks: all take part in each, those without work of their own too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed

from actors.base import Base
from actors.engine import attach, make_reader
from rlhf.forward import use_head_in_one_call
from rlhf.records import Answer, AnswerGroup, Prompt
from rlhf.rows import MicroBatch, make_micro_batches

T = TypeVar("T")
Around = Callable[[Callable[[], list[T]]], list[T]]  # a module whose hooks gather, around what it is handed


class SpreadReader:
    """Reads a base that is spread and that nothing here trains, with the weights gathered layer by layer. Collective.

    Made when the base has all its adapters; no learner may stand on the same base.
    """

    def __init__(self, base: Base) -> None:
        attach(torch.distributed.get_rank(), torch.distributed.get_world_size())
        self._base = base
        self._engine = make_reader([base.model, use_head_in_one_call(base.model)])

    def run(
        self, adapter: str | None, micro_batches: Sequence[MicroBatch], forward: Callable[[MicroBatch], T]
    ) -> list[T]:
        """What `forward` gives for each of this rank's micro-batches, with this adapter and without gradients."""
        return run_spread(self._base, adapter, self._engine.module, micro_batches, forward)


def run_spread(
    base: Base,
    adapter: str | None,
    around: Around[T],
    micro_batches: Sequence[MicroBatch],
    forward: Callable[[MicroBatch], T],
) -> list[T]:
    """What `forward` gives for each of this rank's micro-batches, without gradients; ranks may have other numbers.

    `around` is DeepSpeed's module. A rank that has fewer micro-batches than another passes over one token instead:
    it must take part in gathering the base.
    """
    smallest = one_token()
    inside = [micro_batch or smallest for micro_batch in padded(micro_batches, base.device)]

    def body(micro_batch: MicroBatch) -> T:
        (result,) = around(lambda: [forward(micro_batch)])  # its hooks take tensors or lists, not numbers
        return result

    return base.run(adapter, inside, body)[: len(micro_batches)]


def padded(micro_batches: Sequence[MicroBatch], device: torch.device) -> list[MicroBatch | None]:
    """The micro-batches, padded with None so that every rank has as many as the fullest one. Collective."""
    most = torch.tensor(len(micro_batches), device=device)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    return [*micro_batches, *[None] * (int(most) - len(micro_batches))]


def one_token() -> MicroBatch:
    """A pass over one prompt token and one answer token, for a rank that has nothing to do."""
    answer = Answer(token_ids=(0,), logprobs=(0.0,), ended="eos", version=0, text="")
    group = AnswerGroup(Prompt(id="", messages=(), token_ids=(0,)), (answer,))
    return make_micro_batches([group], None, rows="separate", max_tokens=2)[0]
