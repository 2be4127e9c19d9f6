"""The jobs of a real Ray head, with an entry point that is light: how it is stopped, and what is seen of it."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.job_watch import follow, stop_job
from cluster.jobs import FOLDER, RUN, Job, JobInfo, find_job
from cluster.ray_jobs import RayJobs, access
from tests.cluster.ray_head import RayHead, ray_head
from tests.fakes import SilentConsole

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

# A driver with an actor, a placement group and a child: told to end, it says whether the child was told as well.
DRIVER = """
import signal, subprocess, sys, time
import ray
from ray.util.placement_group import placement_group
ray.init(address="auto", log_to_driver=False)
group = placement_group([{"CPU": 0.5}])
ray.get(group.ready(), timeout=60)
@ray.remote(num_cpus=0.5)
class Worker:
    def ping(self): return 1
worker = Worker.remote()
ray.get(worker.ping.remote(), timeout=60)
child = subprocess.Popen(["sleep", "300"])
def end(number, frame):
    time.sleep(1)
    print("the child lives" if child.poll() is None else "the child is gone", flush=True)
    child.kill()
    ray.shutdown()
    sys.exit(143)
signal.signal(signal.SIGTERM, end)
print("ready", flush=True)
time.sleep(300)
"""


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as folder, ray_head(Path(folder), num_cpus=2) as started:
        yield started


def test_the_entry_point_closes_before_anything_else_of_its_job_is_ended(head: RayHead, tmp_path: Path) -> None:
    # In a process of its own: Ray keeps the first token that it has read.
    code = f"import sys; from {__name__} import stopped; stopped(*sys.argv[1:])"
    environ = {name: value for name, value in head.environ.items() if name != "TENFOLD_TEST_HEAD"}
    command = [sys.executable, "-c", code, head.address, tmp_path]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def stopped(address: str, folder: str) -> None:
    jobs = RayJobs(address)
    assert access(jobs.address) == "token"
    script = Path(folder) / "driver.py"
    script.write_text(DRIVER)
    about = {RUN: "light", FOLDER: folder}
    jobs.submit(Job("tenfold-light-1", f"exec python {script}", {}, about))
    deadline = time.monotonic() + 200
    while "ready" not in jobs.logs("tenfold-light-1"):
        assert time.monotonic() < deadline, jobs.logs("tenfold-light-1")
        time.sleep(0.5)

    info = find_job(jobs, "light")
    assert (info.state, info.folder) == ("RUNNING", folder) and info.pid and info.node and info.driver
    had = jobs.parts(info)
    assert len(had.actors) == len(had.placement_groups) == len(had.processes) == 1
    assert jobs.alive(had.processes) == had.processes

    done = stop_job(jobs, info, SilentConsole(), wait_s=100)
    assert (done.info.state, done.info.exit_code, str(done.left)) == ("STOPPED", 143, "")
    said: list[str] = []
    assert follow(jobs, info.job_id, said.append).state == "STOPPED"
    assert "".join(said).endswith("ready\nthe child lives\n")
    assert jobs.parts(info) == jobs.parts(JobInfo("none", "PENDING"))
    assert jobs.alive(had.processes) == frozenset()
