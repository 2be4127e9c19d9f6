"""`tenfold submit` against a real Ray head by address: followed to its end, looked at, stopped, resumed."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.ray_head import RayHead, ray_head
from tests.cluster.submitting import actors_and_groups, last_json, wait_until, working_directory

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]

ROOT = Path(__file__).parents[2]
SECRET = "hush-0123456789-this-is-a-secret"


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as folder, ray_head(Path(folder)) as started:
        yield started


@pytest.fixture(scope="module")
def home(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return working_directory(tmp_path_factory.mktemp("home"), tiny_model)


def tenfold(head: RayHead, home: Path, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """What the command did, from the working directory, with the head's address and token."""
    own = {name: value for name, value in head.environ.items() if name != "TENFOLD_TEST_HEAD"}
    own["RAY_ADDRESS"] = "http://127.0.0.1:9"  # Ray would ask there instead
    return subprocess.run(
        [sys.executable, "-m", "cluster.cli", *words, "--address", head.address],
        cwd=home,
        env=own | environ,
        capture_output=True,
        text=True,
        timeout=1000,
        check=False,
    )


def test_a_wrong_token_and_none_are_told_apart(head: RayHead, home: Path, tmp_path: Path) -> None:
    wrong = tenfold(head, home, "status", "tiny", RAY_AUTH_TOKEN="f" * 64)
    assert (
        wrong.returncode == 2
        and "does not take the token that was sent (403). It came from RAY_AUTH_TOKEN" in wrong.stdout
    )
    none = tenfold(head, home, "status", "tiny", HOME=str(tmp_path))
    assert none.returncode == 2 and "wants a token (401), and none was sent" in none.stdout
    there = tenfold(head, home, "status", "tiny")
    assert there.returncode == 2 and "There is no job of a run 'tiny'" in there.stdout


def test_a_recipe_is_submitted_and_followed_to_its_end_and_leaves_nothing(head: RayHead, home: Path) -> None:
    before = set(head.processes())
    done = tenfold(
        head, home, "submit", "recipe.yaml", "evaluate.num_prompts=2", "--secret", "MY_SECRET", MY_SECRET=SECRET
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "job        tenfold-tiny-" in done.stdout and "ppo: done" in done.stdout
    assert "W&B        " in done.stdout.splitlines()[-1]  # an offline folder, where no key goes along
    run = home / "there" / "tiny"
    assert (run / "models" / "policy" / "adapter_config.json").exists()
    assert (home / "there" / "inputs" / "tiny" / "model" / "config.json").exists()
    about = last_json(tenfold(head, home, "status", "tiny", "--json").stdout)
    assert (about["state"], about["exit_code"], about["folder"]) == ("succeeded", 0, str(run))
    assert "ppo: done" in tenfold(head, home, "logs", "tiny").stdout
    stopped = tenfold(head, home, "stop", "tiny", "--json")
    assert stopped.returncode == 0 and last_json(stopped.stdout)["was_over"] is True

    # Ray itself writes a job's environment into a log of its own; nothing of ours, and no other of Ray's, holds it.
    kept = {path.name for folder in (head.folder, home) for path in folder.rglob("*") if holds(path, SECRET)}
    assert kept == {"runtime_env_agent.log"}
    assert SECRET not in done.stdout + done.stderr
    wait_until("the job's processes are gone", lambda: set(head.processes()) <= before | idle(head), 60)


def holds(path: Path, text: str) -> bool:
    return path.is_file() and text.encode() in path.read_bytes()


def idle(head: RayHead) -> set[int]:
    """Workers that Ray keeps ready, which do nothing."""
    return {
        pid
        for pid, process in head.processes().items()
        if process.is_running() and process.name().startswith("ray::IDLE")
    }


def test_a_run_that_is_stopped_in_the_middle_leaves_nothing_and_goes_on(head: RayHead, home: Path) -> None:
    before = set(head.processes())
    words = ("submit", "recipe.yaml", "name=long", "ppo.num_steps=200", "--detach", "--json")
    submitted = tenfold(head, home, *words)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    second = tenfold(head, home, *words)
    assert second.returncode == 2 and "has a job at" in second.stderr
    metrics = home / "there" / "long" / "metrics.jsonl"
    wait_until("two steps of PPO", lambda: metrics.exists() and metrics.read_text().count('"stage": "ppo"') >= 2)
    assert last_json(tenfold(head, home, "status", "long", "--json").stdout)["state"] == "running"

    stopped = tenfold(head, home, "stop", "long", "--json")
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    assert last_json(stopped.stdout) | {"job": ""} == {
        "run": "long", "job": "", "state": "stopped", "was_over": False, "left": None,
    }  # fmt: skip
    log = tenfold(head, home, "logs", "long").stdout
    assert "stopping: closing the team" in log and "what was committed is kept" in log  # it closed by itself
    manifest = json.loads((home / "there" / "long" / "manifest.json").read_text())
    assert manifest["session"]["ended"] is not None and manifest["checkpoints"]["ppo"] >= 1
    wait_until("the job's processes are gone", lambda: set(head.processes()) <= before | idle(head), 60)
    assert actors_and_groups([], head.address, head.environ) == ""

    steps = str(manifest["checkpoints"]["ppo"] + 2)
    words = (
        "resume",
        "long",
        f"ppo.num_steps={steps}",
        "evaluate.num_prompts=2",
        "--accept",
        "ppo",
        "--accept",
        "evaluate",
    )
    resumed = tenfold(head, home, *words)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert last_json(tenfold(head, home, "status", "long", "--json").stdout)["state"] == "succeeded"


def test_the_doctor_looks_at_the_cluster_by_a_job(head: RayHead, home: Path) -> None:
    looked = tenfold(head, home, "doctor", "--no-generator", "--json")
    lines = {line["name"]: line for line in json.loads(looked.stdout)}
    assert set(lines) == {
        "job server", "versions", "accelerators", "shared memory", "disk", "open files", "ports", "all-reduce", "W&B",
    }  # fmt: skip
    assert lines["job server"] | {"do": "", "node": ""} == {
        "name": "job server", "state": "ok", "found": f"{head.address}: a token is asked for", "do": "", "node": "",
    }  # fmt: skip
    assert lines["all-reduce"]["state"] == "ok", looked.stdout
    assert looked.returncode == int(any(line["state"] == "mend" for line in lines.values()))
