"""Runs on a real cluster of three nodes with addresses of their own, on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from configs.load import absolute, dump_recipe
from configs.schema import Recipe
from rlhf.store import RunStore
from tests.cluster.namespaces import Nodes, nodes, why_not
from tests.cluster.same import assert_learnt_the_same
from tests.cluster.submitting import actors_and_groups, last_json, wait_until, working_directory
from tests.cluster.test_crew import recipe as pretraining
from tests.recipes import tiny_recipe

pytestmark = [pytest.mark.multinode, pytest.mark.timeout(900)]

# The command, with a journal that keeps all of a run's answers.
KEEPING = """
from cluster.cli import main
from rlhf.step_journal import StepJournal
StepJournal.drop_below = lambda self, step: None
main()
"""
NOTICED_S = 30.0  # at most, from a node's loss to what is done about it
CHANGES: dict[str, Any] = {
    "stages": ["ppo"],
    "ppo": {"num_steps": 3, "score": "rules"},
    "tracker": {"mode": "disabled"},
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Nodes]:
    """A head and three nodes, each with a resource of its name. What is cut off stays so: west, south, then east."""
    if reason := why_not():
        pytest.skip(reason)
    own: dict[str, dict[str, float]] = {
        "head": {"head": 8},
        "east": {"east": 8, "learns": 8, "makes": 8},
        "west": {"west": 8, "learns": 8},
        "south": {"south": 8, "makes": 8},
    }
    with nodes(own) as cluster:
        yield cluster


def start(cluster: Nodes, recipe: Any, code: str = KEEPING) -> subprocess.Popen[str]:
    """The run of a recipe, with the controller on the head."""
    path = Path(recipe.runs) / f"{recipe.name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dump_recipe(absolute(recipe)))
    command = [sys.executable, "-c", code, "run", str(path), f"cluster.address={cluster.address}"]
    return cluster.popen(
        cluster.names[0], command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=Path(__file__).parents[2]
    )


def finished(process: subprocess.Popen[str]) -> str:
    """All that a run said, once it has ended well."""
    said, _ = process.communicate()
    assert process.returncode == 0, said
    return said


def events(folder: Path, what: str) -> list[dict[str, Any]]:
    """The run's events of this kind so far."""
    try:
        lines = (folder / "events.jsonl").read_text().splitlines()
    except OSError:
        return []
    found = [json.loads(line) for line in lines if line.endswith("}")]
    return [event for event in found if event["what"] == what]


def cut_in_mid_step(cluster: Nodes, name: str, folder: Path, process: subprocess.Popen[str]) -> float:
    """When (seconds since 1970) the node was cut off: in a step after the first checkpoint."""
    while not (events(folder, "checkpoint") and events(folder, "begin")[-1]["phase"].startswith("update")):
        assert process.poll() is None, finished(process)
        time.sleep(0.01)
    cluster.cut(name)
    return time.time()


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def hosts(said: str) -> dict[str, str]:
    """The nodes of a group's workers, by its name, as the run told them."""
    told = [line.split(" on ") for line in said.splitlines() if ": ready in " in line]
    return {left.split("'")[1]: right.strip() for left, right in told}


def test_learners_and_generators_on_other_nodes_than_the_controller_learn_the_same(
    cluster: Nodes, tiny_model: Path, tmp_path: Path
) -> None:
    def on(name: str, learners: str, writers: str) -> Any:
        pins = {"trainer": {learners: 1}, "generator": {writers: 1}}
        return tiny_recipe(tiny_model, tmp_path, name=name, cluster={"resources": pins, "wait_s": 300}, **CHANGES)

    alone, apart = on("alone", "head", "head"), on("apart", "east", "west")
    runs = Path(alone.runs)
    assert hosts(finished(start(cluster, alone))) == {"trainer": "head", "generator": "head"}
    with RunStore.open(runs, apart):  # the first two steps' answers are recorded, the third's are written on west
        recorded = (runs / "alone" / "journal" / "ppo.jsonl").read_text().splitlines(keepends=True)
        kept = [line for line in recorded if json.loads(line)["step"] < 2]
        (runs / "apart" / "journal").mkdir()
        (runs / "apart" / "journal" / "ppo.jsonl").write_text("".join(kept))
    assert hosts(finished(start(cluster, apart))) == {"trainer": "east", "generator": "west"}
    assert_learnt_the_same(runs / "alone", runs / "apart", rtol=1e-5, atol=1e-7)


