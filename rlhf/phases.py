"""Where the time of a step goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rlhf.ports import Task


class Phases:
    """Seconds per named phase; the phase under way is shown as the task's note."""

    def __init__(self, task: Task, clock: Callable[[], float] = time.perf_counter) -> None:
        self._task, self._clock = task, clock
        self._began = clock()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._task.advance(0, name)
        began = self._clock()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + self._clock() - began

    def metrics(self) -> dict[str, float]:
        """`time/NAME` of each phase and `time/step` since the start, in seconds."""
        return {f"time/{name}": value for name, value in self.seconds.items()} | {
            "time/step": self._clock() - self._began
        }
