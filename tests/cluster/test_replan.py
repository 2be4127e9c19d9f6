"""The same run in another size: pure functions, no Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.placement import Node, Resources
from cluster.replan import OwnPlacement, Size, settled
from configs.schema import Recipe
from rlhf.errors import PlacementError
from tests.recipes import tiny_recipe


def nodes(*amounts: dict[str, float]) -> Resources:
    return Resources.of([Node(f"n{i}", f"10.0.0.{i}", has) for i, has in enumerate(amounts)])


@pytest.fixture
def recipe(tmp_path: Path) -> Any:
    """A recipe with this cluster section, no GPUs unless it says so."""

    def make(**cluster: Any) -> Recipe:
        return tiny_recipe("model", tmp_path, cluster={"gpus": 0, "cpus_per_worker": 1, **cluster})

    return make


def test_what_fits_is_kept_as_it_is(recipe: Any) -> None:
    asked = recipe(workers={"trainer": 2, "generator": 1})
    assert OwnPlacement().narrowed(asked, nodes({"CPU": 2}, {"CPU": 1})) == asked


def test_groups_get_narrower_in_proportion_until_they_fit(recipe: Any) -> None:
    asked = recipe(workers={"trainer": 4, "generator": 2})
    found = OwnPlacement().narrowed(asked, nodes({"CPU": 4}))
    # 4 + 2 do not fit into 4 CPUs; 3 + 1 do.
    assert found.cluster.workers == {"trainer": 3, "generator": 1}
    assert found.ppo == asked.ppo  # the batch stays
    assert OwnPlacement().narrowed(asked, nodes({"CPU": 3})).cluster.workers == {"trainer": 2, "generator": 1}


def test_one_worker_of_each_group_is_the_least(recipe: Any) -> None:
    with pytest.raises(PlacementError, match=r"takes 2 logical CPUs.* 1 are missing"):
        OwnPlacement().narrowed(recipe(workers={"trainer": 4}), nodes({"CPU": 1}))


def test_a_node_that_alone_had_what_a_group_needs_cannot_be_spared(recipe: Any) -> None:
    pinned = recipe(resources={"generator": {"west": 1}})
    with pytest.raises(PlacementError, match=r"'generator' takes 1 CPU, 1 west of one node: no node has that"):
        OwnPlacement().narrowed(pinned, nodes({"CPU": 8}))


def test_cpus_that_lie_on_two_nodes_are_no_worker(recipe: Any) -> None:
    halves = nodes({"CPU": 1.5}, {"CPU": 1.5})
    assert OwnPlacement().narrowed(recipe(workers={"trainer": 2}), halves).cluster.workers == {"trainer": 1}


def test_auto_is_the_number_of_gpus_that_the_run_began_with(recipe: Any) -> None:
    began = settled(recipe(gpus="auto"), nodes({"CPU": 8, "GPU": 2}, {"CPU": 8, "GPU": 2}))
    assert began.cluster.gpus == 4
    assert OwnPlacement().narrowed(began, nodes({"CPU": 8, "GPU": 2})).cluster.gpus == 2
    with pytest.raises(PlacementError, match=r"used GPUs \(4\), and none is left"):
        OwnPlacement().narrowed(began, nodes({"CPU": 8}))


def test_a_number_of_gpus_scales_the_workers_in_proportion(recipe: Any) -> None:
    asked = recipe(gpus=8, placement="separate", workers={"policy": 3, "critic": 2, "generator": 1})
    room = nodes({"CPU": 99, "GPU": 16})
    # Of policy, reference, reward, critic, generator: 3 + 1 + 1 + 2 + 1 = 8 of 8; 7 + 1 + 1 + 4 + 2 = 15 of 16.
    assert OwnPlacement().scaled(asked, Size(gpus=16), room).cluster.workers == {
        "policy": 7,
        "critic": 4,
        "generator": 2,
    }
    assert OwnPlacement().scaled(asked, Size(gpus=5), None).cluster.workers == {
        "policy": 1,
        "critic": 1,
        "generator": 1,
    }


def test_where_workers_follow_from_the_gpus_their_number_is_all_that_changes(recipe: Any) -> None:
    found = OwnPlacement().scaled(recipe(gpus=8), Size(gpus=4), nodes({"CPU": 99, "GPU": 8}))
    assert (found.cluster.gpus, found.cluster.workers) == (4, {})


def test_more_gpus_than_there_are_are_refused_with_their_number(recipe: Any) -> None:
    with pytest.raises(PlacementError, match=r"cluster\.gpus=8: 4 GPUs are missing"):
        OwnPlacement().scaled(recipe(gpus=2), Size(gpus=8), nodes({"CPU": 99, "GPU": 4}))


def test_workers_are_set_for_every_group_or_for_those_named(recipe: Any) -> None:
    asked = recipe(workers={"trainer": 2})
    room = nodes({"CPU": 8})
    assert OwnPlacement().scaled(asked, Size(workers=3), room).cluster.workers == {"trainer": 3, "generator": 3}
    named = OwnPlacement().scaled(asked, Size(by_group={"generator": 2}), room)
    assert named.cluster.workers == {"trainer": 2, "generator": 2}


def test_workers_that_the_cluster_cannot_hold_are_refused(recipe: Any) -> None:
    with pytest.raises(PlacementError, match="takes 10 logical CPUs"):
        OwnPlacement().scaled(recipe(), Size(workers=5), nodes({"CPU": 8}))
    with pytest.raises(PlacementError, match="there is no such group"):
        OwnPlacement().scaled(recipe(), Size(by_group={"critic": 2}), None)


def test_the_workers_that_make_a_model_are_scaled_for_themselves(tiny_recipe_of_sft: Recipe) -> None:
    planner = OwnPlacement(makes_model=True)
    room = nodes({"CPU": 2}, {"CPU": 1})
    assert planner.scaled(tiny_recipe_of_sft, Size(workers=3), room).cluster.workers == {"trainer": 3}
    with pytest.raises(PlacementError, match=r"takes 4 logical CPUs.*1 are missing"):
        planner.scaled(tiny_recipe_of_sft, Size(workers=4), room)
    with pytest.raises(PlacementError, match="3 bundles of workers do not go whole onto the nodes"):
        planner.scaled(tiny_recipe_of_sft, Size(workers=3), nodes({"CPU": 1.5}, {"CPU": 1.5}))


@pytest.fixture
def tiny_recipe_of_sft(tmp_path: Path) -> Recipe:
    changes: dict[str, Any] = {"stages": ["sft"], "sft": {"sources": [{"path": "pairs.jsonl"}]}}
    return tiny_recipe("model", tmp_path, cluster={"gpus": 0, "cpus_per_worker": 1}, **changes)
