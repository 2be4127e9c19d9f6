"""The doctor: what it makes of what it finds, line by line; and a look at this machine with a Ray of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.checks import AllReduce, Check, Findings, collective, examine, exit_code, node_checks, reach, wandb
from cluster.doctor import MARK, doctor_there, way
from cluster.jobs import JobError
from cluster.node_facts import NodeFacts, opened_port, why_unreachable
from cluster.submit import Asked
from tests.cluster.fake_jobs import FakeJobs
from tests.fakes import SilentConsole

VERSIONS: dict[str, str] = dict.fromkeys(("ray", "torch", "transformers", "peft", "deepspeed", "vllm"), "1.0")
GOOD = NodeFacts(
    host="10.0.0.1", python="3.11.9", versions=VERSIONS, gpus=("H100, 81559 MiB",), torch_gpus=1, ray_gpus=1.0,
    num_cores=16, memory_gib=128.0, shm_gib=8.0, open_files=65536, disk_gib={"/tmp/ray": 60.0},
)  # fmt: skip
SUM = AllReduce(num_nodes=2, num_workers=2, backend="nccl", num_bytes=10**9, time_s=0.1)


def mended(facts: NodeFacts) -> dict[str, str]:
    """What is to be done for this node, by the line's name."""
    return {check.name: check.do for check in node_checks(facts) if check.state == "mend"}


def test_a_good_cluster_is_ok_in_every_line() -> None:
    other = replace(GOOD, host="10.0.0.2")
    checks = examine(Findings([GOOD, other], (), SUM, 12.0, {"address": "https://w", "error": "", "key": "set"}))
    assert {check.state for check in checks} == {"ok"} and exit_code(checks) == 0
    assert [check.name for check in checks[:5]] == ["versions", "accelerators", "shared memory", "disk", "open files"]
    assert [check.name for check in checks[10:]] == ["ports", "all-reduce", "generator", "W&B"]


@pytest.mark.parametrize(
    ("change", "name", "do"),
    [
        ({"python": "3.12.1"}, "versions", "Tenfold needs Python 3.11"),
        ({"versions": {"ray": "2.60.0"}}, "versions", "Missing: torch, transformers, peft, deepspeed, vllm"),
        (
            {"torch_gpus": 0},
            "accelerators",
            "The driver shows 1, torch sees 0 (torch 1.0): install requirements/gpu.lock",
        ),
        ({"ray_gpus": 8.0}, "accelerators", "Ray counts 8: start the node without --num-gpus, or with 1"),
        ({"shm_gib": 0.0625}, "shared memory", "At least 2 GiB are needed. Give the container more: `docker run --shm"),
        ({"disk_gib": {"/tmp/ray": 9.9}}, "disk", "At least 10 GiB are needed. Free some"),
        ({"open_files": 1024}, "open files", "Run `ulimit -n 65536`"),
    ],
)
def test_what_a_node_lacks_is_said_with_what_to_do(change: dict[str, object], name: str, do: str) -> None:
    (found,) = mended(replace(GOOD, **change)).items()  # pyright: ignore[reportArgumentType]
    assert found[0] == name and found[1].startswith(do)


def test_versions_that_differ_between_nodes_are_a_line_each() -> None:
    other = replace(GOOD, host="10.0.0.2", versions=VERSIONS | {"ray": "2.0"})
    lines = [check for check in examine(Findings([GOOD, other], (), SUM)) if check.state == "mend"]
    assert [str(line) for line in lines] == [
        "mend  versions       ray 1.0 on 10.0.0.1; 2.0 on 10.0.0.2. Set all nodes up from one lock, or one image"
    ]


def test_ways_that_are_closed_name_both_ends() -> None:
    assert "2 ways between 2 nodes are open" in str(reach([GOOD, GOOD], ()))
    closed = reach([GOOD, GOOD], [("10.0.0.1", "10.0.0.2", "timed out")])
    assert closed.state == "mend" and "10.0.0.2 is not reached from 10.0.0.1 (timed out)" in closed.found


