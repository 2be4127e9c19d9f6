"""The reference: the frozen starting point, the base with every adapter off or the adapter that PPO continues."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from actors.base import Base
from actors.passes import answer_logprobs
from actors.spread import SpreadReader
from configs.schema import Recipe
from rlhf.adapters import starting_adapter
from rlhf.records import AnswerGroup

NAME = "reference"


class Reference:
    """What KL is measured against. It trains nothing, so it needs no process group, unless its base is spread over one.

    Where the recipe continues an adapter, that adapter as it was at the start is attached here, frozen.

    Args:
        base: the decoder; adapters that other roles have on it do not matter. A base that is spread must be its own,
            and every call is collective: all ranks make it, those without groups too.
        recipe: for the starting point, the sampling temperature and the way in which passes are cut.

    Raises ModelError for an adapter to start from that does not fit.
    """

    def __init__(self, base: Base, recipe: Recipe) -> None:
        start = starting_adapter(recipe)
        if start is not None:
            base.attach(NAME, start, frozen=True)
        self._adapter = None if start is None else NAME
        self._base, self._recipe = base, recipe
        self._run = SpreadReader(base).run if base.spread else base.run

    def logprobs(self, groups: Sequence[AnswerGroup], temperature: float | None = None) -> torch.Tensor:
        """[N, T] nats, 0 at padding, at `temperature` (None: the sampling temperature of the recipe)."""
        return self._logprobs(self._adapter, groups, temperature)

    def base_logprobs(self, groups: Sequence[AnswerGroup], temperature: float | None = None) -> torch.Tensor:
        """The same of the base with every adapter off: what an engine without an adapter is compared with."""
        return self._logprobs(None, groups, temperature)

    def _logprobs(self, adapter: str | None, groups: Sequence[AnswerGroup], temperature: float | None) -> torch.Tensor:
        temperature = self._recipe.sampling.temperature if temperature is None else temperature
        run = functools.partial(self._run, adapter)
        return answer_logprobs(groups, self._recipe.learner, run, self._base.model, temperature)
