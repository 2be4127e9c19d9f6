"""A Ray of our own that leaves nothing behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import ray

from cluster.leftovers import is_owned, left_behind, sessions, snapshot
from cluster.ray_session import RaySession
from configs.schema import ClusterConfig

pytestmark = [pytest.mark.ray, pytest.mark.timeout(120)]

# A session with a worker at work, that waits to be killed.
SESSION = """
import os, time
import ray
from cluster.ray_session import RaySession
from configs.schema import ClusterConfig

with RaySession(ClusterConfig(), num_cpus=2, num_gpus=0):
    ray.get(ray.remote(lambda: os.getpid()).remote(), timeout=60)
    ray.remote(lambda: time.sleep(300)).remote()
    print("ready", flush=True)
    time.sleep(300)
"""


@pytest.fixture
def parent(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder where the folders of Rays are; its path is short, since those of Ray's sockets are long."""
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        yield Path(folder)


def shared_memory() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if "plasma" in name.lower() or name.startswith("ray")}


def a_session_leaves_no_process_no_file_and_no_shared_memory() -> None:
    before, memory_before = {process.pid for process in psutil.Process().children(recursive=True)}, shared_memory()
    token = Path.home() / ".ray" / "auth_token"
    had_token = token.exists()
    handler = signal.getsignal(signal.SIGTERM)
    with RaySession(ClusterConfig(), num_cpus=2, num_gpus=0) as session:
        assert signal.getsignal(signal.SIGTERM) is handler  # SIGTERM stays the controller's
        assert (session.resources.cpus, session.resources.gpus) == (2, 0)
        assert ray.get(ray.remote(lambda: os.getpid()).remote(), timeout=60) != os.getpid()
        log_dir = session.log_dir
        assert log_dir is not None and log_dir.is_dir()
        family = [p for p in psutil.Process().children(recursive=True) if p.pid not in before]
        assert {"raylet", "gcs_server"} <= {process.name() for process in family}
    assert not ray.is_initialized()
    assert [process for process in family if process.is_running()] == []
    assert not log_dir.exists()
    assert shared_memory() == memory_before
    assert token.exists() == had_token


def logs_are_kept_when_the_run_fails() -> None:
    with pytest.raises(ZeroDivisionError), RaySession(ClusterConfig(), num_cpus=1) as session:
        _ = 1 / 0
    assert not ray.is_initialized()
    assert session.log_dir is not None and list(session.log_dir.rglob("raylet.out"))
    shutil.rmtree(session.log_dir)


def of_a_session_that_is_killed_nothing_runs_on_and_the_next_one_deletes_the_rest() -> None:
    before = snapshot()
    driver = subprocess.Popen([sys.executable, "-c", SESSION], stdout=subprocess.PIPE, text=True)
    with driver:
        assert driver.stdout is not None and driver.stdout.readline() == "ready\n"
        family = psutil.Process(driver.pid).children(recursive=True)
        assert {"raylet", "gcs_server"} <= {process.name() for process in family}
        (folder,) = sessions()
        assert is_owned(folder)
        driver.kill()  # the driver alone: the kernel ends Ray's processes, and those their workers
    agents = {"ray::DashboardAgent", "ray::RuntimeEnvAgent"}  # they try for a minute to tell the driver
    _, alive = psutil.wait_procs([process for process in family if process.name() not in agents], timeout=20)
    assert [process.name() for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []
    assert not is_owned(folder)
    with RaySession(ClusterConfig(), num_cpus=1, num_gpus=0) as session:
        assert sessions() == [session.log_dir]
        assert [process for process in family if process.is_running()] == []
    assert sessions() == [] and left_behind(before) == []


@pytest.mark.parametrize(
    "what",
    [
        a_session_leaves_no_process_no_file_and_no_shared_memory,
        logs_are_kept_when_the_run_fails,
        of_a_session_that_is_killed_nothing_runs_on_and_the_next_one_deletes_the_rest,
    ],
    ids=lambda what: what.__name__,
)
def test_in_a_process_of_its_own(what: Callable[[], None], parent: Path) -> None:
    code = f"from {__name__} import {what.__name__} as what; what()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
