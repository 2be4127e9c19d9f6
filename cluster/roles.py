"""How each role is built, in the worker that plays it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.placement import Role
from cluster.worker import Site
from configs.schema import Recipe

ZERO_3 = 3
# The actors are imported late: a generator needs no DeepSpeed, a trainer no vLLM.

FACTORIES: Mapping[Role, str] = {
    "policy": "cluster.roles:make_policy",
    "reference": "cluster.roles:make_reference",
    "reward": "cluster.roles:make_reward",
    "critic": "cluster.roles:make_critic",
    "generator": "cluster.roles:make_generator",
}


def make_policy(site: Site, recipe: Recipe) -> Any:
    from actors.policy import Policy

    return Policy(_base(site, recipe), recipe, site.rank, site.world_size)


def make_reference(site: Site, recipe: Recipe) -> Any:
    from actors.reference import Reference

    return Reference(_base(site, recipe), recipe)


def make_reward(site: Site, recipe: Recipe) -> Any:
    from actors.reward import Reward

    return Reward(_base(site, recipe), recipe, site.rank, site.world_size)


def make_critic(site: Site, recipe: Recipe) -> Any:
    from actors.critic import Critic

    return Critic(_base(site, recipe), recipe, site.rank, site.world_size)


def make_generator(site: Site, recipe: Recipe) -> Any:
    from actors.generator import Generator

    return Generator(
        recipe.model.path,
        recipe.generator,
        recipe.lora,
        dtype=recipe.generator.dtype or recipe.model.dtype,
        max_model_tokens=recipe.data.max_prompt_tokens + recipe.sampling.max_answer_tokens,
        seed=recipe.seed,
        threads=site.threads,
    )


def _base(site: Site, recipe: Recipe) -> Any:
    """The frozen base, one for all roles of a worker. ZeRO 3 spreads it over the group's workers."""
    from actors.base import Base

    spread = recipe.learner.zero_stage == ZERO_3
    return site.once(
        "base", lambda: Base(recipe.model, recipe.lora, seed=recipe.seed, device=site.device, spread=spread)
    )
