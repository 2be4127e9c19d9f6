"""The roles of a run as groups of Ray actors, built when first asked for."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from functools import partial
from types import TracebackType
from typing import Any, Self

from ray.util.placement_group import PlacementGroup, remove_placement_group

from cluster.group import Group
from cluster.handles import CriticHandle, GeneratorHandle, Handle, PolicyHandle, ReferenceHandle, RewardHandle
from cluster.nodes import nodes_there
from cluster.placement import GroupPlan, Resources, Role, place
from cluster.reserve import reserve
from cluster.roles import FACTORIES
from cluster.turns import Turns
from configs.schema import Recipe
from rlhf.ports import Console
from rlhf.together import together
from rlhf.wording import duration

HANDLES: Mapping[Role, type[Handle]] = {
    "policy": PolicyHandle,
    "reference": ReferenceHandle,
    "reward": RewardHandle,
    "critic": CriticHandle,
    "generator": GeneratorHandle,
}


class RayTeam:
    """`ports.Team` on Ray: a context manager that ends every worker it started.

    Groups and roles are started when first asked for and kept until they are released. Entered inside a `RaySession`.

    Args:
        recipe: what to build.
        console: told what starts and how long it took.
        resources: what Ray counts, for the placement.
        roles: to place; None: those that the recipe's stages need.
        factories: "module:function" of each role, called in the worker with its site and the recipe.

    Raises PlacementError when the recipe's groups do not fit into the resources.
    """

    def __init__(
        self,
        recipe: Recipe,
        console: Console,
        resources: Resources,
        *,
        roles: Collection[Role] | None = None,
        factories: Mapping[Role, str] = FACTORIES,
    ) -> None:
        self.placement = place(recipe, resources, roles)
        self._recipe, self._console, self._factories = recipe, console, factories
        self._home: PlacementGroup | None = None
        self._groups: dict[str, Group] = {}
        self._handles: dict[Role, Handle] = {}
        self._reserving = threading.Lock()
        self._starting = {group.name: threading.Lock() for group in self.placement.groups}
        self._turns = Turns(self._switch) if self.placement.shares_gpus else None

    @property
    def policy(self) -> PolicyHandle:
        return self._get("policy")

    @property
    def reference(self) -> ReferenceHandle:
        return self._get("reference")

    @property
    def reward(self) -> RewardHandle:
        return self._get("reward")

    @property
    def critic(self) -> CriticHandle:
        return self._get("critic")

    @property
    def generator(self) -> GeneratorHandle:
        return self._get("generator")

    def prepare(self, *roles: Role) -> None:
        """Starts these roles; those of different groups at the same time."""
        by_group: dict[str, list[Role]] = {}
        for role in roles:
            by_group.setdefault(self.placement.group_of(role).name, []).append(role)
        together(*(partial(self._get_all, group) for group in by_group.values()))

    def release(self, *roles: Role) -> None:
        """Forgets these roles and what they learnt; a group that plays none any more ends and frees its memory."""
        for role in roles:
            plan = self.placement.group_of(role)
            with self._starting[plan.name]:
                if self._handles.pop(role, None) is None:
                    continue
                if any(other in self._handles for other in plan.roles):
                    self._groups[plan.name].drop(role)
                else:
                    self._groups.pop(plan.name).kill()

    def stats(self) -> dict[str, float]:
        """`memory/GROUP-RANK_…` of all workers that are there, in GiB."""
        return {
            f"memory/{worker}_{name}": value
            for group in list(self._groups.values())
            for worker, stats in group.stats().items()
            for name, value in stats.items()
        }

    def worker_names(self) -> dict[int, str]:
        """`GROUP-RANK` by process id, of the workers that are there."""
        return {
            seat.pid: f"{name}-{rank}"
            for name, group in list(self._groups.items())
            for rank, seat in enumerate(group.seats)
        }

    def rest(self) -> None:
        """Ends all workers and gives their resources back; roles are started anew when asked for again."""
        together(*(group.kill for group in self._groups.values()))
        self._groups.clear()
        self._handles.clear()
        if self._home is not None:
            remove_placement_group(self._home)
            self._home = None

    def close(self) -> None:
        """Ends all workers and gives their resources back."""
        self.rest()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _get_all(self, roles: Collection[Role]) -> None:
        for role in roles:
            self._get(role)

    def _get(self, role: Role) -> Any:
        plan = self.placement.group_of(role)
        with self._starting[plan.name]:
            if role not in self._handles:
                self._handles[role] = self._start(role, plan)
            return self._handles[role]

    def _start(self, role: Role, plan: GroupPlan) -> Handle:
        began = time.monotonic()
        generates = role == "generator"
        turn = nullcontext if self._turns is None else partial(self._turns.take, generates)
        workers = f"{plan.num_workers} worker{'s' if plan.num_workers > 1 else ''}"
        with self._console.task(f"start the {role}") as task, turn():
            if plan.name not in self._groups:
                task.advance(0, f"{workers} in the group {plan.name!r}")
                # On a cluster elsewhere it is not known who will share a node.
                beside = 0 if self._recipe.cluster.address or plan.gpus else self.placement.beside(plan)
                self._groups[plan.name] = Group(plan, self._reserve(), self._recipe.cluster, beside)
            task.advance(0, "load")
            self._groups[plan.name].ensure(role, self._factories[role], self._recipe)
        self._console.say(
            f"{role}: ready in {duration(time.monotonic() - began)}, {workers} of the group {plan.name!r}"
            f"{_where(self._groups[plan.name])}"
        )
        return HANDLES[role](role, self._groups[plan.name], turn)

    def _reserve(self) -> PlacementGroup:
        with self._reserving:
            if self._home is None:
                config = self._recipe.cluster
                self._home = reserve(self.placement, config.wait_s, self._console, config.strategy)
            return self._home

    def _switch(self, generates: bool) -> None:
        """Passes the GPUs on: the generator sleeps while the trainer works, and then takes what that does not use."""
        generator = self._handles.get("generator")
        if generates:
            for name, group in list(self._groups.items()):
                if name != "generator":
                    group.free_cache()
        if isinstance(generator, GeneratorHandle):
            (generator.wake if generates else generator.sleep)()


def _where(group: Group) -> str:
    """The nodes of its workers, where there is more than one to be on."""
    names = {node.address: node.name for node in nodes_there()}
    if len(names) < 2:
        return ""
    return f" on {', '.join(sorted({names.get(seat.host, seat.host) for seat in group.seats}))}"
