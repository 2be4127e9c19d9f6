"""Waiting for capacity on real Ray: what is said, what an autoscaler sees, and the end of it."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import ray
from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue] - compiled
from ray.autoscaler.v2.sdk import get_cluster_resource_state
from ray.util.placement_group import placement_group, placement_group_table

from cluster import reserve as reserve_module
from cluster.placement import GroupPlan, Placement
from cluster.ray_session import RaySession
from cluster.reserve import give_back_all_but, living_actors, reservations, reserve
from rlhf.errors import PlacementError
from tests.fakes import SilentConsole

pytestmark = [pytest.mark.ray, pytest.mark.timeout(120)]

HUGE = Placement((GroupPlan("policy", ("policy",), (0, 1), cpus=100, gpus=1, extra={"L40S": 1}),))


class Listener(SilentConsole):
    """Sets an event when something is said."""

    def __init__(self) -> None:
        super().__init__()
        self.heard = threading.Event()

    def say(self, text: str) -> None:
        super().say(text)
        self.heard.set()


def asked_of_an_autoscaler() -> list[list[dict[str, float]]]:
    """The bundles of each placement group that waits, as an autoscaler is told them."""
    client = GcsClient(address=ray.get_runtime_context().gcs_address)
    waiting: Any = get_cluster_resource_state(client).pending_gang_resource_requests
    bundles = [[each for selector in gang.bundle_selectors for each in selector.resource_requests] for gang in waiting]
    return [[dict(each.resources_bundle) for each in gang] for gang in bundles]


def test_what_is_waited_for_is_said_and_asked_of_an_autoscaler_until_the_wait_ends(
    session: RaySession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reserve_module, "TELL_S", 0.5)
    console, errors = Listener(), list[PlacementError]()

    def waits() -> None:
        try:
            reserve(HUGE, 4, console)
        except PlacementError as error:
            errors.append(error)

    thread = threading.Thread(target=waits)
    thread.start()
    assert console.heard.wait(30)
    assert [{"CPU": 100.0, "GPU": 1.0, "L40S": 1.0}] * 2 in asked_of_an_autoscaler()
    thread.join()
    assert asked_of_an_autoscaler() == []  # nothing is asked for when nobody waits
    assert console.said[0].startswith("still waiting for 200 CPU (at most 100 on one node; the cluster has 16")
    (error,) = errors
    assert "2 L40S (at most 1 on one node; the cluster has 0, of which 0 are free)" in str(error)
    assert "cluster.wait_s=4" in str(error)


@ray.remote(num_cpus=0)
class Reserves:
    """An actor that reserves, and reserves again when that is taken from it, as the one of Ray Train does."""

    def reserve(self) -> None:
        while True:
            home = placement_group([{"CPU": 0.25}])
            ray.get(home.ready())
            while placement_group_table(home)["state"] != "REMOVED":
                time.sleep(0.02)


@ray.remote(num_cpus=0)
class Owner:
    """Has such an actor, which dies with it, a moment later."""

    def begin(self) -> None:
        self.actor = Reserves.remote()
        self.actor.reserve.remote()


def test_what_an_actor_reserved_before_it_was_killed_is_given_back(session: RaySession) -> None:
    actors, groups = living_actors(), reservations()
    owner: Any = Owner.remote()
    ray.get(owner.begin.remote())
    while not reservations() - groups:
        time.sleep(0.05)
    ray.kill(owner)
    give_back_all_but(actors, groups)
    assert living_actors() == actors and reservations() == groups
