"""events.jsonl: what a run did and when, for whoever follows it or wants to know how it came about."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

EVENTS = "events.jsonl"


class Events:
    """Appends one line per event; safe from the death of the process. A full disk does not stop the run for it."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / EVENTS

    def add(self, what: str, **about: object) -> None:
        """One event, with the time in seconds since 1970."""
        line = json.dumps({"time": round(time.time(), 3), "what": what, **about})
        try:
            with self._path.open("a") as file:
                file.write(line + "\n")
        except OSError:
            return

    @contextmanager
    def around(self, stage: str, step: int, phase: str) -> Iterator[None]:
        """`begin` before the block, `end` after it unless it raises."""
        self.add("begin", stage=stage, step=step, phase=phase)
        yield
        self.add("end", stage=stage, step=step, phase=phase)


def last_event(folder: Path) -> Mapping[str, Any] | None:
    """The newest event with a stage, or None; read without the run's lock."""
    try:
        with (folder / EVENTS).open("rb") as file:
            file.seek(0, 2)
            file.seek(max(file.tell() - 4096, 0))
            lines = file.read().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            event: Any = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "stage" in event:
            return event
    return None
