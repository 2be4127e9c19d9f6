"""A run that is scaled, and one that loses a worker, on real Ray, vLLM and DeepSpeed."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from cluster.console import LineConsole
from cluster.ray_session import RaySession
from cluster.run import run
from cluster.scale import ask, parse
from cluster.team import RayTeam
from configs.load import load_recipe
from configs.schema import Recipe
from rlhf.compare import differences
from rlhf.step_journal import StepJournal
from rlhf.store import RunStore
from tests.cluster.same import assert_learnt_the_same
from tests.recipes import tiny_recipe

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.timeout(400)]

CHANGES: dict[str, Any] = {
    "stages": ["ppo"],
    "ppo": {"num_steps": 6, "score": "rules", "save_every": 2},
    "tracker": {"mode": "disabled"},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scaled")


@pytest.fixture(scope="module")
def whole(session: RaySession, tiny_model: Path, home: Path) -> Path:
    """The run that nothing happened to, with all its answers in its journal."""
    recipe = tiny_recipe(tiny_model, home, name="whole", **CHANGES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepJournal, "drop_below", lambda self, step: None)
        run(recipe, LineConsole(StringIO()), session=session)
    return Path(recipe.runs) / "whole"


def beginning_like(whole: Path, recipe: Recipe) -> Path:
    """The folder of a run that is to use the answers of another."""
    with RunStore.open(recipe.runs, recipe) as store:
        shutil.copytree(whole / "journal", store.folder / "journal", dirs_exist_ok=True)
        return store.folder


def test_a_run_scaled_to_two_workers_and_back_learns_the_same_from_the_same_answers(
    session: RaySession, tiny_model: Path, home: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(tiny_model, home, name="scaled", **CHANGES)
    folder = beginning_like(whole, recipe)
    log = RunStore.log

    def logs_and_asks(self: RunStore, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        log(self, stage, step, metrics)
        if step in (1, 3):
            ask(folder, parse(None, f"trainer={2 if step == 1 else 1}"))

    monkeypatch.setattr(RunStore, "log", logs_and_asks)
    out = StringIO()
    run(recipe, LineConsole(out), session=session)
    started = [line for line in out.getvalue().splitlines() if "policy: ready in " in line]
    assert [line.split(", ")[1].split()[0] for line in started] == ["1", "2", "1"]
    assert load_recipe(folder / "recipe.yaml").cluster.workers == {"trainer": 1}
    assert_learnt_the_same(whole, folder, rtol=1e-3, atol=2e-5)


def test_a_run_whose_worker_is_killed_goes_on_by_itself_bit_for_bit(
    session: RaySession, tiny_model: Path, home: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(tiny_model, home, name="killed", **CHANGES)
    stats, asked = RayTeam.stats, 0

    def killed_in_the_fourth_step(self: RayTeam) -> dict[str, float]:
        nonlocal asked
        asked += 1
        if asked == 4:
            (pid,) = [pid for pid, name in self.worker_names().items() if name == "trainer-0"]
            os.kill(pid, signal.SIGKILL)
        return stats(self)

    monkeypatch.setattr(RayTeam, "stats", killed_in_the_fourth_step)
    out = StringIO()
    run(recipe, LineConsole(out), session=session)
    assert "is gone" in out.getvalue() and "with new workers in the same places" in " ".join(out.getvalue().split())
    assert differences(whole, Path(recipe.runs) / "killed") == []
