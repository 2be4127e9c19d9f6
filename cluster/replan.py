"""Another size for a run that has begun: its groups wider or narrower, what is learnt from unchanged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, cast

from cluster.placement import TRAINER, Placement, Resources, all_fit, needed_roles, place, place_crew
from configs.schema import MODEL_STAGES, GroupName, Recipe
from rlhf.errors import PlacementError


@dataclass(frozen=True, slots=True)
class Size:
    """What somebody asks for; one of the three is given."""

    gpus: int | None = None
    workers: int | None = None  # of every group
    by_group: Mapping[str, int] | None = None  # of the groups that are named


class Planner(Protocol):
    """Finds a recipe's place again when what is there has changed. Both keep the global batch."""

    def narrowed(self, recipe: Recipe, left: Resources) -> Recipe:
        """The recipe as it can be had with what is left: itself, or narrower. Raises PlacementError if nothing fits."""
        ...

    def scaled(self, recipe: Recipe, size: Size, there: Resources | None) -> Recipe:
        """The recipe in the size that is asked for. Raises PlacementError where the cluster cannot give it.

        `there` is None where the cluster is not known yet: then only what no cluster could give is refused.
        """
        ...


class OwnPlacement:
    """The recipe's own kind of placement, with as many workers in each group, in proportion, as fit."""

    def __init__(self, *, makes_model: bool = False) -> None:
        """`makes_model`: it is the workers of `pretrain` and `sft` that are to fit, not those of the roles."""
        self._makes_model = makes_model

    def narrowed(self, recipe: Recipe, left: Resources) -> Recipe:
        asked = recipe.cluster.gpus
        assert asked != "auto", "settled when the team was built"
        if asked and left.gpus < 1:
            raise PlacementError(f"It used GPUs ({asked}), and none is left.")
        kept = _with(recipe, gpus=min(asked, int(left.gpus)))
        return self._widest(kept, left, max(recipe.cluster.workers.values(), default=1))

    def scaled(self, recipe: Recipe, size: Size, there: Resources | None) -> Recipe:
        if size.gpus is not None:
            fixed = _with(recipe, gpus=size.gpus)
            room = there or Resources(float("inf"), float(size.gpus))
            if room.gpus < size.gpus:
                place(fixed, room)  # says how many are missing
            return self._widest(fixed, room, size.gpus)
        named = _every_group(recipe, size.workers) if size.workers else size.by_group
        workers = {**recipe.cluster.workers, **cast(Mapping[GroupName, int], named or {})}
        wider = _with(recipe, workers=workers)
        self.check(wider, there or Resources(float("inf"), _most_gpus(wider)))
        return wider

    def _widest(self, recipe: Recipe, room: Resources, at_most: int) -> Recipe:
        """The first that fits of the recipe with `at_most` workers in its widest group, one fewer, ... one."""
        refusal: PlacementError | None = None
        for candidate in _widths(recipe, at_most):
            try:
                self.check(candidate, room)
            except PlacementError as error:
                refusal = error
            else:
                return candidate
        assert refusal is not None, "there is always one candidate"
        raise refusal

    def check(self, recipe: Recipe, room: Resources) -> None:
        """Nothing, if the recipe as it is finds a place. Raises PlacementError."""
        placement = Placement((place_crew(recipe, room),)) if self._makes_model else place(recipe, room)
        bundles = placement.bundles
        if room.nodes and not recipe.cluster.autoscale and not all_fit(bundles, room.nodes):
            has = "; ".join(f"{n.name} {n.has.get('CPU', 0):g} CPU, {n.has.get('GPU', 0):g} GPU" for n in room.nodes)
            raise PlacementError(
                f"{len(bundles)} bundles of workers do not go whole onto the nodes.",
                limit=f"There are {has}.",
                remedy="Ask for fewer workers.",
            )


def settled(recipe: Recipe, there: Resources) -> Recipe:
    """The recipe with the number of GPUs that `auto` stands for."""
    return _with(recipe, gpus=int(there.gpus)) if recipe.cluster.gpus == "auto" else recipe


def _widths(recipe: Recipe, at_most: int) -> Iterator[Recipe]:
    """The recipe with its groups' numbers of workers in proportion, the widest group from `at_most` down to one."""
    workers = recipe.cluster.workers
    widest = max(workers.values(), default=0)
    if not widest:  # they follow from the GPUs
        yield recipe
        return
    for width in range(at_most, 0, -1):
        yield _with(recipe, workers={name: max(number * width // widest, 1) for name, number in workers.items()})


def _every_group(recipe: Recipe, number: int) -> dict[str, int]:
    roles = set(needed_roles(recipe))
    if recipe.cluster.placement == "shared" and roles - {"generator"}:
        roles = (roles & {"generator"}) | {TRAINER}
    if any(stage in MODEL_STAGES for stage in recipe.stages):
        roles |= {TRAINER}
    return dict.fromkeys(sorted(roles), number)


def _most_gpus(recipe: Recipe) -> float:
    """As many as the recipe may use of a cluster that is not known."""
    return 0.0 if recipe.cluster.gpus == "auto" else float(recipe.cluster.gpus)


def _with(recipe: Recipe, **update: object) -> Recipe:
    return recipe.model_copy(update={"cluster": recipe.cluster.model_copy(update=update)})
