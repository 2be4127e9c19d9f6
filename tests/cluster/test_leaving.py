"""However a run ends, nothing of it is left on the machine, and it goes on from where it was."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.leftovers import MARKER, family, kill_family, left_behind, snapshot
from configs.load import dump_recipe
from tests.recipes import tiny_recipe

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.timeout(400)]

LEAVES_S = 30.0


@pytest.fixture
def token() -> Iterator[str]:
    token = secrets.token_hex(8)
    yield token
    kill_family(token)


@pytest.fixture(autouse=True)
def interrupts_come_through() -> Iterator[None]:
    """A shell starts what it puts in the background with SIGINT ignored, and so would be all that the tests start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Started:
    """A run as a process of its own, on which a test can wait."""

    def __init__(self, token: str, run: Path, *words: str) -> None:
        self._events = run / "events.jsonl"
        self._seen = len(self._lines())
        self.log = run.parent / f"log-{secrets.token_hex(2)}"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cluster.cli", *words],
                stdout=log,
                stderr=log,
                env=os.environ | {MARKER: token},
                start_new_session=True,
            )

    def wait_for(self, phase: str, step: int) -> None:
        """Returns in the middle of the phase of this step, or of a later one."""
        while True:
            assert self.process.poll() is None, self.log.read_text()
            for line in self._lines()[self._seen :]:
                event = json.loads(line)
                if (event.get("phase"), event["what"]) == (phase, "begin") and event["step"] >= step:
                    return
            time.sleep(0.005)

    def leave(self) -> tuple[int, float]:
        """(exit code, seconds until the process left)."""
        began = time.monotonic()
        code = self.process.wait(timeout=2 * LEAVES_S)
        return code, time.monotonic() - began

    def _lines(self) -> list[str]:
        return self._events.read_text().splitlines() if self._events.exists() else []


def test_a_run_that_is_told_to_leave_or_fails_or_ends_leaves_nothing(
    tiny_model: Path, tmp_path: Path, token: str
) -> None:
    recipe = tiny_recipe(
        tiny_model,
        tmp_path,
        stages=["ppo"],
        ppo={"num_steps": 500, "score": "rules", "save_every": 3, "optimizer": {"lr": 1e-5}},
        tracker={"mode": "offline"},
        cluster={"max_failures": 0},  # a lost worker ends it
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe))
    run = Path(recipe.runs) / recipe.name
    run.parent.mkdir()
    before = snapshot([tmp_path])

    def left() -> list[str]:
        return left_behind(before, token, [tmp_path])

    terminated = Started(token, run, "run", str(path))
    terminated.wait_for("update", 4)
    terminated.process.send_signal(signal.SIGTERM)
    code, seconds = terminated.leave()
    assert code == 143 and seconds < LEAVES_S, terminated.log.read_text()
    assert left() == []
    assert [line["step"] for line in map(json.loads, (run / "journal" / "ppo.jsonl").read_text().splitlines())]

    interrupted = Started(token, run, "resume", str(run))
    interrupted.wait_for("generate", 7)
    os.killpg(interrupted.process.pid, signal.SIGINT)  # as a terminal does
    code, seconds = interrupted.leave()
    assert code == 130 and seconds < LEAVES_S, interrupted.log.read_text()
    assert left() == []

    failing = Started(token, run, "resume", str(run))
    failing.wait_for("score", 10)
    workers = [process for process in family(token) if process.name().startswith("ray::Worker")]
    workers[0].kill()
    code, _ = failing.leave()
    assert code == 2, failing.log.read_text()
    kept = [line for line in left() if "the folder of a Ray" not in line]  # its logs are kept, which was said
    assert kept == [] and "the logs of Ray and of its workers are in" in failing.log.read_text()

    ending = Started(token, run, "resume", str(run), "ppo.num_steps=12", "--accept", "ppo.num_steps")
    code, _ = ending.leave()
    assert code == 0, ending.log.read_text()
    assert [line for line in left() if "the folder of a Ray" not in line] == []
    assert json.loads((run / "manifest.json").read_text())["session"]["how"] == "done"
