"""The reference: the frozen base with every adapter off."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from actors.base import Base
from actors.passes import answer_logprobs
from configs.schema import Recipe
from rlhf.records import AnswerGroup


class Reference:
    """What KL is measured against. It trains nothing, so it needs no process group.

    Args:
        base: the decoder; adapters that other roles have on it do not matter.
        recipe: for the sampling temperature and the way in which passes are cut.
    """

    def __init__(self, base: Base, recipe: Recipe) -> None:
        self._base, self._recipe = base, recipe

    def logprobs(self, groups: Sequence[AnswerGroup], temperature: float | None = None) -> torch.Tensor:
        """[N, T] nats, 0 at padding, at `temperature` (None: the sampling temperature of the recipe)."""
        temperature = self._recipe.sampling.temperature if temperature is None else temperature
        run = functools.partial(self._base.run, None)
        return answer_logprobs(groups, self._recipe.learner, run, self._base.model, temperature)
