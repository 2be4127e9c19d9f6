"""`plan`: from a model, a recipe and a budget to a placement, or to a refusal. A pure function."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from cluster.placement import Placement, Resources, place
from cluster.plan.budget import Budget
from cluster.plan.candidates import Candidate, candidates, shortages, smallest_groups
from cluster.plan.fit import Fit, Shortage, fit
from cluster.plan.memory import gib
from cluster.plan.shape import Shape
from cluster.plan.times import Times, estimate
from cluster.plan.work import KEYS, Layout, Work, fixed, opened
from configs.schema import Recipe
from rlhf.errors import PlacementError

MANY = 4096  # GPUs: enough for any recipe's workers
ABOUT_EQUAL = 1.01  # plans whose steps take nearly as long: the one with fewer GPUs is taken


@dataclass(frozen=True, slots=True)
class Plan:
    """What a budget becomes."""

    recipe: Recipe  # with every key of KEYS set
    placement: Placement
    fit: Fit
    times: Times
    budget: Budget
    work: Work
    num_gpus: int  # that it takes; the others stay idle

    @property
    def chosen(self) -> Mapping[str, Any]:
        """The keys that the recipe left open, with what was chosen for each."""
        return {key: value for key, value in settings(self.recipe).items() if key not in fixed(self.work.recipe)}


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why nothing fits."""

    role: str
    problem: str
    limit: str
    budget: Budget
    work: Work
    shortage: Shortage | None  # None where GPUs are missing, not memory

    def error(self, remedy: str) -> PlacementError:
        """The refusal as an error, with the changes that would fit."""
        return PlacementError(self.problem, limit=self.limit, remedy=remedy)


def plan(recipe: Recipe, shape: Shape, budget: Budget) -> Plan | Refusal:
    """The plan with the shortest step that fits the budget, or a refusal that names the role that does not fit.

    Keys that the recipe sets are kept (`work.fixed`). Without GPUs nothing is chosen: the recipe is taken as it is, and
    its processes are weighed against the machine's memory.

    Raises PlacementError for groups that the recipe's placement does not have.
    """
    work = Work.of(recipe, shape, budget.device)
    if budget.device.is_cpu:
        return _on_cpu(work, budget)
    wanted = recipe.cluster.gpus
    if wanted != "auto" and wanted > budget.num_gpus:
        return Refusal(
            "run", f"cluster.gpus={wanted}: {wanted - budget.num_gpus} GPUs are missing.",
            f"There are {budget.num_gpus}.", budget, work, None,
        )  # fmt: skip
    if not work.roles and not work.makes:
        return Plan(recipe, Placement(()), Fit(as_written(recipe), (), 0), Times(0, 0, 0, 0), budget, work, 0)
    if "cluster.placement" in fixed(recipe) and (recipe.cluster.workers or work.overlaps):
        # It has the groups that are set, and a generator that is free while others train.
        place(opened(recipe, ["cluster.gpus"]), Resources(math.inf, MANY), work.roles)
    found = list(candidates(work, budget))
    if not found:
        return _refusal(work, budget)
    best = _best(found)
    resolved = resolve(recipe, best.fit.layout, best.num_gpus)
    placement = place(resolved, Resources(budget.cpus, budget.num_gpus), work.roles)
    return Plan(resolved, placement, best.fit, best.times, budget, work, best.num_gpus)


def fits(recipe: Recipe, shape: Shape, budget: Budget) -> bool:
    """Whether `plan` would give a plan; quicker, since the first layout that fits is enough."""
    work = Work.of(recipe, shape, budget.device)
    if budget.device.is_cpu:
        return isinstance(_on_cpu(work, budget), Plan)
    if recipe.cluster.gpus != "auto" and recipe.cluster.gpus > budget.num_gpus:
        return False
    return not (work.roles or work.makes) or next(candidates(work, budget, grows=False), None) is not None


def settings(recipe: Recipe) -> dict[str, Any]:
    """The recipe's values of KEYS."""
    return {key: getattr(getattr(recipe, key.partition(".")[0]), key.partition(".")[2]) for key in KEYS}


def resolve(recipe: Recipe, layout: Layout, num_gpus: int) -> Recipe:
    """The recipe with the layout's values."""
    generator: dict[str, Any] = {"tensor_parallel": layout.tensor_parallel}
    if layout.gpu_memory_share is not None:
        generator["gpu_memory_share"] = layout.gpu_memory_share
    learner = {
        "zero_stage": layout.zero_stage,
        "micro_batch_tokens": layout.micro_batch_tokens,
        "gradient_checkpointing": layout.gradient_checkpointing,
    }
    cluster = {
        "placement": layout.placement,
        "gpus": num_gpus,
        "workers": dict(recipe.cluster.workers) | dict(layout.workers),
    }
    return recipe.model_copy(
        update={
            "learner": recipe.learner.model_copy(update=learner),
            "generator": recipe.generator.model_copy(update=generator),
            "cluster": recipe.cluster.model_copy(update=cluster),
        }
    )


