"""Metrics reach metrics.jsonl and an offline W&B run, which goes on after a restart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.run import places
from cluster.tracker import TrackerError, WandbTracker, choose_mode, sync_command
from configs.load import make_recipe
from configs.schema import Recipe, TrackerConfig
from rlhf.store import RunStore
from tests.cluster.wandb_log import history, records
from tests.fakes import SilentConsole

OFFLINE = {"WANDB_MODE": "offline"}


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    tree = {
        "name": "tracked",
        "runs": str(tmp_path),
        "model": {"path": "model"},
        "data": {"prompts": "prompts.jsonl"},
        "rules": [{"name": "short"}],
    }
    return make_recipe(tree, "test")


def test_the_upload_takes_segments_that_began_in_one_second(tmp_path: Path) -> None:
    names = ["offline-run-20261124_100821-8344a55e73ee", "offline-run-20261124_100821-8344a55e73ee-1"]
    for name in [*names, "offline-run-20261124_100820-0000a55e73ee"]:
        (tmp_path / "wandb" / name).mkdir(parents=True)
    pattern = places(tmp_path).sync.split("/")[-1]
    assert sorted(path.name for path in tmp_path.glob(f"wandb/{pattern}")) == names


@pytest.mark.timeout(120)
def test_a_run_read_back_holds_the_metrics_and_the_table_of_both_starts(recipe: Recipe, tmp_path: Path) -> None:
    columns = ["step", "prompt", "answer"]
    with RunStore.open(tmp_path, recipe) as store:
        tracker = WandbTracker(recipe, store, SilentConsole(), OFFLINE)
        tracker.log("reward", 1, {"reward/loss": 0.75})
        tracker.log("ppo", 1, {"objective/kl": 0.5, "loss/policy_avg": -0.125})
        tracker.table("ppo", 1, "completions", columns, [[1, "why?", "because"]])
        tracker.close()
        run_id = store.wandb_run_id
    with RunStore.open(tmp_path, recipe) as store:
        tracker = WandbTracker(recipe, store, SilentConsole(), OFFLINE)
        tracker.log("ppo", 2, {"objective/kl": 0.25})
        tracker.close()
        assert store.wandb_run_id == run_id
        assert store.metrics("ppo")[1] == {"step": 2, "objective/kl": 0.25}

    folder = tmp_path / "tracked"
    rows = history(folder)
    assert [(row["_step"], row["step"]) for row in rows] == [(1, 1), (2, 1), (3, 2)]
    assert rows[0]["reward/loss"] == 0.75
    assert (rows[1]["objective/kl"], rows[1]["loss/policy_avg"]) == (0.5, -0.125)
    assert rows[2]["objective/kl"] == 0.25
    segments = sorted(folder.glob("wandb/offline-run-*"))
    assert len(segments) == 2
    assert all(segment.match(sync_command(folder, str(run_id)).split("/")[-1]) for segment in segments)
    table = json.loads((segments[0] / "files" / str(rows[1]["completions/path"])).read_text())
    assert table == {"columns": columns, "data": [[1, "why?", "because"]]}
    runs = [r.run for r in records(next(segments[0].glob("*.wandb"))) if r.WhichOneof("record_type") == "run"]
    config = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert config["sampling"] == recipe.model_dump(mode="json")["sampling"]


@pytest.mark.timeout(60)
def test_an_offline_run_says_how_to_upload_it(recipe: Recipe, tmp_path: Path) -> None:
    console = SilentConsole()
    with RunStore.open(tmp_path, recipe) as store:
        tracker = WandbTracker(recipe, store, console, {})
        tracker.close()
        assert [said for said in console.said if "wandb sync" in said and str(store.wandb_run_id) in said]
        assert len(console.said) == 1


def test_a_disabled_tracker_still_writes_the_store(recipe: Recipe, tmp_path: Path) -> None:
    with RunStore.open(tmp_path, recipe) as store:
        tracker = WandbTracker(recipe, store, SilentConsole(), {"WANDB_MODE": "disabled"})
        tracker.log("ppo", 1, {"objective/kl": 0.5})
        tracker.table("ppo", 1, "completions", ["a"], [[1]])
        tracker.close()
        assert store.metrics("ppo") == [{"step": 1, "objective/kl": 0.5}]
        assert store.wandb_run_id is None
        assert (tracker.place, tracker.sync_command) == ("", "")


@pytest.mark.parametrize(
    ("asked", "environ", "mode"),
    [
        ("auto", {}, "offline"),
        ("auto", {"WANDB_API_KEY": "k"}, "online"),
        ("auto", {"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, "offline"),
        ("auto", {"WANDB_MODE": "disabled"}, "disabled"),
        ("offline", {"WANDB_API_KEY": "k", "WANDB_MODE": "online"}, "offline"),
        ("online", {"WANDB_API_KEY": "k"}, "online"),
        ("disabled", {"WANDB_API_KEY": "k"}, "disabled"),
    ],
)
def test_the_mode_is_the_recipes_then_the_environments_then_by_the_key(asked, environ, mode) -> None:
    assert choose_mode(TrackerConfig(mode=asked), environ) == mode


def test_online_without_a_key_is_refused_with_the_remedy() -> None:
    with pytest.raises(TrackerError, match=r"WANDB_API_KEY is not set.*offline"):
        choose_mode(TrackerConfig(mode="online"), {})


def test_an_unknown_mode_in_the_environment_is_refused() -> None:
    with pytest.raises(TrackerError, match="WANDB_MODE=sometimes"):
        choose_mode(TrackerConfig(), {"WANDB_MODE": "sometimes"})
