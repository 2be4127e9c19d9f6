"""Calls that do not depend on each other, at the same time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


def together(*calls: Callable[[], Any]) -> tuple[Any, ...]:
    """The results of the calls, in their order; each runs in a thread of its own.

    All of them have ended before this returns or raises. The error raised is the one that happened first; others are
    added to it as notes. An interrupt (Ctrl-C) is raised at once and leaves the calls to end by themselves.
    """
    results: list[Any] = [None] * len(calls)
    errors: list[BaseException] = []  # in the order in which they happened

    def run(index: int) -> None:
        try:
            results[index] = calls[index]()
        except BaseException as error:
            errors.append(error)

    # Daemons: a process that was interrupted must not wait for them.
    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        first, *others = errors
        for other in others:
            first.add_note(f"At the same time: {type(other).__name__}: {other}")
        raise first
    return tuple(results)
