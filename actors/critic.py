"""The critic: a LoRA adapter and a value head."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from actors.base import Base
from actors.learner import Learner
from actors.passes import micro_batches_of, minibatches, per_token
from configs.schema import Recipe
from rlhf.forward import token_values
from rlhf.losses import value_loss
from rlhf.records import AnswerGroup, RoleState, Rollout
from rlhf.rows import MicroBatch

NAME = "critic"


class Critic:
    """One rank's part of the critic. All but `values` are collective, and give the same on every rank.

    Its head is zero at the start, so that the first values are 0, unless it starts from the reward model.

    Args:
        base: the decoder; the adapter is attached to it here.
        recipe: the run's.
        rank: of this worker.
        world_size: workers of the group.
    """

    def __init__(self, base: Base, recipe: Recipe, rank: int, world_size: int) -> None:
        base.attach(NAME)
        self._base, self._recipe, self._config = base, recipe, recipe.ppo
        self._rank, self._world_size = rank, world_size
        self._head = base.value_head()
        self._learner = Learner(base, NAME, self._head, recipe.ppo.critic_optimizer, recipe.learner, rank, world_size)

    def values(self, groups: Sequence[AnswerGroup]) -> torch.Tensor:
        """[N, T], value before each answer token is written, 0 at padding."""
        model, head = self._base.model, self._head
        return per_token(
            groups, self._recipe.learner, self._learner.run, lambda inside: token_values(model, head, inside)
        )

    def update(self, rollout: Rollout) -> dict[str, float]:
        """Metrics of all epochs and minibatches of one step. Every rank is given the whole rollout."""
        steps = [self._minibatch(rollout, parts) for parts in minibatches(rollout, self._recipe, self._world_size)]
        if not steps:
            return {"critic/num_updates": 0.0}
        num_tokens = sum(step["num_tokens"] for step in steps)
        return {
            "loss/value_avg": sum(step["loss"] for step in steps) / num_tokens,
            "val/clipfrac_avg": sum(step["clipped"] for step in steps) / num_tokens,
            "critic/grad_norm": sum(step["grad_norm"] for step in steps) / len(steps),
            "critic/lr": steps[-1]["lr"],
            "critic/num_updates": float(len(steps)),
        }

    def start_from(self, reward: RoleState) -> None:
        """Starts adapter and head as those of the reward model: the first value is its normalised score so far."""
        gain, bias = reward.values["gain"], reward.values["bias"]
        assert isinstance(gain, float) and isinstance(bias, float)
        tensors = {
            name.removeprefix("model."): tensor for name, tensor in reward.tensors.items() if name.startswith("model.")
        }
        tensors["head.weight"] = gain * tensors["head.weight"]
        self._learner.copy_in(tensors | {"head.bias": torch.tensor([bias])})

    def state(self) -> RoleState:
        """Adapter, head and optimizer: all that the next update depends on."""
        return self._learner.state()

    def load_state(self, state: RoleState) -> None:
        """Takes up a state exactly. Raises StoreError for one that does not fit."""
        self._learner.load_state(state)

    def _minibatch(self, rollout: Rollout, parts: Sequence[Sequence[int]]) -> dict[str, float]:
        """Sums over all ranks of one optimizer step."""
        num_tokens = int(rollout.mask[[index for part in parts for index in part]].sum())
        mine = micro_batches_of(rollout.groups, self._recipe.learner, parts[self._rank])
        sums = self._learner.step(
            self._learner.pad(mine), lambda micro_batch: self._loss(rollout, micro_batch), num_tokens
        )
        return sums | {"num_tokens": num_tokens}

    def _loss(self, rollout: Rollout, micro_batch: MicroBatch) -> tuple[torch.Tensor, dict[str, float]]:
        assert rollout.values is not None and rollout.returns is not None, "the critic learns from GAE's returns"
        device = micro_batch.answer.device
        at = (micro_batch.answer, micro_batch.step)
        terms = value_loss(
            token_values(self._base.model, self._head, micro_batch),
            rollout.values.to(device)[at],
            rollout.returns.to(device)[at],
            clip=self._config.value_clip,
        )
        return terms.loss, {"loss": float(terms.loss.detach()), "clipped": float(terms.clipped)}
