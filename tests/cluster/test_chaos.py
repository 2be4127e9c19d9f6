"""Kills at chosen moments, on a small stand-in for Tenfold; and once on Tenfold itself."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections import Counter
from io import StringIO
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console as RichConsole

from cluster.chaos import Follower, Report, _Processes, chaos, is_complete, page
from cluster.console import LineConsole
from cluster.moments import Moment, Span, choose, spans
from configs.load import dump_recipe, load_recipe
from rlhf.errors import TenfoldError
from tests.fakes import SilentConsole
from tests.recipes import tiny_recipe

# Two stages of three steps; a step's row is its commit. FLAW says what it does wrong.
STAND_IN = """
import json, os, subprocess, sys, time
from pathlib import Path
from configs.load import absolute, dump_recipe, load_recipe
from rlhf.events import Events

command, first, *rest = sys.argv[1:]
resumed, flaw = command == "resume", os.environ.get("FLAW")
recipe = load_recipe(Path(first) / "recipe.yaml" if resumed else first, rest)
run = Path(recipe.runs) / recipe.name
run.mkdir(parents=True, exist_ok=True)
metrics, manifest = run / "metrics.jsonl", run / "manifest.json"
if not resumed:
    (run / "recipe.yaml").write_text(dump_recipe(absolute(recipe)))
    manifest.write_text(json.dumps({"stages": {}}))
if flaw == "fails":
    sys.exit("the disk is full")
events = Events(run)
events.add("start", pid=os.getpid())
worker = subprocess.Popen(["sleep", "300"], start_new_session=True)
if resumed and flaw == "hangs":
    time.sleep(300)
done = metrics.read_text().splitlines() if metrics.exists() else []
done = {(row["stage"], row["step"]) for row in map(json.loads, done)}
stages = json.loads(manifest.read_text())["stages"]
for stage in recipe.stages:
    if stage in stages:
        continue
    with events.around(stage, 0, "stage"):
        for step in range(3):
            if (stage, step) in done:
                continue
            for phase in ("generate", "update"):
                with events.around(stage, step, phase):
                    time.sleep(0.05)
            value = step / 8 + 0.5 * (resumed and flaw == "forgets")
            row = {"stage": stage, "step": step, "loss": value, "time/step": time.time()}
            with metrics.open("a") as file:
                file.write(json.dumps(row) + chr(10))
    stages[stage] = {"results": {"time_s": time.time()}}
    (run / "new").write_text(json.dumps({"stages": stages}))
    (run / "new").replace(manifest)
if flaw != "leaves":
    worker.kill()
"""
COMMAND = (sys.executable, "-c", STAND_IN)


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe, beside which the tests share the undisturbed run."""
    folder = tmp_path_factory.mktemp("chaos")
    path = folder / "recipe.yaml"
    path.write_text(dump_recipe(tiny_recipe("model", folder, stages=["sample", "ppo"])))
    return path


def stand_in(recipe: Path, console: SilentConsole | None = None, kills: int = 1, folder: Path | None = None) -> Report:
    return chaos(
        recipe,
        kills=kills,
        seed=1,
        folder=folder or recipe.parent / "chaos",
        console=console or SilentConsole(),
        command=COMMAND,
    )


def shown(report: Report) -> str:
    out = StringIO()
    RichConsole(file=out, width=200).print(page(report))
    return out.getvalue()


def event(time: float, what: str, stage: str = "", step: int = 0, phase: str = "") -> dict[str, Any]:
    return {"time": time, "what": what} | ({"stage": stage, "step": step, "phase": phase} if stage else {})


EVENTS = [
    event(100, "start"),
    event(101, "begin", "ppo", 0, "stage"),
    event(101, "begin", "ppo", 0, "generate"),
    event(103, "end", "ppo", 0, "generate"),
    event(103, "begin", "ppo", 0, "update"),
    event(103.5, "begin", "ppo", 0, "update critic"),
    event(104, "end", "ppo", 0, "update"),
    {"time": 104, "what": "checkpoint", "stage": "ppo", "step": 1},
    event(105, "end", "ppo", 0, "stage"),
    event(105, "end"),
]


def test_spans_are_pairs_of_events_and_one_without_an_end_is_none() -> None:
    assert spans(EVENTS) == [
        Span("ppo", 0, "stage", 1, 4),
        Span("ppo", 0, "generate", 1, 2),
        Span("ppo", 0, "update", 3, 1),
    ]


