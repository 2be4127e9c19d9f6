"""Trainer and generator on one GPU: one at a time."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

from cluster.group import Group
from cluster.handles import GeneratorHandle
from cluster.placement import Resources
from cluster.team import RayTeam
from cluster.turns import Turns
from tests.fakes import SilentConsole
from tests.recipes import tiny_recipe


def test_the_switch_is_thrown_only_when_the_turn_passes() -> None:
    switched: list[bool] = []
    turns = Turns(switched.append)
    for generates in (True, True, False, False, True):
        with turns.take(generates):
            pass
    assert switched == [False, True]


def test_calls_of_one_side_overlap() -> None:
    turns = Turns(lambda generates: None)
    with turns.take(True), turns.take(True):
        pass


def test_the_other_side_waits_until_all_calls_have_ended() -> None:
    order: list[str] = []
    turns = Turns(lambda generates: order.append("switch"))
    asking = threading.Event()

    def train() -> None:
        asking.set()
        with turns.take(False):
            order.append("train")

    thread = threading.Thread(target=train)
    with turns.take(True):
        thread.start()
        assert asking.wait(10)
        thread.join(0.05)  # time enough to get in, if nothing held it
        order.append("generate")
    thread.join(10)
    assert order == ["generate", "switch", "train"]


class ToldGroup:
    """Notes what its workers are asked for."""

    def __init__(self, name: str, told: list[str]) -> None:
        self._name, self._told = name, told

    def free_cache(self) -> None:
        self._told.append(f"{self._name}: free cache")

    def call_all(self, role: str, method: str) -> list[None]:
        self._told.append(f"{self._name}: {method}")
        return [None]


def test_the_trainer_gives_its_unused_memory_back_before_the_generator_wakes(tmp_path: Path) -> None:
    recipe = tiny_recipe("model", tmp_path, cluster={"placement": "shared", "gpus": 1})
    team = cast(Any, RayTeam(recipe, SilentConsole(), Resources(cpus=16, gpus=1)))
    told: list[str] = []
    team._groups = {name: ToldGroup(name, told) for name in ("trainer", "generator")}
    team._handles["generator"] = GeneratorHandle("generator", cast(Group, team._groups["generator"]), nullcontext)
    for generates in (True, False, True):
        with team._turns.take(generates):
            pass
    assert told == ["generator: sleep", "trainer: free cache", "generator: wake"]
