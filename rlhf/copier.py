"""Brings the mirror up to date beside the run, which neither waits for it nor fails with it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

from rlhf.errors import TenfoldError
from rlhf.events import Events
from rlhf.mirror import Mirror
from rlhf.saver import Saver

HURRY_S = 10.0  # that a run which was told to leave waits for a copy under way


class Copier:
    """Pushes a run folder to its mirror, one push at a time; does nothing where the recipe names no mirror."""

    def __init__(self, url: str | None, folder: Path, warn: Callable[[str], None], events: Events) -> None:
        self._mirror = None if url is None else Mirror(url, folder, warn)
        self._warn, self._events = warn, events
        self._saver = Saver(daemon=True)

    def begin(self, recorded: Collection[str]) -> None:
        """Brings back what of these checkpoints is lost here, and then the mirror up to date.

        So one that cannot be used is known before the work. Raises StoreError.
        """
        if self._mirror is not None:
            for name in self._mirror.bring_back(recorded):
                self._warn(f"{name} was lost or damaged here; it came back from the mirror.")
            self._push()

    def start(self) -> None:
        """Begins a push, unless one is under way: the next call, or `close`, brings what it leaves."""
        if self._mirror is not None and self._settle(0.0):
            self._saver.start(self._push)

    def close(self, *, in_a_hurry: bool) -> None:
        """Waits for the push under way and brings the rest; in a hurry waits a moment and brings nothing more."""
        if self._mirror is None or not self._settle(HURRY_S if in_a_hurry else None) or in_a_hurry:
            return
        self._saver.start(self._push)
        self._settle(None)

    def _push(self) -> None:
        assert self._mirror is not None
        self._events.add("mirrored", bytes=self._mirror.push())

    def _settle(self, timeout_s: float | None) -> bool:
        try:
            return self._saver.wait(timeout_s)
        except TenfoldError as error:
            self._warn(f"The mirror is not up to date; the next checkpoint tries again. {error}")
            return True