def as_written(recipe: Recipe) -> Layout:
    """The layout that the recipe's own values give."""
    learner, generator = recipe.learner, recipe.generator
    return Layout(
        recipe.cluster.placement, learner.zero_stage, learner.micro_batch_tokens, learner.gradient_checkpointing,
        generator.tensor_parallel, dict[str, int](recipe.cluster.workers.items()), generator.gpu_memory_share,
    )  # fmt: skip


def _best(found: list[Candidate]) -> Candidate:
    fastest = min(candidate.times.step for candidate in found)
    near = [candidate for candidate in found if candidate.times.step <= ABOUT_EQUAL * fastest]
    return min(
        near,
        key=lambda candidate: (
            candidate.num_gpus, candidate.fit.layout.zero_stage, candidate.fit.layout.gradient_checkpointing,
            candidate.times.step,
        ),
    )  # fmt: skip


def _on_cpu(work: Work, budget: Budget) -> Plan | Refusal:
    layout = as_written(work.recipe)
    found = fit(work, layout)
    if isinstance(found, Shortage):
        return _lacks(work, budget, found)
    cache = next((load.parts.kv_cache for load in found.loads if load.group == "generator"), 0)
    placement = place(work.recipe, Resources(budget.cpus), work.roles)
    return Plan(work.recipe, placement, found, estimate(work, layout, cache, 1), budget, work, 0)


def _refusal(work: Work, budget: Budget) -> Refusal:
    """Names the layout that comes nearest: by memory where one GPU is too small, else by the number of GPUs."""
    # With as many GPUs as the groups like: is it the size of one, or their number?
    several = replace(budget, num_gpus=max(budget.num_gpus, 1))
    lacking = list(shortages(work, several))
    groups = smallest_groups(work, budget) if work.recipe.cluster.placement == "separate" or len(work.roles) > 1 else {}
    if lacking and not groups:
        return _lacks(work, budget, min(lacking, key=lambda shortage: shortage.missing))
    if budget.num_gpus == 0:
        first = (*work.roles, *work.makes)[0]
        return Refusal(first, f"The {first} needs a GPU.", "There is none.", budget, work, None)
    if groups:
        needed = sum(groups.values())
        listed = ", ".join(f"{role} {number}" for role, number in groups.items())
        largest = max(groups, key=lambda role: groups[role])
        shared = [shortage for shortage in lacking if shortage.role in ("trainer", "generator")]
        if needed <= budget.num_gpus:  # not their number, but what the recipe fixes or how nodes are cut
            return Refusal(
                largest, f"The groups ({listed}) find no place as the recipe fixes them.",
                f"The budget is {_described(budget)}.", budget, work, None,
            )  # fmt: skip
        also = "" if not shared else f" On one base: {_sentence(work, min(shared, key=lambda s: s.missing))}"
        return Refusal(
            largest, f"Groups of their own take at least {needed} GPUs ({listed}).{also}",
            f"The budget is {_described(budget)}.", budget, work, None,
        )  # fmt: skip
    return Refusal(
        (*work.roles, *work.makes)[0], "The workers that the recipe fixes find no place.",
        f"The budget is {_described(budget)}.",
        budget, work, None,
    )  # fmt: skip


def _lacks(work: Work, budget: Budget, shortage: Shortage) -> Refusal:
    has = f"There are {gib(shortage.has)} on {_one(budget)}, {gib(work.device.usable)} less head-room"
    if shortage.role == "generator" and shortage.has < 0.9 * work.device.usable:
        has = f"There are {gib(shortage.has)} left of {gib(work.device.usable)} on {_one(budget)}"
    return Refusal(shortage.role, _sentence(work, shortage), f"{has}.", budget, work, shortage)


def _sentence(work: Work, shortage: Shortage) -> str:
    why = f" ({shortage.why})" if shortage.why else ""
    return f"The {shortage.role} needs {gib(shortage.needs)}{why}: {gib(shortage.missing)} are missing."


def _one(budget: Budget) -> str:
    return "this machine" if budget.device.is_cpu else f"a GPU ({budget.device.name})"


def _described(budget: Budget) -> str:
    gpus = f"{budget.num_gpus} GPU{'s' if budget.num_gpus != 1 else ''}"
    device = budget.device
    return f"{gpus} of {gib(device.usable)} ({device.name}), {budget.gpus_per_node} on a node"