def test_a_run_is_submitted_to_the_head_by_address_and_its_stop_leaves_nothing_on_any_node(
    cluster: Nodes, tiny_model: Path, tmp_path: Path
) -> None:
    pins = {"trainer": {"east": 1}, "generator": {"west": 1}}
    where = {"resources": pins, "wait_s": 300, "call_s": 300, "address": "auto"}
    home = working_directory(tmp_path, tiny_model, **CHANGES, cluster=where)

    def tenfold(*words: str) -> str:
        command = [sys.executable, "-m", "cluster.cli", *words, "--address", cluster.jobs]
        process = cluster.popen("head", command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=home)
        return finished(process)

    before = cluster.pids()
    said = tenfold("submit", "recipe.yaml")
    assert hosts(said) == {"trainer": "east", "generator": "west"}
    assert (home / "there" / "tiny" / "models" / "policy" / "adapter_config.json").exists()
    assert last_json(tenfold("status", "tiny", "--json"))["state"] == "succeeded"

    tenfold("submit", "recipe.yaml", "name=long", "ppo.num_steps=200", "--detach")
    metrics = home / "there" / "long" / "metrics.jsonl"
    wait_until("two steps of PPO", lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 2)
    assert "long" in tenfold("stop", "long")
    assert last_json(tenfold("status", "long", "--json"))["state"] == "stopped", tenfold("logs", "long")
    wait_until("the job's processes are gone", lambda: cluster.pids() <= before, 60)
    assert actors_and_groups(cluster.inside("head"), cluster.jobs, cluster.environ) == ""


LONGER: dict[str, Any] = CHANGES | {"ppo": {"num_steps": 30, "score": "rules", "save_every": 1}}


def test_a_run_that_loses_a_node_in_mid_step_goes_on_with_what_is_left(
    cluster: Nodes, tiny_model: Path, tmp_path: Path
) -> None:
    # A node has room for one trainer.
    where = {"workers": {"trainer": 2}, "resources": {"trainer": {"learns": 5}, "generator": {"head": 1}}}
    recipe = tiny_recipe(tiny_model, tmp_path, name="loses", cluster={"wait_s": 300, **where}, **LONGER)
    folder = Path(recipe.runs) / "loses"
    process = start(cluster, recipe)
    cut = cut_in_mid_step(cluster, "west", folder, process)
    said = finished(process)
    (lost,) = events(folder, "lost")
    assert (lost["nodes"], lost["move"]) == (["west"], "shrink")
    assert lost["time"] - cut < NOTICED_S
    assert "the node west (10.111.0.3) went away" in " ".join(said.split())
    assert "2 workers of the group 'trainer' on east, west" in said
    assert "1 worker of the group 'trainer' on east" in said
    assert [row["step"] for row in rows(folder)] == list(range(1, 31))


def test_a_model_in_the_making_loses_a_node_and_is_made_by_fewer_workers(cluster: Nodes, tmp_path: Path) -> None:
    # A node has room for one worker.
    where = {"workers": {"trainer": 2}, "resources": {"trainer": {"makes": 5}}, "threads": 1, "wait_s": 100}
    recipe = pretraining(tmp_path, "made", num_steps=400, save_every=5, evaluate_every=400)
    recipe = Recipe.model_validate(recipe.model_dump() | {"cluster": where})
    folder = Path(recipe.runs) / "made"
    process = start(cluster, recipe)
    while not events(folder, "checkpoint"):
        assert process.poll() is None, finished(process)
        time.sleep(0.01)
    cluster.cut("south")
    cut = time.time()
    said = finished(process)
    (lost,) = events(folder, "lost")
    assert (lost["nodes"], lost["move"]) == (["south"], "shrink")
    assert lost["time"] - cut < NOTICED_S
    assert "going on from what was committed, on what is left, 1 trainer workers" in " ".join(said.split())
    assert [row["step"] for row in rows(folder)] == list(range(1, 401))


def test_a_run_that_loses_a_node_that_it_cannot_do_without_stops_with_the_nodes_name(
    cluster: Nodes, tiny_model: Path, tmp_path: Path
) -> None:
    pins = {"trainer": {"head": 1}, "generator": {"east": 1}}
    recipe = tiny_recipe(tiny_model, tmp_path, name="stops", cluster={"wait_s": 300, "resources": pins}, **LONGER)
    folder = Path(recipe.runs) / "stops"
    process = start(cluster, recipe)
    cut = cut_in_mid_step(cluster, "east", folder, process)
    said, _ = process.communicate()
    assert time.time() - cut < NOTICED_S
    assert process.returncode == 2, said
    told = " ".join(said.split())
    assert "The node east (10.111.0.2) went away." in told and "tenfold resume" in told and "Traceback" not in told
    manifest = json.loads((folder / "manifest.json").read_bytes())
    assert manifest["session"]["how"] == "failed" and manifest["checkpoints"]["ppo"] >= 1
