"""Where the groups go: pure functions, no Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.placement import Node, Placement, Resources, all_fit, needed_roles, place, place_crew
from configs.schema import Recipe
from rlhf.errors import PlacementError
from tests.recipes import tiny_recipe

CPU = Resources(cpus=16)


@pytest.fixture
def recipe(tmp_path: Path) -> Any:
    """A recipe with changes."""

    def make(**changes: Any) -> Recipe:
        return tiny_recipe("model", tmp_path, **changes)

    return make


def shape(placement: Placement) -> dict[str, tuple[tuple[str, ...], int]]:
    return {group.name: (group.roles, group.num_workers) for group in placement.groups}


def test_shared_puts_all_but_the_generator_into_one_group(recipe: Any) -> None:
    assert shape(place(recipe(), CPU)) == {
        "trainer": (("policy", "reference", "reward", "critic"), 1),
        "generator": (("generator",), 1),
    }


def test_separate_gives_each_role_a_group_of_its_own(recipe: Any) -> None:
    placement = place(recipe(cluster={"placement": "separate", "workers": {"policy": 2}}), CPU)
    assert shape(placement) == {
        "policy": (("policy",), 2),
        "reference": (("reference",), 1),
        "reward": (("reward",), 1),
        "critic": (("critic",), 1),
        "generator": (("generator",), 1),
    }
    assert [group.bundles for group in placement.groups] == [(0, 1), (2,), (3,), (4,), (5,)]
    assert placement.bundles == [{"CPU": 0.25}] * 6


@pytest.mark.parametrize(
    ("changes", "roles"),
    [
        ({"stages": ["sample"]}, {"generator"}),
        ({"stages": ["rank"]}, set()),
        ({"stages": ["rank"], "rank": {"judge": "reward"}}, {"reward"}),
        ({"stages": ["reward"]}, {"reward"}),
        ({"stages": ["ppo"]}, {"policy", "reference", "reward", "critic", "generator"}),
        ({"stages": ["ppo"], "ppo": {"score": "rules"}}, {"policy", "reference", "critic", "generator"}),
        ({"stages": ["ppo"], "ppo": {"score": {"rules": 1, "reward": 0.5}, "kl": {"beta": 0}}},
         {"policy", "reward", "critic", "generator"}),
        ({"stages": ["ppo"], "ppo": {"score": "rules", "advantage": "group", "kl": {"beta": 0}}},
         {"policy", "generator"}),
        ({"stages": ["ppo"],
          "ppo": {"score": "rules", "advantage": "group", "kl": {"beta": 0}, "evaluate_every": 5}},
         {"policy", "reference", "generator"}),
        ({"stages": ["evaluate"]}, {"policy", "reference", "generator"}),
        ({"stages": ["evaluate"], "evaluate": {"judge": "reward"}}, {"policy", "reference", "reward", "generator"}),
    ],
)  # fmt: skip
def test_only_the_roles_that_the_stages_need_are_placed(recipe: Any, changes: Any, roles: set[str]) -> None:
    assert set(needed_roles(recipe(**changes))) == roles
    placed = [role for group in place(recipe(**changes), CPU).groups for role in group.roles]
    assert set(placed) == roles and len(placed) == len(roles)


def test_roles_may_be_named_instead(recipe: Any) -> None:
    assert shape(place(recipe(), CPU, roles=("reward",))) == {"trainer": (("reward",), 1)}


def test_shared_groups_have_half_of_each_gpu(recipe: Any) -> None:
    placement = place(recipe(), Resources(cpus=16, gpus=2))
    assert shape(placement)["trainer"][1] == shape(placement)["generator"][1] == 2
    assert [group.gpus for group in placement.groups] == [0.5, 0.5]
    assert placement.bundles == [{"CPU": 0.5, "GPU": 1.0}] * 2
    assert placement.shares_gpus


def test_a_group_alone_has_its_gpus_whole(recipe: Any) -> None:
    placement = place(recipe(stages=["sample"], generator={"tensor_parallel": 2}), Resources(cpus=16, gpus=4))
    assert placement.bundles == [{"CPU": 0.5, "GPU": 2.0}] * 2
    assert not placement.shares_gpus


def test_separate_workers_have_a_gpu_each_and_a_generator_as_many_as_it_is_wide(recipe: Any) -> None:
    separate = recipe(cluster={"placement": "separate", "workers": {"policy": 2}}, generator={"tensor_parallel": 2})
    placement = place(separate, Resources(cpus=16, gpus=7))
    assert [bundle["GPU"] for bundle in placement.bundles] == [1, 1, 1, 1, 1, 2]
    assert not placement.shares_gpus


def test_gpus_can_be_left_alone(recipe: Any) -> None:
    placement = place(recipe(cluster={"gpus": 0}), Resources(cpus=16, gpus=8))
    assert all(group.gpus == 0 and group.num_workers == 1 for group in placement.groups)
    assert not placement.shares_gpus


def test_generators_form_no_process_group(recipe: Any) -> None:
    assert {group.name: group.collective for group in place(recipe(), CPU).groups} == {
        "trainer": True,
        "generator": False,
    }


def test_too_few_gpus_are_refused_with_the_number_that_is_missing(recipe: Any) -> None:
    with pytest.raises(PlacementError, match=r"takes 5 GPUs: 3 are missing\. There are 2\.") as caught:
        place(recipe(cluster={"placement": "separate"}), Resources(cpus=16, gpus=2))
    assert "shared" in caught.value.remedy


def test_workers_that_make_a_model_have_a_gpu_each_where_there_are_any(recipe: Any) -> None:
    def crew(num_gpus: int, **cluster: Any) -> tuple[int, float]:
        plan = place_crew(recipe(cluster=cluster), Resources(cpus=16, gpus=num_gpus))
        return plan.num_workers, plan.gpus

    assert crew(0, workers={}) == (1, 0)
    assert crew(0, workers={"trainer": 2}) == (2, 0)
    assert crew(8, workers={}) == (8, 1)
    assert crew(8, workers={"trainer": 2}) == (2, 1)
    assert crew(8, workers={}, gpus=4) == (4, 1)
    assert crew(8, workers={}, gpus=0) == (1, 0)
    with pytest.raises(PlacementError, match=r"cluster\.workers\.trainer=3: .* There are 2\."):
        crew(2, workers={"trainer": 3})
    with pytest.raises(PlacementError, match=r"takes 24 logical CPUs, cluster\.cpus_per_worker=8 each: 8 are missing"):
        crew(0, workers={"trainer": 3}, cpus_per_worker=8)


def test_more_gpus_than_there_are_cannot_be_asked_for(recipe: Any) -> None:
    with pytest.raises(PlacementError, match=r"cluster\.gpus=4: 3 GPUs are missing"):
        place(recipe(cluster={"gpus": 4}), Resources(cpus=16, gpus=1))


def test_too_few_cpus_are_refused_with_the_number_that_is_missing(recipe: Any) -> None:
    with pytest.raises(PlacementError, match=r"takes 16 logical CPUs.*15 are missing\. Ray counts 1 ") as caught:
        place(recipe(cluster={"cpus_per_worker": 8}), Resources(cpus=1))
    assert "cluster.cpus_per_worker" in caught.value.remedy


@pytest.mark.parametrize(
    ("placement", "name"), [("shared", "policy"), ("shared", "critic"), ("separate", "trainer")]
)  # fmt: skip
def test_workers_of_a_group_that_the_placement_has_not_are_refused(recipe: Any, placement: str, name: str) -> None:
    with pytest.raises(PlacementError, match=rf"cluster\.workers\.{name}=2 .*there is no such group"):
        place(recipe(cluster={"placement": placement, "workers": {name: 2}}), CPU)


def test_a_wide_generator_cannot_share_a_gpu(recipe: Any) -> None:
    wide = recipe(generator={"tensor_parallel": 2})
    with pytest.raises(PlacementError, match=r"generator\.tensor_parallel=2 with cluster\.placement=shared"):
        place(wide, Resources(cpus=16, gpus=2))


def test_a_role_without_a_place_is_told_by_name(recipe: Any) -> None:
    placement = place(recipe(stages=["sample"]), CPU)
    assert placement.group_of("generator").name == "generator"
    with pytest.raises(PlacementError, match=r"'critic'.*Placed are generator\."):
        placement.group_of("critic")


def test_workers_that_compute_at_the_same_time_share_the_cores(recipe: Any) -> None:
    separate = place(recipe(cluster={"placement": "separate", "workers": {"policy": 2}}), CPU)
    beside = {group.name: separate.beside(group) for group in separate.groups}
    assert beside == {"policy": 2, "reference": 3, "reward": 0, "critic": 3, "generator": 0}
    shared = place(recipe(), CPU)
    assert [shared.beside(group) for group in shared.groups] == [0, 0]


def test_where_generation_overlaps_the_generator_computes_beside_the_others(recipe: Any) -> None:
    changes = {"stages": ["ppo"], "cluster": {"placement": "separate", "workers": {"generator": 2}}}
    turns, overlapped = (place(recipe(ppo={"max_staleness": age}, **changes), CPU) for age in (0, 1))
    assert {group.name: turns.beside(group) for group in turns.groups} == {
        **{"policy": 2, "reference": 2, "critic": 2},
        **{"reward": 0, "generator": 0},
    }
    assert {group.name: overlapped.beside(group) for group in overlapped.groups} == {
        **{"policy": 4, "reference": 4, "critic": 4},
        **{"reward": 0, "generator": 3},
    }


def test_generation_cannot_overlap_with_training_on_the_same_gpus(recipe: Any) -> None:
    ahead = {"ppo": {"max_staleness": 1}}
    with pytest.raises(
        PlacementError, match=r"ppo\.max_staleness=1 with cluster\.placement=shared: .* take turns"
    ) as told:
        place(recipe(**ahead), Resources(cpus=16, gpus=1))
    assert told.value.remedy == "Set cluster.placement=separate, or ppo.max_staleness=0."
    assert place(recipe(**ahead), CPU).overlaps  # two processes on CPUs
    assert place(recipe(**ahead, cluster={"placement": "separate"}), Resources(cpus=16, gpus=5)).overlaps
    assert not place(recipe(**ahead, stages=["sample", "evaluate"]), Resources(cpus=16, gpus=1)).overlaps


def test_without_gpus_a_generator_need_not_be_where_a_trainer_is(recipe: Any) -> None:
    placement = place(recipe(cluster={"workers": {"trainer": 2, "generator": 2}}), CPU)
    assert [group.bundles for group in placement.groups] == [(0, 1), (2, 3)]
    assert placement.bundles == [{"CPU": 0.25}] * 4


def test_workers_take_what_pins_them_to_a_node(recipe: Any) -> None:
    pinned = recipe(cluster={"workers": {"trainer": 2}, "resources": {"trainer": {"fast": 0.5}, "generator": {"b": 1}}})
    assert place(pinned, CPU).bundles == [{"CPU": 0.25, "fast": 0.5}] * 2 + [{"CPU": 0.25, "b": 1}]


def test_groups_on_the_same_gpu_take_both_what_pins_them(recipe: Any) -> None:
    pinned = recipe(cluster={"resources": {"trainer": {"fast": 0.5}, "generator": {"fast": 0.25}}})
    assert place(pinned, Resources(cpus=16, gpus=1)).bundles == [{"CPU": 0.5, "GPU": 1.0, "fast": 0.75}]


def test_resources_of_a_group_that_the_placement_has_not_are_refused(recipe: Any) -> None:
    with pytest.raises(PlacementError, match=r"cluster\.resources\.critic=.*there is no such group") as caught:
        place(recipe(cluster={"resources": {"critic": {"fast": 1}}}), CPU)
    assert "cluster.resources.trainer" in caught.value.remedy


def node(name: str, **has: float) -> Node:
    return Node(name, f"10.0.0.{ord(name[0])}", has)


def test_a_worker_that_no_node_can_hold_is_refused_with_what_the_nodes_have(recipe: Any) -> None:
    wide = recipe(cluster={"placement": "separate"}, stages=["sample"], generator={"tensor_parallel": 4})
    with pytest.raises(PlacementError, match=r"the group 'generator' takes 1 CPU, 4 GPU of one node") as caught:
        place(wide, Resources.of([node("a", CPU=8, GPU=2), node("b", CPU=8, GPU=2)]))
    assert caught.value.limit == "There are a 8 CPU, 2 GPU; b 8 CPU, 2 GPU."


def test_a_resource_that_no_node_has_is_refused(recipe: Any) -> None:
    pinned = recipe(cluster={"resources": {"generator": {"L40S": 1}}})
    with pytest.raises(PlacementError, match=r"takes 0\.25 CPU, 1 L40S of one node"):
        place(pinned, Resources.of([node("a", CPU=8)]))


def test_what_an_autoscaling_cluster_has_now_refuses_nothing(recipe: Any) -> None:
    grows = recipe(cluster={"address": "h:6379", "autoscale": True, "gpus": 4})
    placement = place(grows, Resources.of([node("a", CPU=1)]))
    assert placement.bundles == [{"CPU": 0.5, "GPU": 1.0}] * 4


@pytest.mark.parametrize(
    ("bundles", "fits"),
    [
        ([{"CPU": 2}, {"CPU": 2}], True),
        ([{"CPU": 3}], False),  # there are four, but on two nodes
        ([{"CPU": 1}, {"CPU": 1, "fast": 1}, {"CPU": 1, "fast": 1}, {"CPU": 1}], True),
        ([{"CPU": 1, "fast": 1}] * 3, False),
        ([{"CPU": 1}] * 2 + [{"CPU": 2, "fast": 1}], True),  # the first two leave the node with `fast` alone
        ([], True),
    ],
)
def test_bundles_go_whole_onto_nodes(bundles: list[dict[str, float]], fits: bool) -> None:
    assert all_fit(bundles, [node("a", CPU=2), node("b", CPU=2, fast=2)]) is fits
