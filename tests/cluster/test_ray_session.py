"""A Ray of our own that leaves nothing behind."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import psutil
import pytest
import ray

from cluster.ray_session import RaySession
from configs.schema import ClusterConfig

pytestmark = [pytest.mark.ray, pytest.mark.timeout(120)]


def shared_memory() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if "plasma" in name.lower() or name.startswith("ray")}


def test_a_session_leaves_no_process_no_file_and_no_shared_memory() -> None:
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


def test_logs_are_kept_when_the_run_fails() -> None:
    with pytest.raises(ZeroDivisionError), RaySession(ClusterConfig(), num_cpus=1) as session:
        _ = 1 / 0
    assert not ray.is_initialized()
    assert session.log_dir is not None and list(session.log_dir.rglob("raylet.out"))
    shutil.rmtree(session.log_dir)
