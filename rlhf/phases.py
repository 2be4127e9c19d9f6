"""Where the time of a step goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rlhf.events import Events
from rlhf.ports import Task


class Phases:
    """Seconds per named phase of a step; the phase under way is shown as the task's note and told as an event."""

    def __init__(
        self, task: Task, events: Events, stage: str, step: int, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._task, self._events, self._stage, self._step, self._clock = task, events, stage, step, clock
        self._began = clock()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._task.advance(0, name)
        began = self._clock()
        with self._events.around(self._stage, self._step, name):
            yield
        self.seconds[name] = self.seconds.get(name, 0.0) + self._clock() - began

    def metrics(self) -> dict[str, float]:
        """`time/NAME` of each phase and `time/step` since the start, in seconds."""
        return {f"time/{name}": value for name, value in self.seconds.items()} | {
            "time/step": self._clock() - self._began
        }
