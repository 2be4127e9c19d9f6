"""What would have to change for a refused recipe to fit: the nearest changes that do, in words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from cluster.plan.budget import Budget
from cluster.plan.devices import GPUS
from cluster.plan.search import Refusal, fits
from cluster.plan.work import KEYS, fixed, opened
from configs.schema import Recipe
from rlhf.errors import PlacementError

MOST_GPUS = 1024  # that a remedy names
AT_MOST = 3  # remedies of different kinds
SMALLEST_RANK, SHORTEST_ANSWER, SMALLEST_PASS = 4, 64, 512


def explained(refusal: Refusal) -> PlacementError:
    """The refusal as an error: the role, what it needs, what there is, and the nearest changes that fit."""
    changes = remedies(refusal)
    if changes:
        return refusal.error(f"It fits with {', or '.join(changes)}.")
    return refusal.error(
        "No change of the recipe and no number of these GPUs was found that fits: take a smaller model."
    )


def remedies(refusal: Refusal) -> list[str]:
    """At most one of each kind: more GPUs, the nearest change of the recipe, another GPU."""
    found = [_more_gpus(refusal), _recipe_change(refusal), _other_device(refusal)]
    return [change for change in found if change][:AT_MOST]


def _fits(refusal: Refusal, recipe: Recipe, budget: Budget) -> bool:
    return fits(recipe, refusal.work.shape, budget)


def _more_gpus(refusal: Refusal) -> str | None:
    """The smallest number of GPUs that fits; what fits in n fits in n + 1, so halving finds it."""
    budget, recipe = refusal.budget, opened(refusal.work.recipe, ["cluster.gpus"])
    if budget.device.is_cpu:
        return None
    low, high = budget.num_gpus, max(2 * budget.num_gpus, 1)
    while not _fits(refusal, recipe, budget.of(high)):
        if high >= MOST_GPUS:
            return None
        low, high = high, min(2 * high, MOST_GPUS)
    while high - low > 1:
        middle = (low + high) // 2
        if _fits(refusal, recipe, budget.of(middle)):
            high = middle
        else:
            low = middle
    return f"{high} GPU{'s' if high > 1 else ''}"


def _recipe_change(refusal: Refusal) -> str | None:
    for words, recipe in _changes(refusal.work.recipe, refusal.work.roles):
        if _fits(refusal, recipe, refusal.budget):
            return words
    return None


def _other_device(refusal: Refusal) -> str | None:
    """The smallest device that has more memory and fits."""
    budget = refusal.budget
    larger = sorted(
        (device for device in GPUS.values() if device.usable > budget.device.usable), key=lambda device: device.usable
    )
    if budget.device.is_cpu or not budget.num_gpus:
        return None
    for device in larger:
        if _fits(refusal, refusal.work.recipe, replace(budget, device=device)):
            return f"GPUs of {device.label_gb:g} GB ({device.name})"
    return None


def _changes(recipe: Recipe, roles: tuple[str, ...]) -> Iterator[tuple[str, Recipe]]:
    """Yields changes of the recipe, those that cost least first."""
    keys = fixed(recipe)
    learner = recipe.learner
    if "learner.gradient_checkpointing" in keys and not learner.gradient_checkpointing:
        yield "gradient checkpointing", _with(recipe, "learner", gradient_checkpointing=True)
    tokens = learner.micro_batch_tokens // 2 if "learner.micro_batch_tokens" in keys else 0
    while tokens >= SMALLEST_PASS:
        yield f"learner.micro_batch_tokens {tokens}", _with(recipe, "learner", micro_batch_tokens=tokens)
        tokens //= 2
    for key in KEYS:
        if key in keys and key != "cluster.gpus":
            yield f"{key} left to the plan", opened(recipe, [key])
    if keys - {"cluster.gpus"}:
        yield "placement and memory left to the plan", opened(recipe, [key for key in KEYS if key in keys])
    frugal = _with(recipe, "learner", gradient_checkpointing=True)
    spares = "learner.gradient_checkpointing" in keys and not learner.gradient_checkpointing
    rank = recipe.lora.rank // 2
    while rank >= SMALLEST_RANK:
        yield f"lora.rank {rank}", _with(recipe, "lora", rank=rank)
        if spares:
            yield f"lora.rank {rank} with gradient checkpointing", _with(frugal, "lora", rank=rank)
        rank //= 2
    if "critic" in roles:
        loss = _with(recipe, "ppo", advantage="group", kl=recipe.ppo.kl.model_copy(update={"where": "loss"}))
        yield "ppo.advantage group and ppo.kl.where loss, which need no critic", loss
    answer = recipe.sampling.max_answer_tokens // 2
    while answer >= SHORTEST_ANSWER:
        yield f"sampling.max_answer_tokens {answer}", _with(recipe, "sampling", max_answer_tokens=answer)
        answer //= 2
    if "reference" in roles and "ppo" in recipe.stages:
        ppo = recipe.ppo.model_copy(
            update={
                "kl": recipe.ppo.kl.model_copy(update={"beta": 0.0, "adaptive": False}),
                "evaluate_every": None,
            }
        )
        stages = tuple(stage for stage in recipe.stages if stage != "evaluate")
        yield (
            "ppo.kl.beta 0 and no evaluation, which need no reference",
            recipe.model_copy(update={"ppo": ppo, "stages": stages}),
        )
    if recipe.model.dtype == "float32":
        yield "model.dtype bfloat16", _with(recipe, "model", dtype="bfloat16")


def _with(recipe: Recipe, section: str, **values: Any) -> Recipe:
    changed = getattr(recipe, section).model_copy(update=values)
    return recipe.model_copy(update={section: changed})
