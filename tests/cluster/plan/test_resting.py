"""What the plan says that a trainer keeps while the generator works, against the tensors that it keeps."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.base import Base
from actors.critic import Critic
from actors.policy import Policy
from actors.reference import Reference
from cluster.plan.devices import this_cpu
from cluster.plan.memory import trainer_parts
from cluster.plan.search import as_written
from cluster.plan.shape import shape_of
from cluster.plan.work import Work
from configs.schema import Recipe
from tests.actors.ranks import make_groups, rollout_of, run_ranks
from tests.recipes import tiny_recipe

pytestmark = pytest.mark.engine

STAGES = (0, 1, 2)
WORLD = 2
NEAR = 0.03


def recipe_of(model: Path, folder: Path, stage: int) -> Recipe:
    # The adapters are no small part of what is kept, so that an error in them shows.
    return tiny_recipe(model, folder, learner={"zero_stage": stage}, lora={"rank": 32, "alpha": 32})


def scenario(rank: int, world_size: int, model: Path) -> dict[str, Any]:
    """Bytes of the tensors that live after two steps of PPO, by ZeRO stage; collective."""
    return {str(stage): kept(recipe_of(model, model.parent, stage), rank, world_size) for stage in STAGES}


def kept(recipe: Recipe, rank: int, world_size: int) -> int:
    before = living()
    base = Base(recipe.model, recipe.lora, seed=recipe.seed)
    policy, critic = Policy(base, recipe, rank, world_size), Critic(base, recipe, rank, world_size)
    reference = Reference(base, recipe)
    for step in range(2):
        groups = make_groups(seed=step)
        rollout = rollout_of(groups, recipe, policy.logprobs(groups), step=step)
        policy.update(rollout)
        critic.update(rollout)
        reference.logprobs(groups)
    del groups, rollout
    gc.collect()
    return sum(size for address, size in living().items() if address not in before)


def living() -> dict[int, int]:
    """Bytes of every piece of memory that a tensor of this process holds, by its address."""
    found: dict[int, int] = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor):
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


@pytest.fixture(scope="module")
def two(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("resting")
    (folder / "tiny").symlink_to(tiny_model)
    yield run_ranks(WORLD, scenario, folder / "tiny", folder)


@pytest.mark.parametrize("stage", STAGES)
def test_between_two_passes_a_trainer_keeps_weights_adapters_and_optimizers_and_no_gradients(
    two: list[dict[str, Any]], tiny_model: Path, tmp_path: Path, stage: int
) -> None:
    recipe = recipe_of(tiny_model, tmp_path, stage)
    work = Work.of(recipe, shape_of(recipe), this_cpu(16, 2))
    parts = trainer_parts(work, as_written(recipe), ("policy", "critic", "reference"), WORLD)
    for results in two:
        assert results[str(stage)] == pytest.approx(parts.resting - parts.overhead, rel=NEAR)
