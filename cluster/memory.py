"""How much memory the processes of a run take."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from types import TracebackType
from typing import Self

import psutil

NOTABLE = 1.005  # so much above the highest sum so far is worth a look


def process_tree_pss(pid: int) -> dict[tuple[int, str], int]:
    """Bytes of each process of the tree below `pid`, itself included, by (pid, name).

    PSS counts a page that k processes share as 1/k in each, so that the sum is what the tree really takes. A process
    that ends meanwhile is left out.
    """
    try:
        root = psutil.Process(pid)
        processes = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return {}
    usage: dict[tuple[int, str], int] = {}
    for process in processes:
        try:
            usage[process.pid, process.name()] = process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return usage


def process_tree_rss(pid: int) -> int:
    """Bytes of the tree below `pid`, pages that processes share counted in each of them."""
    total = 0
    with suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                total += process.memory_info().rss
    return total


class PeakMemory:
    """Watches a process tree from a thread of its own, as a context manager, and keeps the largest sum of PSS.

    A Ray of our own is part of this process's tree; the workers of a cluster elsewhere are not.
    """

    def __init__(self, pid: int | None = None, every_s: float = 1.0) -> None:
        self.pid = os.getpid() if pid is None else pid
        self.every_s = every_s
        self.peak_bytes = 0
        self.at_peak: dict[tuple[int, str], int] = {}  # bytes of each process when the sum was largest
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="tenfold-memory", daemon=True)

    @property
    def peak_gib(self) -> float:
        return self.peak_bytes / 2**30

    def look(self) -> int:
        """The sum now, in bytes; also noted."""
        usage = process_tree_pss(self.pid)
        total = sum(usage.values())
        if total > self.peak_bytes:
            self.peak_bytes, self.at_peak = total, usage
        return total

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        self.look()

    def _watch(self) -> None:
        highest = 0
        while True:
            # PSS takes the kernel a tenth of a second for a large tree, RSS next to nothing: it says when to look.
            if (resident := process_tree_rss(self.pid)) > highest * NOTABLE:
                highest = resident
                self.look()
            if self._over.wait(self.every_s):
                return
