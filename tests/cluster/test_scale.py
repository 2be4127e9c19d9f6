"""`tenfold scale`: what it asks, what it refuses, and what it does with a run that does not run."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from cluster.cli import app
from cluster.scale import answer_to, ask, parse, pending, withdraw
from configs.load import load_recipe
from configs.schema import Recipe
from rlhf.errors import PlacementError
from rlhf.store import RunStore
from tests.recipes import tiny_recipe


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return tiny_recipe("model", tmp_path, cluster={"workers": {"trainer": 2}})


@pytest.fixture
def folder(recipe: Recipe) -> Path:
    """A run that was begun, and does not run."""
    with RunStore.open(recipe.runs, recipe) as store:
        return store.folder


def scale(*words: object) -> Result:
    return CliRunner().invoke(app, ["scale", *map(str, words)])


def told(result: Result) -> str:
    return " ".join(result.output.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "No size was given. Give --gpus N, or --workers N"),
        (["--gpus", "4", "--workers", "2"], "scaled to one size"),
        (["--gpus", "0", "--workers", "2"], "scaled to one size"),
        (["--gpus", "0"], "--gpus 0 is no size of a run"),
        (["--gpus", "100000000000"], "Numbers are 1 to 4096"),
        (["--workers", "100000000000"], "Numbers are 1 to 4096"),
        (["--workers", "trainer=1,generator=1,trainer=3"], "gives trainer two sizes"),
        (["--workers", "none"], "--workers none is no size of a run"),
        (["--workers", "0"], "--workers 0 is no size"),
        (["--workers", "trainer=two"], "--workers trainer=two is no size"),
        (["--workers", "driver=2"], "--workers driver=2 is no size"),
        (["--workers", "critic=2"], "cluster.workers.critic=2 with cluster.placement=shared: there is no such group"),
    ],
)
def test_a_size_that_is_none_is_refused_and_changes_nothing(folder: Path, words: list[str], message: str) -> None:
    before = (folder / "recipe.yaml").read_bytes()
    result = scale(folder, *words)
    assert result.exit_code == 2 and message in told(result) and "Traceback" not in result.output
    assert (folder / "recipe.yaml").read_bytes() == before and pending(folder) is None


def test_a_run_that_is_not_there_is_told(tmp_path: Path) -> None:
    result = scale(tmp_path / "none", "--workers", "2")
    assert result.exit_code == 2 and "There is no run" in told(result)


def test_a_run_that_does_not_run_has_the_new_size_when_it_is_resumed(folder: Path) -> None:
    (folder / "journal").mkdir(exist_ok=True)
    (folder / "journal" / "ppo.jsonl").write_text('{"step": 0, "phase": "score", "result": {}}\n')
    before = load_recipe(folder / "recipe.yaml")
    result = scale(folder, "--workers", "trainer=1,generator=3", "--json")
    assert result.exit_code == 0
    done = json.loads(result.stdout)
    assert done == {"run": str(folder), "answer": "at_rest", "gpus": "auto", "workers": {"trainer": 1, "generator": 3}}
    after = load_recipe(folder / "recipe.yaml")
    assert after.cluster.workers == {"trainer": 1, "generator": 3}
    assert after.model_copy(update={"cluster": before.cluster}) == before  # all else stays
    assert (folder / "journal" / "ppo.jsonl").read_text()  # answers that were finished are still of use
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_bytes())
    assert any("cluster.workers" in line for line in manifest["accepted"][0]["differences"])


def test_gpus_are_set_for_a_run_that_does_not_run(folder: Path) -> None:
    assert scale(folder, "--gpus", "4").exit_code == 0
    cluster = load_recipe(folder / "recipe.yaml").cluster
    assert (cluster.gpus, cluster.workers) == (4, {"trainer": 4})


def test_a_run_that_is_done_is_not_said_to_go_on(recipe: Recipe, folder: Path) -> None:
    with RunStore.open(recipe.runs, recipe) as store:
        for stage in recipe.stages:
            store.finish(stage, {})
    result = scale(folder, "--workers", "3")
    assert result.exit_code == 0 and "the run is done" in told(result) and "resume" not in told(result)
    assert load_recipe(folder / "recipe.yaml").cluster.workers["trainer"] == 3


def test_a_question_whose_asker_is_terminated_is_taken_back(recipe: Recipe, folder: Path) -> None:
    def ends() -> None:
        while pending(folder) is None:
            threading.Event().wait(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    with RunStore.open(recipe.runs, recipe):
        thread = threading.Thread(target=ends)
        thread.start()
        result = scale(folder, "--workers", "1")
        thread.join()
    assert result.exit_code == 143 and pending(folder) is None


def test_a_run_that_runs_is_asked_and_not_touched(recipe: Recipe, folder: Path) -> None:
    before = (folder / "recipe.yaml").read_bytes()
    with RunStore.open(recipe.runs, recipe):
        result = scale(folder, "--workers", "1", "--detach")
        assert result.exit_code == 0 and "asked: the run takes it at its next step" in told(result)
        request = pending(folder)
        assert request is not None and request.size.workers == 1
    assert (folder / "recipe.yaml").read_bytes() == before


@pytest.mark.parametrize(("answer", "code"), [("taken", 0), ("refused", 2)])
def test_who_asked_hears_the_answer(recipe: Recipe, folder: Path, answer: str, code: int) -> None:
    asked = threading.Event()

    def controller(store: RunStore) -> None:
        while (request := pending(folder)) is None:
            asked.wait(0.01)
        store.events.add("scale", id=request.id, answer=answer, why="4 GPUs are missing." if code else "")
        withdraw(folder, request)

    with RunStore.open(recipe.runs, recipe) as store:
        thread = threading.Thread(target=controller, args=(store,))
        thread.start()
        result = scale(folder, "--workers", "1")
        thread.join()
    assert result.exit_code == code
    assert ("4 GPUs are missing." if code else "goes on in the new size") in told(result)


def test_a_run_that_ends_before_it_answers_is_changed_at_rest(recipe: Recipe, folder: Path) -> None:
    store = RunStore.open(recipe.runs, recipe)

    def ends() -> None:
        while pending(folder) is None:
            threading.Event().wait(0.01)
        store.close()

    thread = threading.Thread(target=ends)
    thread.start()
    result = scale(folder, "--workers", "trainer=3")
    thread.join()
    assert result.exit_code == 0 and pending(folder) is None
    assert load_recipe(folder / "recipe.yaml").cluster.workers == {"trainer": 3}


def test_a_newer_request_takes_the_place_of_one_that_was_not_answered(folder: Path) -> None:
    first, second = parse(8, None), parse(None, "2")
    ask(folder, first)
    ask(folder, second)
    found = pending(folder)
    assert found == second and answer_to(first, folder) is None
    assert not withdraw(folder, first) and withdraw(folder, second) and pending(folder) is None


def test_one_of_gpus_and_workers_is_a_request() -> None:
    assert parse(8, None).size.gpus == 8
    assert parse(None, "policy=2,critic=1").size.by_group == {"policy": 2, "critic": 1}
    with pytest.raises(PlacementError, match="No size was given"):
        parse(None, None)
