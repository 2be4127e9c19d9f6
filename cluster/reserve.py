"""The run's placement group: asked for once, waited for with a deadline."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Literal

import ray
from ray._private import state
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from cluster.placement import Placement, workers_of
from rlhf.errors import PlacementError
from rlhf.ports import Console

TELL_S = 30.0  # while waiting, what is missing is said so often
LOOK_S = 0.1  # between two looks at who still lives


def reserve(
    placement: Placement, wait_s: float, console: Console, strategy: Literal["pack", "spread"] = "pack"
) -> PlacementGroup:
    """The placement group of all bundles, once the cluster has given them.

    An autoscaler is asked by the placement group itself, which it sees as soon as it waits: unlike a request beside it,
    that asks for nodes whole enough for each bundle, and ends with the group.

    Raises PlacementError after `wait_s`, saying which groups wait for which resources.
    """
    home = placement_group(placement.bundles, strategy=strategy.upper())
    deadline = time.monotonic() + wait_s
    while not home.wait(min(TELL_S, max(deadline - time.monotonic(), 0.0))):
        short = missing(placement)
        if time.monotonic() >= deadline:
            remove_placement_group(home)
            raise PlacementError(
                f"{workers_of(placement)} wait for {short}",
                limit=f"The limit is cluster.wait_s={wait_s:g}.",
                remedy="Add nodes, end what else runs there, or lower cluster.workers or cluster.cpus_per_worker.",
            )
        console.say(f"still waiting for {short}")
    return home


def missing(placement: Placement) -> str:
    """What the bundles take against what the cluster has, in a sentence."""
    total, free = ray.cluster_resources(), ray.available_resources()
    parts: list[str] = []
    bundles = placement.bundles
    extra = sorted({kind for bundle in bundles for kind in bundle} - {"CPU", "GPU"})
    for kind in ("CPU", "GPU", *extra):
        needs = [bundle.get(kind, 0.0) for bundle in bundles]
        if not sum(needs):
            continue
        have = f"the cluster has {total.get(kind, 0.0):g}, of which {free.get(kind, 0.0):g} are free"
        parts.append(f"{sum(needs):g} {kind} (at most {max(needs):g} on one node; {have})")
    return " and ".join(parts) + "."


def reservations() -> set[str]:
    """The placement groups that this process's job has in Ray, by id."""
    own = ray.get_runtime_context().get_job_id()  # which the id ends with
    return {id for id, about in placement_group_table().items() if id.endswith(own) and about["state"] != "REMOVED"}


def living_actors() -> set[str]:
    """The actors of this process's job that are not dead, by id; those that outlive it on purpose left out."""
    own = ray.get_runtime_context().get_job_id()
    return {
        id
        for id, about in state.actors().items()
        if about["JobID"] == own and about["State"] != "DEAD" and not about["IsDetached"]
    }


def give_back_all_but(actors: Collection[str], groups: Collection[str], wait_s: float = 20.0) -> None:
    """Nothing; of this job no placement group is left but these, once no actor lives but these.

    Ray keeps a placement group for its whole job, whatever became of its creator; and a creator that still lives when
    its group is removed may ask for another.
    """
    deadline = time.monotonic() + wait_s
    while living_actors() - set(actors) and time.monotonic() < deadline:
        time.sleep(LOOK_S)
    for id in reservations() - set(groups):
        remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(id))))