def made_spans(num_steps: int = 4) -> list[Span]:
    """Steps of 10 s with three phases; only the last one saves."""
    found: list[Span] = []
    for step in range(num_steps):
        found.append(Span("ppo", step, "generate", 10.0 * step, 4.0))
        found.append(Span("ppo", step, "update", 10.0 * step + 4, 5.0))
    return [*found, Span("ppo", num_steps - 1, "save", 10.0 * num_steps - 1, 1.0)]


@pytest.mark.parametrize("seed", range(20))
def test_every_kind_of_phase_has_its_turn_before_one_comes_twice_and_then_the_other_way(seed: int) -> None:
    assert {moment.phase for moment in choose(made_spans(), 3, seed)} == {"generate", "update", "save"}
    assert len({moment.phase for moment in choose(made_spans(), 2, seed)}) == 2
    six = choose(made_spans(), 6, seed)
    assert set(Counter((moment.phase, moment.where) for moment in six).values()) == {1}
    assert max(Counter(moment.phase for moment in choose(made_spans(), 7, seed)).values()) == 3


@pytest.mark.parametrize("seed", range(20))
def test_a_moment_is_inside_its_phase_or_right_at_its_end_and_they_come_in_the_order_of_the_run(seed: int) -> None:
    of = {(span.step, span.phase): span for span in made_spans()}
    moments = choose(made_spans(), 8, seed)
    assert [moment.at_s for moment in moments] == sorted(moment.at_s for moment in moments)
    for moment in moments:
        span = of[moment.step, moment.phase]
        if moment.where == "inside":
            assert 0.1 * span.seconds <= moment.wait_s <= 0.9 * span.seconds
            assert moment.at_s == span.began_s + moment.wait_s
        else:
            assert (moment.wait_s, moment.at_s) == (0.0, span.began_s + span.seconds)


def test_the_seed_alone_decides() -> None:
    assert choose(made_spans(), 5, 7) == choose(made_spans(), 5, 7)
    assert len({tuple(choose(made_spans(), 5, seed)) for seed in range(10)}) == 10


def test_a_run_without_events_cannot_be_aimed_at() -> None:
    with pytest.raises(TenfoldError, match="no events"):
        choose([], 1, 0)


def test_events_are_followed_line_by_line_and_a_torn_one_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    events = Follower(path)
    assert events.read() == []
    path.write_text('{"what": "start"}\n{"what": "beg')
    assert events.read() == [{"what": "start"}]
    with path.open("a") as file:
        file.write('{"what": "start"}\n{"what": "end"}\n')  # the first one follows the torn one
    assert events.read() == [{"what": "end"}]
    assert events.seen == [{"what": "start"}, {"what": "end"}]


@pytest.mark.engine
def test_a_run_that_is_killed_and_goes_on_is_the_run_that_was_not(recipe_path: Path) -> None:
    console = SilentConsole()
    report = stand_in(recipe_path, console, kills=6)
    assert report.exit_code == 0 and (report.differences, report.leftovers) == ([], [])
    assert len(report.kills) + len(report.missed) == 6 and len(report.kills) >= 4
    assert len(console.warned) == len(report.missed)
    assert all(kill.processes >= 2 for kill in report.kills)  # the leader, and the worker in its own session
    assert {kill.where for kill in report.kills} == {"inside", "between"}
    starts = [event for event in Follower(Path(report.disturbed) / "events.jsonl").read() if event["what"] == "start"]
    assert len(starts) == len(report.kills) + 1
    assert report.undisturbed_s > 0.6 and report.disturbed_s > report.undisturbed_s
    assert json.loads(json.dumps(report.to_json()))["kills"][0]["stage"] in ("sample", "ppo")
    assert "The run that was killed is the run that was not, bit for bit." in shown(report)


@pytest.mark.engine
def test_the_undisturbed_run_is_used_again_only_for_the_same_recipe(recipe_path: Path, tmp_path: Path) -> None:
    console = SilentConsole()
    calm = Path(stand_in(recipe_path).undisturbed)
    began = (calm / "manifest.json").stat().st_mtime_ns
    stand_in(recipe_path, console, kills=0)
    assert console.said == [f"chaos: {calm} is used again"]
    assert (calm / "manifest.json").stat().st_mtime_ns == began
    run = Path(shutil.copytree(calm, tmp_path / "run"))
    assert is_complete(run, load_recipe(recipe_path))
    assert not is_complete(run, load_recipe(recipe_path, ["seed=1"]))
    assert not is_complete(run, load_recipe(recipe_path, ["stages=[sample, ppo, evaluate]"]))
    with (run / "events.jsonl").open("a") as file:
        file.write('{"what": "start"}\n')  # it was gone on with, so was disturbed
    assert not is_complete(run, load_recipe(recipe_path))
    assert not is_complete(run / "nowhere", load_recipe(recipe_path))


