"""Another size for a run whose settings `tenfold plan` chose: it is planned anew for what there is now."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.placement import Resources
from cluster.planning import PLAN
from cluster.replan import OwnPlacement, Planner, Size
from configs.schema import Recipe
from rlhf.errors import ModelError, PlacementError

if TYPE_CHECKING:
    from cluster.plan.budget import Budget

# What a run keeps if it can: another ZeRO stage or placement is restored too, but reads and moves more.
KEPT = frozenset({"cluster.placement", "learner.zero_stage", "generator.tensor_parallel"})
MANY = 4096  # GPUs of a cluster that is not known: enough for any workers
OF_SIZE = frozenset({"cluster.gpus", "cluster.workers"})


def planner_of(folder: Path, *, makes_model: bool = False) -> Planner:
    """The planner of the run in `folder`: by its plan, where it was planned for GPUs; else the recipe's own placement.

    `makes_model`: it is the workers of `pretrain` and `sft` that are to fit, not those of the roles.
    """
    from cluster.plan.budget import Budget
    from cluster.plan.devices import find_device

    own = OwnPlacement(makes_model=makes_model)
    try:
        kept = json.loads((folder / PLAN).read_bytes())
        about = kept["budget"]
        if not about["gpus"]:
            return own
        device = find_device(about["device"], about["label_gb"])
        return ByPlan(Budget(about["gpus"], about["gpus_per_node"], device), kept["chosen"], own)
    except (OSError, ValueError, KeyError, TypeError, PlacementError):
        return own  # it was not planned


class ByPlan:
    """Plans again for another number of the same GPUs; what people fixed in the recipe stays, and the global batch."""

    def __init__(self, budget: Budget, chosen: Collection[str], own: OwnPlacement) -> None:
        """`budget`: that the run began with. `chosen`: the keys that its plan set."""
        self._budget, self._chosen, self._own = budget, frozenset(chosen), own

    def narrowed(self, recipe: Recipe, left: Resources) -> Recipe:
        """The recipe itself where it still has a place, else the plan for the GPUs that are left."""
        asked = recipe.cluster.gpus
        assert asked != "auto", "settled when the team was built"
        if not asked:
            return self._own.narrowed(recipe, left)
        try:
            self._own.check(recipe, left)
        except PlacementError:
            if left.gpus < 1:
                raise
            return self._planned(recipe, min(asked, int(left.gpus)), left, OF_SIZE) or self._own.narrowed(recipe, left)
        return recipe

    def scaled(self, recipe: Recipe, size: Size, there: Resources | None) -> Recipe:
        """The plan for so many GPUs, or for the workers that are asked for."""
        if size.gpus is None:
            most = self._most(recipe, there)
            asked = self._own.scaled(_with(recipe, gpus=most), size, there)
            found = self._planned(asked, most, there, frozenset({"cluster.gpus"}))
        elif there is not None and there.gpus < size.gpus and not recipe.cluster.autoscale:
            found = None  # the own placement says how many are missing
        else:
            found = self._planned(recipe, size.gpus, there, OF_SIZE)
        return found or self._own.scaled(recipe, size, there)

    def _planned(self, recipe: Recipe, num_gpus: int, room: Resources | None, of_size: frozenset[str]) -> Recipe | None:
        """What `plan` makes of the recipe, with as few of the run's settings changed as can be.

        None: the model has no layout that can be counted.
        """
        from cluster.plan.remedies import explained
        from cluster.plan.search import Plan, plan
        from cluster.plan.shape import shape_of
        from cluster.plan.work import opened

        try:
            shape = shape_of(recipe)
        except ModelError:
            return None
        free = self._chosen - {"cluster.gpus", "cluster.workers"}
        found = None
        for keys in (free - KEPT | of_size, free | of_size):
            found = plan(opened(recipe, keys), shape, self._sized(num_gpus, room))
            if isinstance(found, Plan):
                if room is not None:
                    self._own.check(found.recipe, room)
                return found.recipe
        assert found is not None and not isinstance(found, Plan)
        raise explained(found)

    def _sized(self, num_gpus: int, room: Resources | None) -> Budget:
        per_node = [int(node.has.get("GPU", 0)) for node in (room.nodes if room else ())]
        fewest = min((number for number in per_node if number), default=self._budget.gpus_per_node)
        return replace(self._budget, num_gpus=num_gpus, gpus_per_node=fewest)

    def _most(self, recipe: Recipe, there: Resources | None) -> int:
        """GPUs that workers may take: as many as people fixed, else all."""
        if recipe.cluster.gpus != "auto" and "cluster.gpus" not in self._chosen:
            return recipe.cluster.gpus
        return MANY if there is None or recipe.cluster.autoscale else int(there.gpus)


def _with(recipe: Recipe, *, gpus: int) -> Recipe:
    return recipe.model_copy(update={"cluster": recipe.cluster.model_copy(update={"gpus": gpus})})
