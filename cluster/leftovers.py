"""What a run could leave on this machine, and what is done about those that were killed."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from rlhf.errors import TenfoldError

MARKER = "TENFOLD_CHAOS"  # the environment variable that a run's processes inherit from each other
SESSION_PREFIX = "tenfold-ray-"  # of the folders in which our own Rays live
TRACKER_PREFIX = "tenfold-wandb-"  # of those for the sockets of W&B's service
OWNER = "owner"  # the file in such a folder that its process holds locked
SHARED_MEMORY = Path("/dev/shm")
DAY_S = 24 * 3600.0
KILL_S, PAUSE_S = 20.0, 0.01


@dataclass(frozen=True, slots=True)
class Leftovers:
    """What was there at one moment of the kinds that a run could leave."""

    processes: frozenset[psutil.Process]  # that descend from this one
    sessions: frozenset[Path]  # folders of Rays
    shared_memory: frozenset[Path]
    sockets: frozenset[Path]  # unix sockets in the folders looked at, and in the one for temporary files


def snapshot(folders: Sequence[Path] = ()) -> Leftovers:
    """What is there now, to be told from what a run leaves. `folders` are those that the run writes to."""
    return Leftovers(
        processes=frozenset(_alive(psutil.Process().children(recursive=True))),
        sessions=frozenset(sessions()),
        shared_memory=frozenset(SHARED_MEMORY.glob("*")),
        sockets=frozenset(_sockets(folders)),
    )


def left_behind(before: Leftovers, token: str | None = None, folders: Sequence[Path] = ()) -> list[str]:
    """What came since `before` and has lost its owner, a line each; empty if nothing was left.

    Processes are those that carry the `token` (MARKER=token), their descendants, and this process's own; they are
    told with the ports they listen on. What belongs to a process outside of them that lives is not ours, and not told.
    """
    now = snapshot(folders)
    processes = now.processes - before.processes | (set(family(token)) if token else set())
    lines = [_of_process(process) for process in sorted(processes, key=lambda process: process.pid)]
    lines += [
        f"{folder}: the folder of a Ray or of W&B whose owner is gone"
        for folder in sorted(now.sessions - before.sessions)
        if not (is_owned(folder) or _those_of(folder))
    ]
    mapped = _mapped()
    lines += [
        f"{path}: shared memory that no process uses"
        for path in sorted(now.shared_memory - before.shared_memory)
        if str(path) not in mapped and _is_mine(path)
    ]
    bound = Path("/proc/net/unix").read_text().split()
    lines += [
        f"{path}: a socket that nobody listens on"
        for path in sorted(now.sockets - before.sockets)
        if str(path) not in bound and _is_mine(path)
    ]
    return lines


def family(token: str, leader: int | None = None) -> list[psutil.Process]:
    """The living processes that carry MARKER=token, belong to the leader's session, or descend from such ones.

    Three signs, since each can be lost: a process may overwrite its environment, leave the session, or lose its parent.
    """
    parents: dict[int, int] = {}
    there: dict[int, psutil.Process] = {}
    ours: set[int] = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            parents[process.pid], there[process.pid] = process.ppid(), process
            in_session = leader is not None and os.getsid(process.pid) == leader
            if in_session or process.environ().get(MARKER) == token:
                ours.add(process.pid)
    while children := {pid for pid, parent in parents.items() if parent in ours} - ours:
        ours |= children
    return _alive(there[pid] for pid in sorted(ours - {os.getpid()}))


def kill_family(token: str, leader: int | None = None) -> int:
    """How many processes were killed (SIGKILL): all of the `family`; none of them is left when this returns.

    They are stopped first, the leader before all others: what is stopped starts no other while the rest is looked for.
    """
    killed: set[psutil.Process] = set()
    if leader is not None:
        with suppress(ProcessLookupError):
            os.kill(leader, signal.SIGSTOP)
    while fresh := set(family(token, leader)) - killed:
        _send(fresh, signal.SIGSTOP)
        killed |= fresh
    _send(killed, signal.SIGKILL)
    deadline = time.monotonic() + KILL_S
    while alive := set(family(token, leader)) | set(_alive(killed)):
        if time.monotonic() > deadline:
            raise TenfoldError(
                f"After {KILL_S:g} s, {'; '.join(_of_process(process) for process in alive)}, though killed.",
                remedy="A process that waits for a disk or a driver ends only then: see what it waits for.",
            )
        _send(alive, signal.SIGKILL)
        killed |= alive
        time.sleep(PAUSE_S)
    return len(killed)


def session_parent() -> Path:
    """The folder in which our own Rays make theirs."""
    return Path(os.environ.get("RAY_TMPDIR", "/tmp"))


def sessions() -> list[Path]:
    """The folders of our own Rays and of W&B's services, living and dead."""
    found = [*session_parent().glob(f"{SESSION_PREFIX}*"), *session_parent().glob(f"{TRACKER_PREFIX}*")]
    return sorted(path for path in found if path.is_dir())


