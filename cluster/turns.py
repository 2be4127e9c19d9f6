"""Whose turn it is, where trainer and generator share their GPUs: only one of them fits at work at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Turns:
    """Two sides that take turns; calls of the same side may overlap.

    `switch(generates)` is called when the turn passes to the other side, before its first call.
    """

    def __init__(self, switch: Callable[[bool], None]) -> None:
        self._switch = switch
        self._generates: bool | None = None  # None: nobody has been at work yet
        self._num = 0  # calls under way, all of one side
        self._free = threading.Condition()

    @contextmanager
    def take(self, generates: bool) -> Iterator[None]:
        """The turn of the generator or the trainer, for as long as the block lasts."""
        with self._free:
            self._free.wait_for(lambda: self._num == 0 or self._generates == generates)
            if self._generates not in (None, generates):
                self._switch(generates)
            self._generates = generates
            self._num += 1
        try:
            yield
        finally:
            with self._free:
                self._num -= 1
                self._free.notify_all()
