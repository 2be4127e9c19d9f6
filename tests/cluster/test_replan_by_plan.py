"""Another size for a run that was planned: by the plan for what is there now. Pure functions, no Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.placement import Node, Resources, place
from cluster.plan.budget import Budget
from cluster.plan.devices import GPUS
from cluster.plan.page import to_json
from cluster.plan.search import Plan, plan
from cluster.plan.shape import shape_of
from cluster.plan.work import opened
from cluster.planning import keep
from cluster.replan import OwnPlacement, Planner, Size
from cluster.replan_by_plan import ByPlan, planner_of
from configs.schema import Recipe
from rlhf.errors import PlacementError


def begun(
    folder: Path, gpus: int, model: str = "qwen2.5-7b", ppo: dict[str, Any] | None = None, **cluster: Any
) -> tuple[Recipe, Planner]:
    """The recipe of a run that was planned for so many H100s, eight on a node, and its planner."""
    recipe = Recipe.model_validate(
        {
            "name": "planned",
            "model": {"path": model},
            "data": {"prompts": "prompts.jsonl", "max_prompt_tokens": 512},
            "sampling": {"max_answer_tokens": 512},
            "rules": [{"name": "short"}],
            "ppo": ppo or {"num_prompts": 32},
            "cluster": cluster,
        }
    )
    found = plan(recipe, shape_of(recipe), Budget(gpus, 8, GPUS["H100"]))
    assert isinstance(found, Plan)
    keep(found, folder)
    return found.recipe, planner_of(folder)


def hosts(*gpus: int) -> Resources:
    return Resources.of([Node(f"n{i}", f"10.0.0.{i}", {"CPU": 64, "GPU": n}) for i, n in enumerate(gpus)])


def test_a_run_that_was_not_planned_for_gpus_keeps_its_own_kind_of_placement(tmp_path: Path) -> None:
    assert isinstance(planner_of(tmp_path), OwnPlacement)
    (tmp_path / "plan.json").write_text("{")
    assert isinstance(planner_of(tmp_path), OwnPlacement)
    (tmp_path / "plan.json").write_text(json.dumps({"budget": {"gpus": 0}}))
    assert isinstance(planner_of(tmp_path), OwnPlacement)


def test_with_a_node_to_spare_nothing_changes(tmp_path: Path) -> None:
    recipe, planner = begun(tmp_path, 8)
    assert planner.narrowed(recipe, hosts(8)) == recipe


def test_what_is_left_is_planned_anew_and_fits_its_memory(tmp_path: Path) -> None:
    recipe, planner = begun(tmp_path, 16)
    assert recipe.cluster.gpus == 16
    found = planner.narrowed(recipe, hosts(8))
    assert found.cluster.gpus == 8
    assert place(found, hosts(8))
    assert found.ppo == recipe.ppo and found.model == recipe.model  # the global batch stays
    assert (found.cluster.placement, found.learner.zero_stage) == (
        recipe.cluster.placement,
        recipe.learner.zero_stage,
    )  # and what it costs to change
    again = plan(found, shape_of(found), Budget(8, 8, GPUS["H100"]))
    assert isinstance(again, Plan)  # with every setting fixed, memory suffices


def test_a_run_grows_to_what_it_is_given_and_back(tmp_path: Path) -> None:
    recipe, planner = begun(tmp_path, 8)
    wide = planner.scaled(recipe, Size(gpus=16), hosts(8, 8))
    assert wide.cluster.gpus == 16
    assert sum(wide.cluster.workers.values()) > sum(recipe.cluster.workers.values())
    assert planner.scaled(wide, Size(gpus=8), None).cluster == recipe.cluster


@pytest.mark.parametrize("there", [None, hosts(8, 8)])
def test_more_workers_take_the_gpus_that_they_need(tmp_path: Path, there: Resources | None) -> None:
    recipe, planner = begun(tmp_path, 2)
    wide = planner.scaled(recipe, Size(workers=4), there)
    assert wide.cluster.workers == {"trainer": 4, "generator": 4} and wide.cluster.gpus == 4
    back = planner.scaled(wide, Size(by_group={"trainer": 2, "generator": 2}), there)
    assert back.cluster == recipe.cluster


def test_more_workers_than_there_are_gpus_or_than_people_allow_are_refused(tmp_path: Path) -> None:
    recipe, planner = begun(tmp_path, 2)
    with pytest.raises(PlacementError, match="2 are missing"):
        planner.scaled(recipe, Size(workers=4), hosts(2))
    fixed = ByPlan(Budget(2, 8, GPUS["H100"]), ["cluster.workers"], OwnPlacement())
    with pytest.raises(PlacementError, match=r"2 are missing.*cluster.gpus=2"):
        fixed.scaled(recipe, Size(workers=4), hosts(8))


def test_a_run_that_writes_answers_ahead_is_not_planned_onto_shared_gpus(tmp_path: Path) -> None:
    recipe, planner = begun(tmp_path, 16, ppo={"num_prompts": 32, "max_staleness": 1})
    found = planner.narrowed(recipe, hosts(6))
    assert found.cluster.placement == "separate" and place(found, hosts(6))
    with pytest.raises(PlacementError, match="at least 5 GPUs"):
        planner.narrowed(recipe, hosts(4))


def test_more_gpus_than_there_are_are_refused_with_their_number(tmp_path: Path) -> None:
    recipe, planner = begun(tmp_path, 8)
    with pytest.raises(PlacementError, match="8 GPUs are missing"):
        planner.scaled(recipe, Size(gpus=16), hosts(8))


def test_too_few_for_the_model_are_refused_by_role_and_with_what_would_do(tmp_path: Path) -> None:
    recipe, planner = begun(tmp_path, 64, "qwen2.5-32b")
    with pytest.raises(PlacementError) as caught:
        planner.narrowed(recipe, hosts(1))
    assert "missing" in caught.value.problem
    assert "GPUs" in caught.value.remedy


def test_what_people_fixed_is_not_planned_away(tmp_path: Path) -> None:
    recipe, planner = begun(tmp_path, 16, placement="separate")
    found = planner.narrowed(recipe, hosts(8))
    assert found.cluster.placement == "separate"
    workers = planner.scaled(recipe, Size(by_group={"generator": 2}), hosts(8, 8))
    assert workers.cluster.workers["generator"] == 2


def test_gpus_of_the_smallest_node_are_what_an_engine_may_span(tmp_path: Path) -> None:
    recipe, planner = begun(tmp_path, 16)
    assert isinstance(planner, ByPlan)
    found = planner.narrowed(recipe, hosts(4, 4, 4))
    assert found.cluster.gpus in range(1, 13)
    assert found.generator.tensor_parallel <= 4


def test_a_plan_in_the_run_folder_says_all_that_is_read_of_it(tmp_path: Path) -> None:
    recipe, _ = begun(tmp_path, 8)
    kept = json.loads((tmp_path / "plan.json").read_bytes())
    found = plan(opened(recipe, kept["chosen"]), shape_of(recipe), Budget(8, 8, GPUS["H100"]))
    assert isinstance(found, Plan)
    assert to_json(found)["settings"] == kept["settings"]
