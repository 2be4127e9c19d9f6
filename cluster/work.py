"""How far a piece of long work is, in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from rlhf.wording import duration


class Owner(Protocol):
    """The console that shows the work."""

    def advance(self, work: Work, num: int, note: str) -> None: ...

    def begin(self, work: Work, done: int) -> None: ...


@dataclass
class Work:
    """One task: what it is called, how far it is, and when that was last told."""

    owner: Owner
    name: str  # with its parents' names: "ppo / update"
    total: int | None
    unit: str
    depth: int
    started: float
    since: float  # when that began whose rate is told
    changed: float  # when it last advanced or changed its note
    told: float  # when a line about it was last printed
    done: int = 0
    before: int = 0  # of what is done: was there at `since`, and so says nothing of the rate
    note: str = ""
    untold: bool = False  # it moved since the last line about it
    visible: bool = False  # a line about it was printed
    patient: bool = False  # it may take days: while nothing changes, it is told seldom

    def advance(self, num: int = 1, note: str = "") -> None:
        """Adds to what is done; a note says what is being done now, and `advance(0, note)` only says that."""
        self.owner.advance(self, num, note)

    def begin(self, done: int) -> None:
        """So much is done, and the work itself begins now: what went before says nothing of its rate."""
        self.owner.begin(self, done)

    def count(self) -> str:
        """How far it is: `3/10 prompts`."""
        of = f"{self.done}" if self.total is None else f"{self.done}/{self.total}"
        return f"{of} {self.unit}".rstrip()

    def rate(self, now: float) -> float:
        """Items per second since the work began; 0 before the first."""
        done = self.done - self.before
        return done / (now - self.since) if done and now > self.since else 0.0

    def speed(self, now: float) -> str:
        """Rate and time left, as far as they are known: `1.2 prompts/s, 12 s left`."""
        rate = self.rate(now)
        if not rate or self.total is None or self.done >= self.total:
            return self.pace(now)
        return f"{self.pace(now)}, {duration((self.total - self.done) / rate)} left"

    def pace(self, now: float) -> str:
        """The rate in its unit: `1.2 prompts/s`, or `14 s each` where that is easier to read."""
        rate = self.rate(now)
        if not rate:
            return ""
        return f"{rate:.3g} {self.unit or 'items'}/s" if rate >= 0.2 else f"{duration(1 / rate)} each"
