"""Rounds: sample, rank, reward and ppo again and again, each time from the newest policy."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from configs.schema import REPEATED, STAGES, Stage

Step = tuple[Stage, int]  # a stage, and the round that it is of; 0 for those that are not repeated


def schedule(stages: Iterable[Stage], rounds: int) -> list[Step]:
    """The stages in the order in which they run, those of rounds once in each."""
    asked: list[Stage] = [stage for stage in STAGES if stage in set(stages)]
    first = STAGES.index(REPEATED[0])
    before: list[Step] = [(stage, 0) for stage in asked if STAGES.index(stage) < first]
    repeated: list[Step] = [(stage, round) for round in range(rounds) for stage in asked if stage in REPEATED]
    after: list[Step] = [(stage, 0) for stage in asked if stage not in REPEATED and STAGES.index(stage) > first]
    return before + repeated + after


def key(stage: str, round: int) -> str:
    """The name under which the manifest has a stage of a round: `reward`, `reward-1`."""
    return f"{stage}-{round}" if round else stage


def label(stage: str, round: int) -> str:
    """The name of a stage of a round for people, who count from 1: `reward`, `reward of round 2`."""
    return f"{stage} of round {round + 1}" if round else stage


def of_key(key: str) -> Step:
    """The stage and the round of a key."""
    stage, _, round = key.partition("-")
    return cast(Stage, stage), int(round or 0)
