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
from rlhf.errors import DataError, StoreError, TenfoldError
from rlhf.records import Answer, Prompt
from rlhf.store import RunStore
from tests.fakes import FakeTeam
from tests.recipes import tiny_recipe, write_prompts
from tests.rlhf.runs import flip_a_byte


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

    def begin(self, done: int) -> None: ...


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
    assert stages == recipe.stages
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
    with pytest.raises(StoreError, match=r"(?s)model\.base: \w+ -> \w+ .*copy holds another.*--accept model\.base"):
        go(moved)
    go(moved, accept=("model.base",), only=("reward",))
    go(moved, only=("reward",))


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
        "half": "stopped",
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


def with_ppo(recipe: Recipe, **changes: Any) -> Recipe:
    return recipe.model_copy(update={"ppo": recipe.ppo.model_copy(update=changes)})


def test_a_mistake_that_stopped_a_run_at_its_start_can_be_mended(recipe: Recipe, tmp_path: Path) -> None:
    prompts = tmp_path / "later.jsonl"
    data = recipe.data.model_copy(update={"prompts": str(prompts)})
    first = with_ppo(recipe.model_copy(update={"data": data}), num_prompts=50)
    with pytest.raises(DataError, match="matches no file"):
        go(first)
    write_prompts(prompts, 20)
    with pytest.raises(DataError, match=r"ppo\.num_prompts=50: the train split has"):
        go(first)
    write_prompts(prompts, 90)
    assert "evaluate" in go(first)  # more prompts, as the message said
    other = with_ppo(recipe, num_prompts=50).model_copy(update={"name": "other"})
    with pytest.raises(DataError, match=r"ppo\.num_prompts=50"):
        go(other)
    assert "evaluate" in go(with_ppo(other, num_prompts=2))  # a lower number, as the message said


def test_a_change_that_cannot_work_leaves_the_run_as_it_was(recipe: Recipe) -> None:
    go(recipe, only=("sample",))
    folder = Path(recipe.runs) / "tiny"
    before = (folder / "recipe.yaml").read_bytes()
    with pytest.raises(DataError, match=r"ppo\.num_prompts=999"):
        go(with_ppo(recipe, num_prompts=999), accept=("ppo.num_prompts",))
    with pytest.raises(TenfoldError, match=r"model\.path=/nowhere"):
        go(recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": "/nowhere"})}))
    assert (folder / "recipe.yaml").read_bytes() == before
    assert "ppo" in go(recipe)


def test_a_policy_that_is_trained_further_is_evaluated_again(recipe: Recipe) -> None:
    go(recipe)
    longer = with_ppo(recipe, num_steps=4)
    go(longer, accept=("ppo.num_steps",), only=("evaluate",))
    manifest = Path(recipe.runs) / "tiny" / "manifest.json"
    first = json.loads(manifest.read_text())["stages"]["evaluate"]
    assert go(longer)["ppo"]["num_steps"] == 4
    assert json.loads(manifest.read_text())["stages"]["evaluate"] != first


def test_a_result_that_was_damaged_is_made_again_to_the_same_end(recipe: Recipe) -> None:
    results = go(recipe)
    folder = Path(recipe.runs) / "tiny" / "roles"
    wanted = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    flip_a_byte(folder / "reward" / "role.safetensors")
    shutil.rmtree(folder / "policy")
    again = go(recipe)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == wanted
    assert again["evaluate"]["win_rate"] == results["evaluate"]["win_rate"]


def test_a_run_of_which_one_stage_was_asked_is_not_done_and_goes_on_with_the_rest(recipe: Recipe) -> None:
    go(recipe, only=("sample",))
    (row,) = list_runs(Path(recipe.runs))
    assert (row["state"], row["stage"]) == ("stopped", "rank")
    again, stages = load_run(Path(recipe.runs) / "tiny")
    assert stages == recipe.stages
    assert load_run(Path(recipe.runs) / "tiny", ["stages=[sample, rank]"])[1] == ("sample", "rank")
    go(again, only=stages)


def test_a_folder_of_any_name_goes_on_and_its_recipe_stays_valid(recipe: Recipe) -> None:
    go(recipe, only=("sample",))
    odd = shutil.move(Path(recipe.runs) / "tiny", Path(recipe.runs) / "my run")
    again, stages = load_run(Path(odd))
    go(with_ppo(again, save_every=2), only=stages)
    assert load_run(Path(odd))[0].ppo.save_every == 2


def mirrored(recipe: Recipe, folder: Path) -> Recipe:
    return recipe.model_copy(update={"checkpoints": CheckpointsConfig(mirror=str(folder))})


def test_a_mirror_that_is_ahead_is_not_overwritten_by_an_old_folder(recipe: Recipe, tmp_path: Path) -> None:
    here = mirrored(recipe, tmp_path / "mirror")
    go(here, only=("sample",))
    there = load_run(find_run(str(tmp_path / "mirror" / "tiny"), tmp_path / "there", Silent()))[0]  # type: ignore[arg-type]
    go(there)
    ahead = (tmp_path / "mirror" / "tiny" / "manifest.json").read_bytes()
    with pytest.raises(StoreError, match=r"holds a later state of this run than .*Move this folder away"):
        go(here)
    assert (tmp_path / "mirror" / "tiny" / "manifest.json").read_bytes() == ahead
    go(here.model_copy(update={"checkpoints": CheckpointsConfig()}), only=("rank",))


def test_a_checkpoint_that_is_lost_here_comes_back_from_the_mirror(recipe: Recipe, tmp_path: Path) -> None:
    here = mirrored(with_ppo(recipe, num_steps=4), tmp_path / "mirror")
    expected = go(here)
    folder = Path(recipe.runs) / "tiny"
    shutil.rmtree(folder / "checkpoints" / "ppo" / "step-4")
    shutil.rmtree(folder / "roles" / "policy")
    console = Silent()
    found = run(here, console, make_team=fake_team).results  # type: ignore[arg-type]
    assert "checkpoints/ppo/step-4 was lost or damaged here; it came back from the mirror." in console.said
    assert "ppo: going on from the checkpoint of step 4" in console.said
    assert found["evaluate"]["win_rate"] == expected["evaluate"]["win_rate"]
    assert (tmp_path / "mirror" / "tiny" / "checkpoints" / "ppo" / "step-4").is_dir()


def test_another_run_in_the_place_of_a_mirrors_is_told(recipe: Recipe, tmp_path: Path) -> None:
    go(mirrored(recipe, tmp_path / "mirror"), only=("sample",))
    go(recipe.model_copy(update={"runs": str(tmp_path / "fresh")}), only=("sample",))
    with pytest.raises(StoreError, match="holds another run than"):
        find_run(str(tmp_path / "mirror" / "tiny"), tmp_path / "fresh", Silent())  # type: ignore[arg-type]
    with pytest.raises(StoreError, match=r"holds another run of this name.*tenfold resume"):
        go(mirrored(recipe.model_copy(update={"runs": str(tmp_path / "fresh")}), tmp_path / "mirror"))