def test_a_port_that_is_open_is_reached_and_one_that_is_not_says_why() -> None:
    with opened_port("127.0.0.1") as listener:
        port = listener.getsockname()[1]
        assert why_unreachable("127.0.0.1", port) == ""
    assert why_unreachable("127.0.0.1", port) == "Connection refused"


def test_the_bandwidth_is_that_of_the_bus() -> None:
    # 4 workers, 1 GB in 0.1 s: each sends 2 x 3 / 4 GB = 1.5 GB
    assert replace(SUM, num_workers=4).bus_gbytes_s == pytest.approx(15.0)
    assert collective(SUM).state == "ok" and "10.00 GB/s" in collective(SUM).found
    slow = collective(replace(SUM, time_s=100.0))
    assert slow.state == "mend" and "is it the network that was meant?" in slow.do
    assert collective("GetTimeoutError: ...").state == "mend"


def test_wandb_is_to_be_mended_only_where_there_is_a_key() -> None:
    closed = {"address": "https://w", "error": "ConnectionError"}
    assert wandb(closed).state == "ok" and "https://w does not answer" in wandb(closed).found
    assert wandb(closed | {"key": "set"}).state == "mend"


def test_a_generator_that_does_not_start_is_to_be_mended_and_one_not_asked_for_has_no_line() -> None:
    names = [check.name for check in examine(Findings([GOOD], (), SUM))]
    assert "generator" not in names
    failed = [check for check in examine(Findings([GOOD], (), SUM, "RuntimeError: no CUDA")) if check.state == "mend"]
    assert [check.name for check in failed] == ["generator"]


def test_an_open_job_server_is_to_be_mended_unless_it_is_this_machines_own() -> None:
    assert [check.state for check in way("http://127.0.0.1:8265", "open")] == ["ok"]
    (line,) = way("https://head:8265", "open")
    assert line.state == "mend" and "ASKS FOR NO TOKEN" in line.do


def test_the_doctor_of_a_cluster_reads_the_lines_of_its_job(tmp_path: Path) -> None:
    line = Check("disk", "mend", "1.0 GiB", "Free some", "10.0.0.1")
    jobs, console = FakeJobs(), SilentConsole()
    jobs.connections = [["ask the nodes: done\n", f"{MARK}{json.dumps([line.to_json()])}\n"]]
    checks = doctor_there(jobs, "token", Asked(tmp_path), console, generates=False)  # pyright: ignore[reportArgumentType]
    assert checks[1:] == [line] and exit_code(checks) == 1
    assert console.said == ["ask the nodes: done"]
    assert jobs.submitted[0].entrypoint == "exec python -m cluster.doctor --no-generator"


def test_a_doctors_job_that_says_nothing_is_an_error_that_names_its_log(tmp_path: Path) -> None:
    jobs = FakeJobs()
    jobs.connections = [["No module named cluster\n"]]
    with pytest.raises(JobError, match=r"ended \(succeeded\) without a word. See `tenfold logs tenfold-doctor-"):
        doctor_there(jobs, "token", Asked(tmp_path), SilentConsole(), generates=True)  # pyright: ignore[reportArgumentType]


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_the_doctor_looks_at_this_machine_and_starts_a_generator() -> None:
    command = [sys.executable, "-m", "cluster.cli", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=290, check=False)
    lines = {line["name"]: line for line in json.loads(done.stdout)}
    assert set(lines) >= {"versions", "accelerators", "ports", "all-reduce", "generator", "W&B"}
    assert lines["all-reduce"]["state"] == "ok", lines["all-reduce"]
    assert "2 workers on one node, gloo, 64 MiB" in lines["all-reduce"]["found"]
    assert lines["generator"]["state"] == "ok", lines["generator"]
    assert done.returncode == int(any(line["state"] == "mend" for line in lines.values()))
