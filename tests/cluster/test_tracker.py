"""Metrics reach metrics.jsonl and an offline W&B run, which goes on after a restart."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster import segments
from cluster.run import places
from cluster.tracker import TrackerError, WandbTracker, choose_mode, sync_command
from configs.load import dump_recipe, make_recipe
from configs.schema import Recipe, TrackerConfig
from rlhf.store import RunStore
from tests.cluster.wandb_log import Server, history, logs, lose_rows, records, steps, tables, wandb_server
from tests.fakes import SilentConsole

pytestmark = pytest.mark.engine
OFFLINE = {"WANDB_MODE": "offline"}
ROOT = Path(__file__).parents[2]
COLUMNS = ["answer"]
# Logs the rows of ppo from argv[3] to argv[4]. With `kill` it dies when a block of W&B's log is on the disk: W&B writes
# in blocks, so that the rows after it are lost.
SCRIPT = """
import os, signal, sys, time
import psutil
from pathlib import Path
from cluster.tracker import WandbTracker
from configs.load import load_recipe
from rlhf.store import RunStore
from tests.fakes import SilentConsole

recipe, root, first, last, end = load_recipe(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:5]), sys.argv[5]
with RunStore.open(root, recipe) as store:
    console = SilentConsole()
    tracker = WandbTracker(recipe, store, console)
    store.cut_metrics("ppo", first - 1)
    if end == "lose service":  # as when Ray stops a job: SIGTERM to all its processes
        services = psutil.Process().children(recursive=True)
        for service in services:
            service.send_signal(signal.SIGTERM)
        assert services and not psutil.wait_procs(services, timeout=20)[1]
    for step in range(first, last + 1):
        tracker.log("ppo", step, {f"objective/{number}": step + number / 100 for number in range(20)})
    if end == "kill":
        while not any(path.stat().st_size >= 2**15 for path in store.folder.glob("wandb/*run-2*/*.wandb")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    tracker.close()
    assert sum("W&B's service has ended" in line for line in console.warned) == int(end == "lose service")
"""


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


@contextmanager
def started(recipe: Recipe, root: Path) -> Iterator[tuple[RunStore, WandbTracker]]:
    """A run store and its tracker, kept offline."""
    with RunStore.open(root, recipe) as store:
        tracker = WandbTracker(recipe, store, SilentConsole(), OFFLINE)
        yield store, tracker
        tracker.close()


def log(tracker: WandbTracker, step: int, value: float) -> None:
    tracker.log("ppo", step, {"objective/kl": value})
    tracker.table("ppo", step, "completions", COLUMNS, [[f"{step}: {value}"]])


def process(recipe: Recipe, root: Path, first: int, last: int, end: str, **environ: str) -> None:
    """Runs SCRIPT in a process of its own."""
    (root / "recipe.yaml").write_text(dump_recipe(recipe))
    command = [sys.executable, "-c", SCRIPT, root / "recipe.yaml", root, str(first), str(last), end]
    plain = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    done = subprocess.run(command, cwd=ROOT, env=plain | environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == (-signal.SIGKILL if end == "kill" else 0), done.stderr


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


def test_after_a_kill_every_row_stands_once_and_can_be_uploaded(recipe: Recipe, tmp_path: Path) -> None:
    process(recipe, tmp_path, 1, 32, "kill", **OFFLINE)
    (killed,) = logs(tmp_path / "tracked")
    survived = steps(killed)
    assert survived == list(range(1, len(survived) + 1))
    assert 10 < len(survived) < 32  # the last one stays open for its table
    lose_rows(killed, 10, torn_bytes=9)  # how much a kill loses is chance; this much each time
    process(recipe, tmp_path, 29, 34, "close", **OFFLINE)

    rows = history(tmp_path / "tracked")
    assert [(row["_step"], row["step"]) for row in rows] == [(step, step) for step in range(1, 35)]
    assert [row["objective/19"] for row in rows] == [step + 19 / 100 for step in range(1, 35)]
    with wandb_server() as server:
        assert "Finished" in upload(server, tmp_path)
        assert server.steps == list(range(1, 35))
        assert "No runs to sync" in upload(server, tmp_path)
        assert server.steps == list(range(1, 35))


def test_after_a_kill_an_online_run_gets_the_rows_that_it_lost(recipe: Recipe, tmp_path: Path) -> None:
    with wandb_server() as server:
        process(recipe, tmp_path, 1, 32, "kill", **server.environ)
        assert len(server.steps) < 32
        process(recipe, tmp_path, 29, 34, "close", **server.environ)
        assert server.steps == list(range(1, 35))


def upload(server: Server, root: Path) -> str:
    """What the command says that the user is told, as a shell runs it."""
    run_id = json.loads((root / "tracked" / "manifest.json").read_bytes())["wandb_run_id"]
    command = sync_command(root / "tracked", run_id)
    environ = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": str(root), **server.environ}
    done = subprocess.run(["sh", "-c", command], cwd=root, env=environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "ERROR" not in done.stderr, done.stderr
    return done.stderr


def test_over_three_segments_a_row_that_is_written_again_keeps_its_first_values_and_table(
    recipe: Recipe, tmp_path: Path
) -> None:
    with started(recipe, tmp_path) as (store, tracker):
        tracker.log("reward", 1, {"reward/loss": 0.75})
        for step in (1, 2, 3):
            log(tracker, step, 0.5)
    for checkpoint, last, value in [(1, 4, 0.25), (3, 5, 0.125)]:
        with started(recipe, tmp_path) as (store, tracker):
            store.cut_metrics("ppo", checkpoint)
            for step in range(checkpoint + 1, last + 1):
                log(tracker, step, value)
    with RunStore.open(tmp_path, recipe) as store:
        assert [row["objective/kl"] for row in store.metrics("ppo")] == [0.5, 0.25, 0.25, 0.125, 0.125]
    rows = history(tmp_path / "tracked")
    assert [(row["_step"], row["step"]) for row in rows] == [(1, 1), (2, 1), (3, 2), (4, 3), (5, 4), (6, 5)]
    assert [row["objective/kl"] for row in rows[1:]] == [0.5, 0.5, 0.5, 0.25, 0.125]
    assert tables(tmp_path / "tracked") == {2: "1: 0.5", 3: "2: 0.5", 4: "3: 0.5", 5: "4: 0.25", 6: "5: 0.125"}
    assert len(logs(tmp_path / "tracked")) == 3
    runs = [
        r.run.run_id
        for path in logs(tmp_path / "tracked")
        for r in records(path)
        if r.WhichOneof("record_type") == "run"
    ]
    assert set(runs) == {store.wandb_run_id}


def test_lost_rows_before_the_checkpoint_are_logged_before_the_next(recipe: Recipe, tmp_path: Path) -> None:
    with started(recipe, tmp_path) as (store, tracker):
        for step in range(1, 7):
            log(tracker, step, float("nan") if step == 4 else step / 8)
    (killed,) = logs(tmp_path / "tracked")
    lose_rows(killed, 2, torn_bytes=9)
    with started(recipe, tmp_path) as (store, tracker):
        store.cut_metrics("ppo", 4)
        for step in (5, 6, 7):
            log(tracker, step, step / 4)
    assert max(end for end, _ in segments.records(killed.read_bytes())) == killed.stat().st_size
    rows = history(tmp_path / "tracked")
    assert [(row["_step"], row["step"]) for row in rows] == [(n, n) for n in range(1, 8)]
    values = [row["objective/kl"] for row in rows]
    assert str(values.pop(3)).lower() == "nan"
    assert values == [0.125, 0.25, 0.375, 1.25, 1.5, 1.75]
    assert list(tables(tmp_path / "tracked")) == [1, 2, 5, 6, 7]  # metrics.jsonl has none
    assert (rows[2]["stage"], rows[2]["step"]) == ("ppo", 3)


def test_a_start_that_logs_nothing_still_logs_what_was_lost(recipe: Recipe, tmp_path: Path) -> None:
    with started(recipe, tmp_path) as (_, tracker):
        for step in (1, 2, 3, 4):
            log(tracker, step, 0.5)
    lose_rows(logs(tmp_path / "tracked")[0], 2)
    with started(recipe, tmp_path):
        pass
    assert steps(*logs(tmp_path / "tracked")) == [1, 2, 3, 4]


def test_a_gap_between_segments_is_filled_in_order(recipe: Recipe, tmp_path: Path) -> None:
    for first in (1, 3, 5):
        with started(recipe, tmp_path) as (store, tracker):
            for step in (first, first + 1):
                log(tracker, step, 0.5)
    shutil.rmtree(logs(tmp_path / "tracked")[1].parent)
    assert steps(*logs(tmp_path / "tracked")) == [1, 2, 5, 6]
    with started(recipe, tmp_path) as (store, tracker):
        store.cut_metrics("ppo", 3)
        for step in (4, 5, 6, 7):
            log(tracker, step, 0.5)
    assert sorted(steps(*logs(tmp_path / "tracked"))) == [1, 2, 3, 4, 5, 6, 7]
    (path,) = Path(tracker.place).glob("*.wandb")
    assert steps(path) == [3, 4, 7]
    assert sorted(tables(tmp_path / "tracked")) == [1, 2, 4, 5, 6, 7]


def test_a_row_that_a_stage_of_the_same_process_writes_again_stands_once(recipe: Recipe, tmp_path: Path) -> None:
    with started(recipe, tmp_path) as (store, tracker):
        for step in (1, 2, 3):
            log(tracker, step, 0.5)
        store.cut_metrics("ppo", 1)
        for step in (2, 3, 4):
            log(tracker, step, 0.25)
        tracker.table("ppo", 4, "others", COLUMNS, [["of the same row"]])
    rows = history(tmp_path / "tracked")
    assert [(row["_step"], row["objective/kl"]) for row in rows] == [(1, 0.5), (2, 0.5), (3, 0.5), (4, 0.25)]
    assert tables(tmp_path / "tracked") == {1: "1: 0.5", 2: "2: 0.5", 3: "3: 0.5", 4: "4: 0.25"}
    assert "others/path" in rows[3]


def test_a_new_row_stands_also_where_rows_before_it_were_cut_for_good(recipe: Recipe, tmp_path: Path) -> None:
    with started(recipe, tmp_path) as (_, tracker):
        for step in (1, 2):
            log(tracker, step, 0.5)
        tracker.log("evaluate", 2, {"evaluate/win_rate": 0.5})
    with started(recipe, tmp_path) as (store, tracker):  # longer than it was meant to be
        store.cut_metrics("ppo", 2)
        for step in (3, 4):
            log(tracker, step, 0.5)
        store.cut_metrics("evaluate", 0)
        tracker.log("evaluate", 4, {"evaluate/win_rate": 0.75})
    rows = [(row["_step"], row["stage"], row["step"]) for row in history(tmp_path / "tracked")]
    assert rows == [(1, "ppo", 1), (2, "ppo", 2), (3, "evaluate", 2), (4, "ppo", 3), (5, "ppo", 4), (6, "evaluate", 4)]


def test_a_segment_that_does_not_say_its_run_is_put_where_no_upload_takes_it(recipe: Recipe, tmp_path: Path) -> None:
    with started(recipe, tmp_path) as (_, tracker):
        log(tracker, 1, 0.5)
    os.truncate(logs(tmp_path / "tracked")[0], segments.FILE_HEADER)
    with started(recipe, tmp_path) as (_, tracker):
        log(tracker, 2, 0.5)
    assert steps(*logs(tmp_path / "tracked")) == [1, 2]
    assert len(logs(tmp_path / "tracked")) == 1
    assert len(list((tmp_path / "tracked").glob("wandb/unreadable-run-*/*.wandb"))) == 1


@pytest.mark.timeout(60)
def test_an_offline_run_says_how_to_upload_it(recipe: Recipe, tmp_path: Path) -> None:
    console = SilentConsole()
    with RunStore.open(tmp_path, recipe) as store:
        tracker = WandbTracker(recipe, store, console, {})
        tracker.close()
        assert [said for said in console.said if "wandb sync" in said and str(store.wandb_run_id) in said]
        assert len(console.said) == 1


@pytest.mark.timeout(120)
def test_a_tracker_whose_service_was_ended_goes_on_and_the_next_start_logs_what_was_lost(
    recipe: Recipe, tmp_path: Path
) -> None:
    process(recipe, tmp_path, 1, 2, "lose service", **OFFLINE)
    with started(recipe, tmp_path):
        pass
    assert steps(*logs(tmp_path / "tracked")) == [1, 2]


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
