"""The process that wandb starts beside ours: what it inherits, and what is left of it when it is killed."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.leftovers import TRACKER_PREFIX, disown, own, session_parent

GOGC = "25"  # percent that its heap may grow between two collections: it is small, and stays so


@contextmanager
def service_environment() -> Iterator[None]:
    """What W&B's service inherits: a folder of its own for its sockets, which are found after a kill, and a small heap.

    The service lives as long as this process, and so does the folder.
    """
    changes = {"TMPDIR": str(_scratch()), "GOGC": os.environ.get("GOGC", GOGC)}
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@functools.cache
def _scratch() -> Path:
    folder = Path(tempfile.mkdtemp(prefix=TRACKER_PREFIX, dir=session_parent()))
    mark = own(folder)
    # Before wandb is imported: what is registered first runs last, after wandb has ended its service.
    atexit.register(_forget, folder, mark, os.getpid())
    return folder


def _forget(folder: Path, mark: int | None, owner: int) -> None:
    if os.getpid() == owner:  # not in a fork
        shutil.rmtree(folder, ignore_errors=True)
        disown(folder, mark, keep=False)
