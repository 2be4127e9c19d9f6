"""A Ray of our own on this machine, or a connection to a cluster elsewhere, for as long as a run lasts."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import ray

from cluster.leftovers import SESSION_PREFIX, clean_up_after_the_dead, disown, own, session_parent
from cluster.nodes import nodes_there
from cluster.placement import Resources
from configs.schema import ClusterConfig
from rlhf.errors import PlacementError

LOGICAL_CPUS = 16  # at least so many for a Ray of our own: what Ray counts is not what threads are
END_S = 10.0  # for Ray's processes to end by themselves


class RaySession:
    """Ray, started or reached when entered; nothing of it is left when the block ends.

    Enter it in the main thread: the kernel ends Ray's processes when the thread that started them ends. The logs of
    Ray and of the workers are in `log_dir` (None for a cluster elsewhere); they are deleted unless the block fails.
    What a session left that was killed is deleted when the next one starts.

    Raises PlacementError when there is no answer at `cluster.address` or Ray does not start.
    """

    def __init__(self, config: ClusterConfig, *, num_cpus: float | None = None, num_gpus: int | None = None) -> None:
        self._config = config
        self._num_cpus = num_cpus or max(LOGICAL_CPUS, os.cpu_count() or 1)
        self._num_gpus = num_gpus
        self._own: list[psutil.Process] = []  # the processes that Ray started here
        self._mark: int | None = None  # held as long as log_dir is in use
        self.log_dir: Path | None = None

    @property
    def resources(self) -> Resources:
        """What Ray counts now."""
        return Resources.of(nodes_there())

    def __enter__(self) -> Self:
        handler = signal.getsignal(signal.SIGTERM)
        try:
            if self._config.address is None:
                self._start()
            else:
                self._connect(self._config.address)
        finally:
            signal.signal(signal.SIGTERM, handler)  # Ray puts its own there, which leaves at once
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end(keep_logs=isinstance(error, Exception))

    def _start(self) -> None:
        before = {process.pid for process in psutil.Process().children()}
        clean_up_after_the_dead()
        try:
            self.log_dir = Path(tempfile.mkdtemp(prefix=SESSION_PREFIX, dir=session_parent()))
        except OSError as error:
            raise PlacementError(
                f"Ray's folder cannot be made: {error}.",
                remedy="Free some room there, or set RAY_TMPDIR to a folder that can be written and has a short path.",
            ) from error
        self._mark = own(self.log_dir)
        _make_token()
        try:
            ray.init(
                address="local",
                num_cpus=self._num_cpus,  # pyright: ignore[reportArgumentType] - Ray takes fractions
                num_gpus=self._num_gpus,
                _temp_dir=str(self.log_dir),
                _system_config=_SYSTEM_CONFIG,
                **_QUIET,
            )
        except Exception as error:
            self._end(keep_logs=True)
            raise PlacementError(
                f"Ray does not start on this machine: {_first_line(error)}",
                limit=f"Its logs are in {self.log_dir}.",
                remedy="Check the memory and the room in /tmp and /dev/shm; `tenfold` needs no Ray that runs already.",
            ) from error
        finally:
            self._own = [process for process in psutil.Process().children() if process.pid not in before]

    def _connect(self, address: str) -> None:
        # What ray.init does by itself only where it finds the cluster by itself.
        from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

        has_token = maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
        try:
            ray.init(address=address, **_QUIET)
        except Exception as error:
            raise PlacementError(
                f"cluster.address={address}: no answer from a Ray cluster ({_first_line(error)}).",
                limit="A token was sent." if has_token else "No token was sent.",
                remedy="Check the address; if the cluster wants a token, set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH.",
            ) from error

    def _end(self, keep_logs: bool) -> None:
        family = _with_children(self._own)
        ray.shutdown()
        _end_all(family)
        self._own = []
        if self.log_dir is not None:
            if not keep_logs:
                shutil.rmtree(self.log_dir, ignore_errors=True)
            disown(self.log_dir, self._mark, keep=keep_logs)
            self._mark = None


_QUIET: dict[str, Any] = {
    "include_dashboard": False,
    "log_to_driver": False,
    "logging_level": "ERROR",
}


# Nobody reads the records that Ray keeps of every call, and its servers would grow with them; so they do, if more
# slowly, with each look at the memory of all processes, of which there would be four a second.
# Ray would run the workers at a niceness of 15: whatever else a machine does, down to another run's set-up, would take
# their cores from them (4 % of them were left beside two busy processes), and a start ran into its limit of time.
_SYSTEM_CONFIG = {
    "task_events_report_interval_ms": 0,
    "enable_metrics_collection": False,
    "event_stats": False,
    "memory_monitor_refresh_ms": 2000,
    "worker_niceness": 0,
}


def _make_token() -> None:
    """Gives our own Ray a token of its own where the user has none, so that it writes none into the home folder."""
    known = any(name in os.environ for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    if not known and not (Path.home() / ".ray" / "auth_token").exists():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _with_children(processes: list[psutil.Process]) -> list[psutil.Process]:
    family = list(processes)
    for process in processes:
        try:
            family += process.children(recursive=True)
        except psutil.NoSuchProcess:
            continue
    return family


def _end_all(processes: list[psutil.Process]) -> None:
    """Waits for the processes to end, and ends those that do not."""
    _, alive = psutil.wait_procs(processes, timeout=END_S)
    for process in alive:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(alive, timeout=END_S)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
