"""How groups are cut into passes: minibatches and micro-batches for updates, and scoring passes gathered by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch

from configs.schema import LearnerConfig, Recipe
from rlhf.forward import token_logprobs_alone
from rlhf.minibatches import plan
from rlhf.records import AnswerGroup, Rollout
from rlhf.rows import MicroBatch, make_micro_batches, scatter

Forward = Callable[[MicroBatch], torch.Tensor]


class Run(Protocol):
    """Runs a forward pass over each micro-batch: `Base.run` with an adapter, or `Learner.run`."""

    def __call__(self, micro_batches: Sequence[MicroBatch], forward: Forward, /) -> list[torch.Tensor]: ...


def minibatches(rollout: Rollout, recipe: Recipe, world_size: int) -> Iterator[list[list[int]]]:
    """Yields one optimizer step after the other, over all epochs: for each rank, flat indices of its answers."""
    for epoch in range(recipe.ppo.epochs):
        yield from plan(
            rollout,
            num_minibatches=recipe.ppo.num_minibatches,
            epoch=epoch,
            seed=recipe.seed,
            world_size=world_size,
        )


def micro_batches_of(
    groups: Sequence[AnswerGroup], config: LearnerConfig, indices: Sequence[int] | None = None
) -> list[MicroBatch]:
    """Micro-batches of these answers (None: all), cut as the recipe says."""
    if not groups or (indices is not None and not indices):
        return []
    return make_micro_batches(groups, indices, rows=config.rows, max_tokens=config.micro_batch_tokens)


def per_token(groups: Sequence[AnswerGroup], config: LearnerConfig, run: Run, forward: Forward) -> torch.Tensor:
    """[N, T] float32 on the CPU, 0 at padding: what `forward` gives for each answer token."""
    lengths = [len(answer.token_ids) for group in groups for answer in group.answers]
    out = torch.zeros(len(lengths), max(lengths, default=0))
    micro_batches = micro_batches_of(groups, config)
    for micro_batch, values in zip(micro_batches, run(micro_batches, forward), strict=True):
        scatter(values, micro_batch, out)
    return out


def answer_logprobs(
    groups: Sequence[AnswerGroup],
    config: LearnerConfig,
    run: Run,
    model: Any,
    temperature: float,
) -> torch.Tensor:
    """[N, T] nats, float32 on the CPU, 0 at padding, of the distribution at `temperature`."""
    return per_token(groups, config, run, lambda inside: token_logprobs_alone(model, inside, temperature))
