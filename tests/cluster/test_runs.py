"""Runs found by name, listed with their state, and gone on with from their folder alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console as RichConsole

from cluster.run import run
from cluster.runs import find_run, list_runs, load_run, table
from configs.schema import CheckpointsConfig, Recipe
from rlhf.errors import StoreError
from rlhf.records import Answer, Prompt
from rlhf.store import RunStore
from tests.fakes import FakeTeam
from tests.recipes import tiny_recipe, write_prompts


def first_token(prompt: Prompt, answer: Answer) -> float:
    """A rule that seldom ties."""
    return answer.token_ids[0] / 300


class Silent:
    """A console that keeps what was said, with the methods that the controller uses."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    warn = say

    @contextmanager
    def task(self, name: str, total: int | None = None, unit: str = "") -> Iterator[Silent]:
        yield self

    def advance(self, num: int = 1, note: str = "") -> None: ...


@contextmanager
def fake_team(recipe: Recipe, console: object) -> Iterator[Any]:
    yield FakeTeam()


@pytest.fixture
def recipe(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.setattr("tests.fakes.VOCABULARY", 300)  # as many as the real tokenizer's, whose prompts are used
    rules = [{"name": f"{__name__}.first_token"}]
    return tiny_recipe(
        tiny_model, tmp_path, rules=rules, tracker={"mode": "disabled"}, sampling={"n": 4, "max_answer_tokens": 2}
    )


def go(recipe: Recipe, **options: Any) -> dict[str, dict[str, object]]:
    return run(recipe, Silent(), make_team=fake_team, **options).results  # type: ignore[arg-type]


def test_a_run_goes_on_from_its_folder_alone(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go(recipe, only=("sample", "rank"))
    Path(str(recipe.data.prompts)).unlink()  # the prompts are in the run folder
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.move(Path(recipe.runs) / "tiny", elsewhere / "moved")
    monkeypatch.chdir(elsewhere)
    again, stages = load_run(find_run("moved", Path()))
    assert stages == ("sample", "rank")
    assert (again.runs, again.name) == (str(elsewhere), "moved")
    assert tuple(go(again)) == recipe.stages


def test_paths_in_the_run_folder_mean_the_same_from_everywhere(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    relative = recipe.model_copy(
        update={"runs": "runs", "data": recipe.data.model_copy(update={"prompts": "prompts.jsonl"})}
    )
    go(relative, only=("sample",))
    monkeypatch.chdir("/")
    assert load_run(tmp_path / "runs" / "tiny")[0].data.prompts == str(tmp_path / "prompts.jsonl")
    monkeypatch.chdir(tmp_path)
    go(relative, only=("rank",))


def test_prompts_that_change_beside_the_run_do_not_change_it(recipe: Recipe) -> None:
    before = go(recipe, only=("sample",))
    write_prompts(Path(str(recipe.data.prompts)), 5)
    assert go(recipe)["sample"] == before["sample"]


def test_prompts_that_were_altered_in_the_run_folder_are_refused(recipe: Recipe) -> None:
    go(recipe, only=("sample",))
    path = Path(recipe.runs) / "tiny" / "prompts.jsonl"
    path.write_text(path.read_text().replace("Say sun", "Say son"))
    with pytest.raises(StoreError, match=r"prompts\.jsonl was altered: its checksum differs"):
        go(recipe)


def test_another_base_is_refused_and_the_same_one_at_another_place_is_not(
    recipe: Recipe, tiny_model: Path, tmp_path: Path
) -> None:
    go(recipe, only=("sample",))
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    moved = recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": str(copy)})})
    go(moved, only=("rank",))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rope_theta": 5}))
    with pytest.raises(StoreError, match=r"is not the one that the run .* fingerprint was .*--accept model\.path"):
        go(moved)
    go(moved, accept=("model.path",), only=("rank",))
    go(moved, only=("rank",))


def test_a_difference_is_refused_or_accepted_by_name_or_section(recipe: Recipe) -> None:
    go(recipe, only=("sample",))
    changed = recipe.model_copy(update={"ppo": recipe.ppo.model_copy(update={"num_steps": 3, "gamma": 0.5})})
    with pytest.raises(StoreError, match=r"--accept ppo\.gamma`") as caught:
        go(changed, accept=("ppo.num_steps",))
    assert "ppo.gamma: 1.0 -> 0.5" in str(caught.value) and "ppo.num_steps" not in str(caught.value)
    go(changed, accept=("ppo",), only=("rank",))
    go(changed, only=("rank",))
    manifest = json.loads((Path(recipe.runs) / "tiny" / "manifest.json").read_text())
    assert [entry["differences"] for entry in manifest["accepted"]] == [
        ["ppo.num_steps: 2 -> 3", "ppo.gamma: 1.0 -> 0.5"]
    ]


def test_what_a_run_is_made_of_cannot_be_accepted(recipe: Recipe) -> None:
    go(recipe, only=("sample",))
    with pytest.raises(StoreError, match=r"(?s)seed: 0 -> 1.*seed cannot change within a run\..*another name"):
        go(recipe.model_copy(update={"seed": 1}), accept=("seed",))


def test_a_ppo_that_was_done_goes_on_where_more_steps_are_accepted(recipe: Recipe) -> None:
    go(recipe)
    longer = recipe.model_copy(update={"ppo": recipe.ppo.model_copy(update={"num_steps": 4})})
    results = go(longer, accept=("ppo.num_steps",))
    assert results["ppo"]["num_steps"] == 4 and "evaluate" in results


def test_runs_are_listed_with_stage_step_checkpoint_and_state(recipe: Recipe) -> None:
    runs = Path(recipe.runs)
    assert list_runs(runs) == []
    go(recipe)
    go(recipe.model_copy(update={"name": "half"}), only=("sample",))
    with pytest.raises(KeyboardInterrupt), RunStore.open(runs, recipe.model_copy(update={"name": "stopped"})):
        raise KeyboardInterrupt
    with RunStore.open(runs, recipe.model_copy(update={"name": "held"})):
        states = {Path(str(row["run"])).name: row for row in list_runs(runs)}
    assert {name: row["state"] for name, row in states.items()} == {
        "tiny": "done",
        "half": "done",
        "stopped": "stopped",
        "held": "running",
    }
    assert states["tiny"]["checkpoint"] == "ppo 2"
    assert states["stopped"]["stage"] == "sample"
    screen = RichConsole(width=200, file=StringIO())
    screen.print(table(list_runs(runs)))
    shown = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "ppo 2" in shown and "KeyboardInterrupt" in shown


def test_a_run_that_was_killed_says_so_and_how_to_go_on(recipe: Recipe) -> None:
    go(recipe, only=("sample",))
    path = Path(recipe.runs) / "tiny" / "manifest.json"
    manifest = json.loads(path.read_text())
    session = manifest["session"] | {"ended": None, "how": "running", "stages": list(recipe.stages)}
    path.write_text(json.dumps(manifest | {"session": session}))
    (row,) = list_runs(Path(recipe.runs))
    assert (row["state"], row["stage"]) == ("killed", "rank")
    assert "tenfold resume" in str(row["why"])


def test_an_unreadable_run_is_listed_too(recipe: Recipe) -> None:
    folder = Path(recipe.runs) / "broken"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{")
    (row,) = list_runs(Path(recipe.runs))
    assert row["state"] == "unreadable"


def test_a_name_that_is_not_there_is_told_with_those_that_are(recipe: Recipe) -> None:
    go(recipe, only=("sample",))
    with pytest.raises(StoreError, match=r"no run nothing.*tiny"):
        find_run("nothing", Path(recipe.runs))


@pytest.mark.engine
def test_a_run_goes_on_from_its_mirror_in_an_object_store_alone(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bucket: str
) -> None:
    mirrored = recipe.model_copy(update={"checkpoints": CheckpointsConfig(mirror=bucket)})
    whole = recipe.model_copy(update={"name": "whole"})
    expected = go(whole)
    log = RunStore.log

    def stops(self: RunStore, stage: str, step: int, metrics: Any) -> None:
        log(self, stage, step, metrics)
        if (stage, step) == ("ppo", 2):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunStore, "log", stops)
        with pytest.raises(KeyboardInterrupt):
            go(mirrored)
    shutil.rmtree(recipe.runs)
    console = Silent()
    folder = find_run(f"{bucket}/tiny", tmp_path / "elsewhere", console)  # type: ignore[arg-type]
    again, stages = load_run(folder)
    found = go(again, only=stages)
    for stage in ("sample", "rank", "reward"):
        assert {**found[stage], "time_s": 0, "peak_memory_gib": 0, "tokens_per_s": 0} == {
            **expected[stage],
            "time_s": 0,
            "peak_memory_gib": 0,
            "tokens_per_s": 0,
        }
    assert found["ppo"]["num_steps"] == 2
    assert found["evaluate"]["win_rate"] == expected["evaluate"]["win_rate"]
