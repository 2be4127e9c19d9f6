"""What is decided after a loss: a pure function."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.placement import Node, Resources
from cluster.recovery import Loss, Move, decide, missing
from cluster.replan import OwnPlacement
from configs.schema import Recipe
from tests.recipes import tiny_recipe

EAST, WEST = Node("east", "10.0.0.1", {"CPU": 2}), Node("west", "10.0.0.2", {"CPU": 2})
WHAT = "Worker 1 of 2 of the group 'trainer' is gone."


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """Three workers of one CPU each."""
    cluster = {"gpus": 0, "cpus_per_worker": 1, "workers": {"trainer": 2}, "max_failures": 2}
    return tiny_recipe("model", tmp_path, cluster=cluster)


def test_a_worker_that_was_lost_alone_is_started_again(recipe: Recipe) -> None:
    decision = decide(recipe, Loss(WHAT, (), Resources.of([EAST, WEST]), 1), OwnPlacement())
    assert (decision.move, decision.recipe, decision.error) == (Move.RETRY, recipe, None)


def test_a_node_that_is_not_needed_leaves_the_placement_as_it_is(recipe: Recipe) -> None:
    large = Node("large", "10.0.0.3", {"CPU": 4})
    assert decide(recipe, Loss(WHAT, (WEST,), Resources.of([large]), 1), OwnPlacement()).move is Move.RETRY


def test_with_too_little_left_the_run_gets_narrower(recipe: Recipe) -> None:
    decision = decide(recipe, Loss(WHAT, (WEST,), Resources.of([EAST]), 1), OwnPlacement())
    assert decision.move is Move.SHRINK and decision.error is None
    assert decision.recipe.cluster.workers == {"trainer": 1}
    assert decision.recipe.ppo == recipe.ppo


def test_with_nothing_left_that_will_do_the_run_stops_with_the_nodes_name(recipe: Recipe) -> None:
    small = Node("small", "10.0.0.4", {"CPU": 1})
    decision = decide(recipe, Loss(WHAT, (EAST, WEST), Resources.of([small]), 1), OwnPlacement())
    assert decision.move is Move.RAISE and decision.error is not None
    told = str(decision.error)
    assert told.startswith(f"The nodes east (10.0.0.1), west (10.0.0.2) went away. {WHAT} What is left has no place")
    assert "1 are missing" in told and "tenfold resume" in told


def test_what_fails_again_and_again_without_coming_forward_ends(recipe: Recipe) -> None:
    there = Resources.of([EAST, WEST])
    assert decide(recipe, Loss(WHAT, (), there, 2), OwnPlacement()).move is Move.RETRY
    decision = decide(recipe, Loss(WHAT, (), there, 3), OwnPlacement())
    assert decision.move is Move.RAISE
    assert "3 times with no new checkpoint" in str(decision.error) and "cluster.max_failures=2" in str(decision.error)


def test_a_node_that_has_other_resources_now_is_not_missing() -> None:
    same = Node("east", "10.0.0.1", {"CPU": 2, "bundle_group_1": 1000})
    assert missing((EAST, WEST), (same,)) == (WEST,)
