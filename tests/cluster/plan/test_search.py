"""Plans and refusals: what must hold for any budget, and what is chosen for known ones."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.placement import needed_roles
from cluster.plan.budget import Budget
from cluster.plan.devices import GPUS, this_cpu
from cluster.plan.fit import room
from cluster.plan.remedies import explained, remedies
from cluster.plan.search import Plan, Refusal, fits, plan
from cluster.plan.shape import Shape, shape_of
from cluster.plan.work import KEYS, fixed, opened
from configs.load import load_recipe
from configs.schema import Recipe
from rlhf.errors import PlacementError

RECIPES = Path(__file__).parents[3] / "configs" / "recipes"


def a_recipe(**changes: Any) -> Recipe:
    base: dict[str, Any] = {
        "name": "planned",
        "model": {"path": "qwen2.5-7b"},
        "data": {"prompts": "prompts.jsonl", "max_prompt_tokens": 512},
        "sampling": {"max_answer_tokens": 512},
        "rules": [{"name": "short"}],
        "ppo": {"num_prompts": 32},
    }
    return Recipe.model_validate(base | changes)


@lru_cache
def shape(name: str) -> Shape:
    return shape_of(a_recipe(), name)


def planned(recipe: Recipe, model: str, gpus: int, device: str) -> Plan | Refusal:
    return plan(recipe, shape(model), Budget(gpus, 8, GPUS[device]))


def a_plan(found: Plan | Refusal) -> Plan:
    assert isinstance(found, Plan), found.problem
    return found


def a_refusal(found: Plan | Refusal) -> Refusal:
    assert isinstance(found, Refusal)
    return found


RECIPE_CHANGES: Mapping[str, Mapping[str, Any]] = {
    "as it is": {},
    "separate": {"cluster": {"placement": "separate"}},
    "no critic, no reward model": {
        "ppo": {"num_prompts": 32, "advantage": "group", "score": "rules", "kl": {"where": "loss"}},
        "rank": {"judge": "rules"},
        "stages": ["ppo"],
    },
    "answers alone": {"stages": ["sample"]},
    "a reward model alone": {"stages": ["reward"]},
    "fixed workers": {"cluster": {"placement": "separate", "workers": {"policy": 2, "generator": 3}}},
    "sft and ppo": {"stages": ["sft", "ppo"], "sft": {"sources": [{"path": "x.jsonl"}]}},
    "pretrain": {"stages": ["pretrain"], "pretrain": {"sources": [{"path": "x.txt"}]}},
    "long passes": {"learner": {"micro_batch_tokens": 16384, "gradient_checkpointing": False}},
    "answers ahead": {"ppo": {"num_prompts": 32, "max_staleness": 1}},
    "workers of roles that these stages do not need": {
        "stages": ["reward"],
        "cluster": {"workers": {"policy": 2, "reward": 2}},
    },
    "wide engine": {"cluster": {"placement": "separate"}, "generator": {"tensor_parallel": 4}},
}
budgets = st.builds(
    lambda gpus, per_node, device: Budget(gpus, per_node, GPUS[device]),
    st.integers(0, 128),
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from(sorted(GPUS)),
)
cases = st.tuples(
    st.sampled_from(sorted(RECIPE_CHANGES)),
    st.sampled_from(["qwen2.5-0.5b", "qwen2.5-7b", "llama-3.1-70b"]),
    budgets,
)


@given(cases)
@settings(deadline=None, max_examples=80, derandomize=True)
def test_a_plan_takes_no_more_than_there_is_and_gives_every_role_a_place(case: Any) -> None:
    change, model, budget = case
    recipe = a_recipe(**RECIPE_CHANGES[change])
    found = plan(recipe, shape(model), budget)
    if isinstance(found, Refusal):
        assert found.role and found.problem and found.limit
        return
    assert found.num_gpus <= budget.num_gpus
    assert sum(bundle.get("GPU", 0.0) for bundle in found.placement.bundles) <= found.num_gpus
    placed = [role for group in found.placement.groups for role in group.roles]
    assert sorted(placed) == sorted(needed_roles(recipe))  # each once
    for group in found.placement.groups:
        assert group.num_workers >= 1 and group.gpus > 0
    for load in found.fit.loads:
        assert load.parts.total <= room(found.work)
    layout = found.fit.layout
    engines = layout.world("generator") if "generator" in placed else 0
    if layout.placement == "separate":
        assert budget.holds(found.num_gpus - engines * layout.tensor_parallel, engines, layout.tensor_parallel)
    elif engines and len(placed) > 1:
        trainer, engine = found.fit.loads[-2:]
        assert trainer.parts.resting + engine.parts.total <= room(found.work)
    for key in fixed(recipe):  # what the recipe fixes is kept
        section, _, name = key.partition(".")
        before, after = (getattr(getattr(one, section), name) for one in (recipe, found.recipe))
        assert before == after or (key == "cluster.workers" and before.items() <= after.items())


@given(cases)
@settings(deadline=None, max_examples=60, derandomize=True)
def test_what_fits_in_n_gpus_fits_in_one_more(case: Any) -> None:
    change, model, budget = case
    recipe = a_recipe(**RECIPE_CHANGES[change])
    if fits(recipe, shape(model), budget):
        assert fits(recipe, shape(model), budget.of(budget.num_gpus + 1))


@given(cases)
@settings(deadline=None, max_examples=30, derandomize=True)
def test_a_budget_fits_exactly_if_there_is_a_plan_for_it(case: Any) -> None:
    change, model, budget = case
    recipe = a_recipe(**RECIPE_CHANGES[change])
    found = plan(recipe, shape(model), budget)
    assert isinstance(found, Plan) == fits(recipe, shape(model), budget)


@given(cases)
@settings(deadline=None, max_examples=20, derandomize=True)
def test_the_number_of_gpus_that_a_refusal_names_fits_and_one_less_does_not(case: Any) -> None:
    change, model, budget = case
    found = plan(a_recipe(**RECIPE_CHANGES[change]), shape(model), budget)
    named = (
        [words for words in remedies(found) if words.split()[1:] in (["GPU"], ["GPUs"])]
        if isinstance(found, Refusal)
        else []
    )
    for words in named:
        number = int(words.split()[0])
        assert number > budget.num_gpus
        recipe = a_recipe(**RECIPE_CHANGES[change])
        assert fits(recipe, shape(model), budget.of(number))
        assert not fits(recipe, shape(model), budget.of(number - 1))


@pytest.mark.parametrize(
    ("name", "model", "gpus", "device"),
    [
        ("one_gpu_24gib", "qwen2.5-1.5b", 1, "RTX-4090"),
        ("one_gpu_80gib", "qwen2.5-7b", 1, "H100"),
        ("eight_gpu", "qwen2.5-7b", 8, "H100"),
    ],
)
def test_the_recipes_for_gpus_fit_the_gpus_that_they_are_for(name: str, model: str, gpus: int, device: str) -> None:
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    found = a_plan(planned(recipe, model, gpus, device))
    assert found.fit.layout.micro_batch_tokens == recipe.learner.micro_batch_tokens
    assert found.num_gpus == gpus


def test_more_gpus_make_a_step_shorter() -> None:
    steps = [a_plan(planned(a_recipe(), "qwen2.5-7b", gpus, "H100")).times.step for gpus in (1, 2, 4, 8, 16)]
    assert steps == sorted(steps, reverse=True)


def test_a_base_that_no_gpu_holds_is_spread_with_its_reference_where_there_are_gpus_enough() -> None:
    refused = a_refusal(planned(a_recipe(), "llama-3.1-70b", 8, "H100"))
    assert "at least" in refused.problem and refused.shortage is None
    found = a_plan(planned(a_recipe(), "llama-3.1-70b", 64, "H100"))
    assert found.fit.layout.zero_stage == 3 and found.fit.layout.placement == "separate"
    assert found.fit.layout.tensor_parallel > 1
    reference = next(load for load in found.fit.loads if load.group == "reference")
    assert reference.num_workers > 1 and reference.parts.weights < 2 * 70.55e9 / reference.num_workers + 2.2e9


def test_a_base_that_no_gpu_holds_is_refused_where_the_recipe_keeps_it_whole() -> None:
    recipe = a_recipe(learner={"zero_stage": 0}, cluster={"placement": "separate"})
    found = a_refusal(planned(recipe, "llama-3.1-70b", 64, "H100"))
    assert found.role in ("policy", "critic", "reward")
    assert found.shortage is not None and found.shortage.needs > 131 * 2**30  # 2 bytes of 70.55e9 parameters
    assert "GiB are missing" in found.problem
    assert not [words for words in remedies(found) if words.endswith("GPUs")]
    assert "learner.zero_stage left to the plan" in str(explained(found))


def test_a_refusal_names_the_nearest_change_that_fits() -> None:
    recipe = a_recipe(learner={"micro_batch_tokens": 16384, "gradient_checkpointing": False})
    found = a_refusal(planned(recipe, "qwen2.5-7b", 1, "H100"))
    told = str(explained(found))
    assert "The trainer needs" in told and "gradient checkpointing" in told
    assert fits(
        recipe.model_copy(update={"learner": recipe.learner.model_copy(update={"gradient_checkpointing": True})}),
        found.work.shape, found.budget,
    )  # fmt: skip


def test_a_refusal_for_want_of_gpus_says_how_many_each_role_takes() -> None:
    recipe = a_recipe(cluster={"placement": "separate"})
    found = a_refusal(planned(recipe, "qwen2.5-7b", 3, "H100"))
    assert "at least 5 GPUs (policy 1, reference 1, reward 1, critic 1, generator 1)" in found.problem
    assert remedies(found)[0] == "5 GPUs"
    assert any("cluster.placement left to the plan" in words for words in remedies(found))


def test_no_gpu_at_all_is_refused_in_words() -> None:
    found = a_refusal(planned(a_recipe(), "qwen2.5-0.5b", 0, "H100"))
    assert str(explained(found)).startswith("The policy needs a GPU. There is none. It fits with 1 GPU")


def test_gpus_that_the_recipe_asks_for_and_are_not_there_are_refused() -> None:
    found = a_refusal(planned(a_recipe(cluster={"gpus": 4}), "qwen2.5-7b", 2, "H100"))
    assert "cluster.gpus=4: 2 GPUs are missing." in found.problem


def test_a_limit_of_gpus_in_the_recipe_is_kept() -> None:
    assert a_plan(planned(a_recipe(cluster={"gpus": 2}), "qwen2.5-7b", 8, "H100")).num_gpus <= 2


def test_groups_that_the_placement_does_not_have_are_refused_as_a_run_refuses_them() -> None:
    with pytest.raises(PlacementError, match="there is no such group"):
        planned(a_recipe(cluster={"placement": "shared", "workers": {"critic": 1}}), "qwen2.5-7b", 8, "H100")


def test_answers_that_are_written_ahead_have_gpus_of_their_own() -> None:
    ahead = {"num_prompts": 32, "max_staleness": 1}
    found = a_plan(planned(a_recipe(ppo=ahead), "qwen2.5-7b", 8, "H100"))
    assert found.recipe.cluster.placement == "separate"
    few = a_refusal(planned(a_recipe(ppo=ahead), "qwen2.5-7b", 2, "H100"))
    assert "On one base" not in few.problem and remedies(few)[0] == "5 GPUs"
    shared = a_recipe(ppo=ahead, cluster={"placement": "shared"})
    with pytest.raises(PlacementError, match=r"cannot be written while a step trains"):
        planned(shared, "qwen2.5-7b", 8, "H100")
    assert not fits(shared, shape("qwen2.5-7b"), Budget(8, 8, GPUS["H100"]))


def test_workers_of_groups_that_these_stages_do_not_need_hinder_nothing() -> None:
    recipe = a_recipe(stages=["reward"], cluster={"workers": {"policy": 2, "reward": 2}})
    found = a_plan(planned(recipe, "qwen2.5-7b", 8, "H100"))
    assert (found.recipe.cluster.placement, found.num_gpus) == ("separate", 2)


def test_without_a_gpu_the_recipe_stays_as_it_is_and_its_processes_are_weighed() -> None:
    recipe = a_recipe(model={"path": "smollm2-135m", "dtype": "float32"}, learner={"micro_batch_tokens": 1024})
    budget = Budget(0, 8, this_cpu(24, 2))
    found = a_plan(plan(recipe, shape("smollm2-135m"), budget))
    assert found.recipe == recipe and found.num_gpus == 0
    assert [load.group for load in found.fit.loads] == ["trainer", "generator"]
    refused = a_refusal(plan(recipe, shape("qwen2.5-7b"), budget))
    assert "There are" in refused.limit and "on this machine" in refused.limit


def test_a_setting_is_fixed_where_the_recipe_says_it_and_can_be_opened_again() -> None:
    recipe = a_recipe(
        learner={"zero_stage": 2}, cluster={"gpus": 4, "workers": {"trainer": 2}}, generator={"kv_cache_gib": 4}
    )
    assert fixed(recipe) == {
        "learner.zero_stage", "cluster.gpus", "cluster.workers", "generator.gpu_memory_share",
    }  # fmt: skip
    again = opened(recipe, KEYS)
    assert fixed(again) == {"generator.gpu_memory_share"}  # the cache's size is still there
    assert again.learner.zero_stage == 0 and again.cluster.gpus == "auto" and not again.cluster.workers
    assert fixed(a_recipe(cluster={"gpus": "auto"})) == frozenset()


def test_the_resolved_recipe_gives_the_same_plan_again() -> None:
    found = a_plan(planned(a_recipe(), "qwen2.5-7b", 8, "H100"))
    again = a_plan(planned(found.recipe, "qwen2.5-7b", 8, "H100"))
    assert again.recipe == found.recipe and again.placement == found.placement
    assert set(found.chosen) == set(KEYS)
