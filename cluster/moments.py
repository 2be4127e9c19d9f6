"""When to kill: moments chosen by a seed from the phases of an undisturbed run."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.errors import TenfoldError

NEAR, FAR = 0.1, 0.9  # of a phase's time, between which "inside" lies
Event = Mapping[str, Any]
Key = tuple[str, int, str]  # stage, step, phase


@dataclass(frozen=True, slots=True)
class Span:
    """A phase of the undisturbed run."""

    stage: str
    step: int
    phase: str
    began_s: float  # after the run's start
    seconds: float


@dataclass(frozen=True, slots=True)
class Moment:
    """When to kill: inside a phase, or between it and what comes next, in this step or the first one after."""

    stage: str
    step: int
    phase: str
    where: str  # "inside" or "between"
    wait_s: float  # after the phase's begin; 0 after its end
    at_s: float  # when it was in the undisturbed run, after its start


def spans(events: Sequence[Event]) -> list[Span]:
    """The phases that ended, in the order of their begin, a phase before those inside it."""
    begun: dict[Key, float] = {}
    found: list[Span] = []
    start = events[0]["time"] if events else 0.0
    for event in (event for event in events if "phase" in event):
        key = key_of(event)
        if event["what"] == "begin":
            begun[key] = event["time"]
        elif key in begun:
            found.append(Span(*key, began_s=begun[key] - start, seconds=event["time"] - begun.pop(key)))
    return sorted(found, key=lambda span: (span.began_s, -span.seconds))


def choose(spans: Sequence[Span], kills: int, seed: int) -> list[Moment]:
    """So many moments in the order of the run: each kind of phase has its turn before one comes twice.

    A kind that comes again is struck the other way, inside or between.
    """
    rng = random.Random(seed)
    kinds: dict[tuple[str, str], list[Span]] = {}
    for span in spans:
        kinds.setdefault((span.stage, span.phase), []).append(span)
    if not kinds:
        raise TenfoldError("The undisturbed run has no events to aim at.", remedy="Take a recipe that has stages.")
    first = {kind: rng.random() < 0.5 for kind in kinds}
    moments: list[Moment] = []
    turn = 0
    while len(moments) < kills:
        for kind in rng.sample(list(kinds), len(kinds))[: kills - len(moments)]:
            span = rng.choice(kinds[kind])
            moments.append(_moment(span, rng.uniform(NEAR, FAR), inside=first[kind] == (turn % 2 == 0)))
        turn += 1
    return sorted(moments, key=lambda moment: moment.at_s)


def _moment(span: Span, fraction: float, inside: bool) -> Moment:
    where = "inside" if inside else "between"
    wait_s = fraction * span.seconds if inside else 0.0
    at_s = span.began_s + (wait_s if inside else span.seconds)
    return Moment(span.stage, span.step, span.phase, where, wait_s, at_s)


def strikes(moment: Moment, event: Event) -> bool:
    """Whether the event is the one that the moment hangs on: of its step, or of a later one where that is past."""
    what = "begin" if moment.where == "inside" else "end"
    same = event["what"] == what and event.get("stage") == moment.stage and event.get("phase") == moment.phase
    return same and event["step"] >= moment.step


def key_of(event: Event) -> Key:
    """(stage, step, phase) of an event."""
    return event.get("stage", ""), event.get("step", 0), event.get("phase", "")


def named(moment: Moment) -> str:
    """The moment in words."""
    return f"{moment.where} {moment.stage} {moment.phase} of step {moment.step}"
