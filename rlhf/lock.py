"""The lock that keeps a run to one process."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from rlhf.disk import disk_errors
from rlhf.errors import StoreError

LOCK = "lock"
TRIES, PAUSE_S = 5, 0.05  # one who only looks holds it for an instant


def take_lock(folder: Path) -> int:
    """A file descriptor that holds the run's lock until it is closed, or the process is gone, however it dies."""
    path = folder / LOCK
    with disk_errors(path, "written"):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        _flock(handle)
        os.truncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
    except BlockingIOError:
        holder = os.pread(handle, 32, 0).decode().strip() or "unknown"
        os.close(handle)
        raise StoreError(
            f"The run {folder} is in use by another process (pid {holder}).",
            limit="A run belongs to one process at a time.",
            remedy="Wait for it, end it, or give this run another name.",
        ) from None
    except OSError as error:
        os.close(handle)
        raise StoreError(
            f"The run {folder} cannot be locked: {error}.", remedy="Set `runs` to a folder on a local disk."
        ) from error
    return handle


def is_locked(folder: Path) -> bool:
    """Whether a process holds the run now."""
    try:
        handle = os.open(folder / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False


def _flock(handle: int) -> None:
    for attempt in range(TRIES):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if attempt == TRIES - 1:
                raise
            time.sleep(PAUSE_S)
