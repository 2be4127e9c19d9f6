"""Memory of a process tree."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from cluster.memory import PeakMemory, process_tree_pss

MIB = 2**20
# Takes 64 MiB, says so, and waits to be told to end.
CHILD = "block = bytearray(b'x') * (64 << 20); print('ready', flush=True); input()"


@pytest.fixture
def child() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()
    assert process.stdin is not None
    process.stdin.close()


def test_a_tree_is_its_root_and_what_it_started(child: subprocess.Popen[str]) -> None:
    usage = process_tree_pss(os.getpid())
    by_pid = {pid: size for (pid, _), size in usage.items()}
    assert {os.getpid(), child.pid} <= set(by_pid)
    assert 64 * MIB < by_pid[child.pid] < 128 * MIB


def test_a_process_that_is_gone_takes_nothing() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert process_tree_pss(ended.pid) == {}


def test_the_peak_is_kept_after_the_process_has_ended(child: subprocess.Popen[str]) -> None:
    with PeakMemory(child.pid, every_s=60) as memory:
        memory.look()
        child.communicate("end\n")
        assert memory.look() == 0
    assert 64 * MIB < memory.peak_bytes < 128 * MIB
    assert memory.peak_gib == memory.peak_bytes / 2**30
    assert [pid for pid, _ in memory.at_peak] == [child.pid]
