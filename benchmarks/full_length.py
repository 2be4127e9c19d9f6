"""The generator with one change: its answers always have all the tokens that are allowed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.placement import Role
from cluster.roles import FACTORIES
from cluster.roles import make_generator as make_usual
from cluster.worker import Site
from configs.schema import Recipe
from rlhf.records import Sampling


def make_generator(site: Site, recipe: Recipe) -> Any:
    """The usual generator, which draws from all tokens but the ends: so two trainers get the same amount of work."""
    generator = make_usual(site, recipe)
    usual_params = generator._sampling_params

    def full_length(sampling: Sampling, seed: int) -> Any:
        params = usual_params(sampling, seed)
        params.min_tokens = params.max_tokens
        return params

    generator._sampling_params = full_length
    return generator


FULL_LENGTH: Mapping[Role, str] = {**FACTORIES, "generator": f"{__name__}:{make_generator.__name__}"}