@pytest.mark.engine
def test_a_resume_that_forgets_is_found_out(recipe_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLAW", "forgets")
    report = stand_in(recipe_path)
    assert report.exit_code == 1
    assert any("ppo step 2: loss: 0.25 and 0.75, a difference of 0.5" in line for line in report.differences)
    assert "ppo step 2: loss" in shown(report) and "bit for bit" not in shown(report)


@pytest.mark.engine
def test_a_process_that_outlives_the_run_is_told_and_ended(recipe_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLAW", "leaves")
    monkeypatch.setattr("cluster.chaos.GRACE_S", 0.1)
    report = stand_in(recipe_path)
    assert report.exit_code == 1 and report.differences == []
    (line,) = report.leftovers
    assert "(sleep) is still there" in line
    pid = int(line.split()[1])
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.engine
def test_a_run_that_fails_by_itself_is_told_with_the_end_of_its_log(
    recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLAW", "fails")
    with pytest.raises(TenfoldError, match=r"ended with code 1:\nthe disk is full\n"):
        stand_in(recipe_path, folder=tmp_path)


@pytest.mark.engine
def test_a_run_that_hangs_is_ended_and_told(recipe_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLAW", "hangs")
    monkeypatch.setattr("cluster.chaos.PATIENCE_S", 1.0)
    monkeypatch.setattr("cluster.chaos.PATIENCE", 2.0)
    with pytest.raises(TenfoldError, match=r"The run hangs; its last event is {.*'start'"):
        stand_in(recipe_path)


@pytest.mark.engine
def test_a_moment_that_the_run_is_beyond_is_taken_at_the_next_step_or_missed(recipe_path: Path, tmp_path: Path) -> None:
    folder, run = tmp_path / "runs", tmp_path / "runs" / "tiny"
    processes = _Processes(run, tmp_path / "log", limit_s=60)
    first = processes.start(
        [*COMMAND, "run", str(recipe_path), f"runs={folder}"], [Moment("ppo", 1, "update", "between", 0.0, 1.0)]
    )
    assert first is not None and (first.step, first.where, first.planned) == (1, "between", "step 1, between")
    beyond = [Moment("ppo", 0, "generate", "between", 0.0, 0.5)]
    second = processes.start([*COMMAND, "resume", str(run)], beyond)
    assert second is not None and second.step in (1, 2) and second.planned == "step 0, between" and beyond == []
    missed = [Moment("sample", 0, "generate", "between", 0.0, 0.1)]
    assert processes.start([*COMMAND, "resume", str(run)], missed) is None
    assert len(missed) == 1


@pytest.mark.engine
def test_a_phase_that_ends_before_the_moment_inside_it_is_struck_at_its_end(recipe_path: Path, tmp_path: Path) -> None:
    processes = _Processes(tmp_path / "tiny", tmp_path / "log", limit_s=60)
    began = time.monotonic()
    kill = processes.start(
        [*COMMAND, "run", str(recipe_path), f"runs={tmp_path}"], [Moment("ppo", 0, "update", "inside", 300.0, 301.0)]
    )
    assert kill is not None and (kill.step, kill.phase, kill.where) == (0, "update", "between")
    assert kill.planned == "step 0, inside"
    assert time.monotonic() - began < 60


@pytest.mark.ray
@pytest.mark.vllm
@pytest.mark.timeout(420)
def test_tenfold_itself_is_the_same_after_a_kill(tiny_model: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(
        tiny_model,
        tmp_path,
        stages=["sample", "rank", "reward", "ppo"],
        ppo={"num_steps": 3, "save_every": 2, "score": "reward"},
        tracker={"mode": "offline"},
    )
    path = tmp_path / "tiny.yaml"
    path.write_text(dump_recipe(recipe))
    report = chaos(path, kills=1, seed=0, folder=tmp_path / "chaos", console=LineConsole())
    assert len(report.kills) == 1 and report.missed == []
    assert report.differences == []
    assert report.leftovers == []