def own(folder: Path) -> int | None:
    """A file descriptor that marks the folder as in use until it is closed, or this process is gone, however it dies.

    The lock is the kernel's, so that neither a reused pid nor one of another container is mistaken for the owner.
    None where the file system has no locks.
    """
    temporary = folder / f".{OWNER}"  # renamed when it is locked: nobody must see it without its lock
    handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.write(handle, f"{os.getpid()} {psutil.Process().create_time()}\n".encode())  # for people
        temporary.rename(folder / OWNER)
    except OSError:
        os.close(handle)
        temporary.unlink(missing_ok=True)
        return None
    return handle


def disown(folder: Path, handle: int | None, *, keep: bool) -> None:
    """Ends the ownership. A folder to `keep` loses its mark, so that it is not taken for a dead one's for a day."""
    if keep:
        (folder / OWNER).unlink(missing_ok=True)
    if handle is not None:
        os.close(handle)


def is_owned(folder: Path) -> bool:
    """Whether a living process holds the folder's mark."""
    handle = _dead_mark(folder)
    if handle is not None:
        os.close(handle)
    return handle is None and (folder / OWNER).exists()


def clean_up_after_the_dead() -> list[Path]:
    """The folders that were deleted: those of this user whose owner is dead, as kill -9 leaves them.

    What still runs in them is ended first. One without a mark is deleted when nothing in it changed for a day and no
    process is at work in it.
    """
    gone: list[Path] = []
    for folder in sessions():
        with suppress(OSError):
            if folder.is_symlink() or not _is_mine(folder):
                continue
            handle = _dead_mark(folder)
            try:
                if handle is not None or _is_abandoned(folder):
                    # Ray's agents try for a minute to tell a driver that is gone.
                    _end([process for process in _those_of(folder) if _is_rays(process)])
                    shutil.rmtree(folder, ignore_errors=True)
                    gone.append(folder)
            finally:
                if handle is not None:
                    os.close(handle)
    return gone


def _dead_mark(folder: Path) -> int | None:
    """The mark of a dead owner, locked by us now; None where the owner lives or cannot be told, or there is no mark."""
    try:
        handle = os.open(folder / OWNER, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def _is_abandoned(folder: Path) -> bool:
    if (folder / OWNER).exists():
        return False
    newest = max(path.lstat().st_mtime for path in (folder, *folder.rglob("*")))
    return time.time() - newest > DAY_S and not _those_of(folder)


def _those_of(folder: Path) -> list[psutil.Process]:
    """The other processes that were started with the folder's name or have a file of it open, as Ray's have logs."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.pid == os.getpid() or process.uids().real != os.getuid():
                continue
            named = any(str(folder) in word for word in process.cmdline())
            if named or any(Path(file.path).is_relative_to(folder) for file in process.open_files()):
                found.append(process)
    return found


def _is_rays(process: psutil.Process) -> bool:
    """Whether it is a part of Ray, and not somebody who reads its logs."""
    with suppress(psutil.Error):
        title = " ".join(process.cmdline())
        return process.name() in ("raylet", "gcs_server") or title.startswith("ray::") or "/site-packages/ray/" in title
    return False


def _end(processes: Sequence[psutil.Process]) -> None:
    _send(processes, signal.SIGKILL)
    psutil.wait_procs(processes, timeout=KILL_S)


def _is_mine(path: Path) -> bool:
    try:
        return path.lstat().st_uid == os.getuid()
    except OSError:  # it went meanwhile
        return False


def _alive(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those that run: a zombie is dead, whoever fails to notice."""
    alive: list[psutil.Process] = []
    for process in processes:
        with suppress(psutil.Error):
            if process.is_running() and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
                alive.append(process)
    return alive


def _send(processes: Iterable[psutil.Process], number: int) -> None:
    for process in processes:
        with suppress(psutil.Error):
            process.send_signal(number)


def _of_process(process: psutil.Process) -> str:
    what, ports = "", list[int]()
    with suppress(psutil.Error):
        what = f" ({process.name()})"
        connections = process.net_connections(kind="inet")
        ports = sorted({c.laddr.port for c in connections if c.status == psutil.CONN_LISTEN})
    listens = f", which listens on {', '.join(map(str, ports))}" if ports else ""
    return f"process {process.pid}{what} is still there{listens}"


def _sockets(folders: Sequence[Path]) -> Iterator[Path]:
    temporary = Path(tempfile.gettempdir())
    for path in (*temporary.glob("*"), *(path for folder in folders for path in folder.rglob("*"))):
        with suppress(OSError):
            if stat.S_ISSOCK(path.lstat().st_mode):
                yield path


def _mapped() -> set[str]:
    """The files in shared memory that some process has mapped."""
    mapped: set[str] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):
            mapped.update(
                word
                for line in maps.read_text().splitlines()
                if (word := line.split(maxsplit=5)[-1]).startswith("/dev")
            )
    return mapped
