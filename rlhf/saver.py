"""Slow work beside the main thread's: one piece at a time, whose error comes up at the next look."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Saver:
    """Runs one piece of work in a thread; `then` follows in the thread that waits for it."""

    def __init__(self, *, daemon: bool = False, name: str = "tenfold-saver") -> None:
        """`daemon`: the interpreter may leave in the middle of the work; else it waits for its end."""
        self._daemon, self._name = daemon, name
        self._thread: threading.Thread | None = None
        self._then: Callable[[], None] = _nothing
        self._error: BaseException | None = None
        self.seconds = 0.0  # that the newest piece of work took

    @property
    def idle(self) -> bool:
        """Whether there is no piece of work that somebody must wait for."""
        return self._thread is None

    @property
    def busy(self) -> bool:
        """Whether a piece of work is under way."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def ready(self) -> bool:
        """Whether a piece of work has ended and nobody has waited for it yet."""
        return self._thread is not None and not self._thread.is_alive()

    def start(self, work: Callable[[], None], then: Callable[[], None] = lambda: None) -> None:
        """Begins the work. The one before must have been waited for."""
        assert self._thread is None, "the work before was not waited for"

        def run() -> None:
            began = time.perf_counter()
            try:
                work()
            except BaseException as error:
                self._error = error
            self.seconds = time.perf_counter() - began

        self._then = then
        self._thread = threading.Thread(target=run, name=self._name, daemon=self._daemon)
        self._thread.start()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Whether nothing is under way any more. Raises what the work raised; else `then` has run."""
        thread = self._thread
        if thread is None:
            return True
        thread.join(timeout_s)
        if thread.is_alive():
            return False
        then, error = self._then, self._error
        self._thread, self._then, self._error = None, _nothing, None
        if error is not None:
            raise error
        then()
        return True


def _nothing() -> None: ...
