"""Models that are made on real Ray Train: killed workers, two workers for one, interruptions."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from io import StringIO
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group
from safetensors.torch import load_file

from cluster.console import LineConsole
from cluster.ray_session import RaySession
from cluster.run import run
from cluster.scale import answer_to, ask, parse
from configs.load import absolute, dump_recipe, load_recipe
from configs.schema import Recipe
from rlhf.errors import DataError, PlacementError
from rlhf.store import RunStore

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

WORDS = ("the", "sea", "wind", "stone", "river", "light", "cloud", "tree")
Go = Callable[..., Path]


@pytest.fixture
def go(session: RaySession, monkeypatch: pytest.MonkeyPatch) -> Go:
    """Runs a recipe; `at` is called with each step that was logged."""

    def start(recipe: Recipe, at: Callable[[int], None] = lambda step: None, **options: Any) -> Path:
        log = RunStore.log

        def logs(self: RunStore, stage: str, step: int, metrics: Mapping[str, float]) -> None:
            log(self, stage, step, metrics)
            at(step)

        with monkeypatch.context() as patch:
            patch.setattr(RunStore, "log", logs)
            run(recipe, LineConsole(StringIO()), session=session, **options)
        return Path(recipe.runs) / recipe.name

    return start


def recipe(folder: Path, name: str, num_workers: int = 1, **keys: Any) -> Recipe:
    corpus = folder / "corpus.txt"
    if not corpus.exists():
        texts = [" ".join(WORDS[(i * i + j) % len(WORDS)] for j in range(30)) for i in range(120)]
        corpus.write_text("\n\n".join(texts))
    section = {
        "sources": [{"path": str(corpus), "split": "paragraph"}],
        "sizes": {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "context_tokens": 64},
        "vocab_size": 320,
        "row_tokens": 64,
        "batch_rows": 24,
        "num_steps": 6,
        "held_out": 0.1,
        "evaluate_every": 3,
        "continuations": ["the sea"],
        "continuation_tokens": 4,
        "save_every": 2,
        "optimizer": {"lr": 3e-3, "warmup_steps": 2, "schedule": "cosine", "weight_decay": 0.1},
    }
    return Recipe.model_validate(
        {
            "name": name,
            "runs": str(folder / "runs"),
            "stages": ["pretrain"],
            "model": {"dtype": "float32"},
            "pretrain": {**section, **keys},
            "cluster": {"threads": 1, "wait_s": 120, "call_s": 120, "workers": {"trainer": num_workers}},
            "tracker": {"mode": "disabled"},
        }
    )


def curve(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without what a clock gave."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]


def weights(folder: Path) -> bytes:
    return (folder / "models" / "base" / "model.safetensors").read_bytes()


def kill_a_worker() -> None:
    """kill -9 of a process that trains."""
    training = [p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())]
    assert training, "no worker of Ray Train was found"
    training[-1].kill()


@pytest.fixture(scope="module")
def undisturbed(session: RaySession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing happened to."""

    folder = tmp_path_factory.mktemp("undisturbed")
    made = recipe(folder, "plain")
    run(made, LineConsole(StringIO()), session=session)
    return Path(made.runs) / made.name


def test_a_killed_worker_and_an_interruption_both_go_on_to_the_same_curve_and_model(
    go: Go, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[int] = []
    monkeypatch.setattr("cluster.crew.LOOK_S", 0.02)  # so that it is known soon how far the worker is

    def at(step: int) -> None:
        if step == 3 and not killed:
            killed.append(step)
            kill_a_worker()  # the run goes on by itself
        elif step == 5:
            raise KeyboardInterrupt

    made = recipe(tmp_path, "disturbed")
    with pytest.raises(KeyboardInterrupt):
        go(made, at)
    assert killed
    folder = Path(made.runs) / made.name
    saved = sorted(path.name for path in (folder / "checkpoints" / "pretrain").iterdir())
    assert saved[-1] >= "step-5", "what was done is saved before the workers leave"
    go(made)
    assert curve(folder) == curve(undisturbed) and weights(folder) == weights(undisturbed)


def test_two_workers_give_the_losses_of_one(go: Go, undisturbed: Path, tmp_path: Path) -> None:
    both = go(recipe(tmp_path, "two", num_workers=2))
    for mine, theirs in zip(curve(both), curve(undisturbed), strict=True):
        assert mine.pop("stage") == theirs.pop("stage") and mine == pytest.approx(theirs, rel=1e-4)
    ours, plain = (load_file(folder / "models" / "base" / "model.safetensors") for folder in (both, undisturbed))
    assert all(float((ours[name] - plain[name]).abs().max()) < 1e-4 for name in plain)


def test_a_run_scaled_to_two_workers_gives_the_losses_of_one(
    go: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.crew.LOOK_S", 0.02)
    steps = {"num_steps": 40, "save_every": 100, "evaluate_every": 20}
    plain = go(recipe(tmp_path, "plain", **steps))
    folder, request = tmp_path / "runs" / "scaled", parse(None, "2")

    def at(step: int) -> None:
        if step == 1:
            ask(folder, request)

    scaled = go(recipe(tmp_path, "scaled", **steps), at)
    assert answer_to(request, folder) == ("taken", "")
    assert load_recipe(folder / "recipe.yaml").cluster.workers == {"trainer": 2}
    for mine, theirs in zip(curve(scaled), curve(plain), strict=True):
        assert mine.pop("stage") == theirs.pop("stage") and mine == pytest.approx(theirs, rel=1e-3)
    ours, theirs = (load_file(run / "models" / "base" / "model.safetensors") for run in (scaled, plain))
    assert all(float((ours[name] - theirs[name]).abs().max()) < 1e-3 for name in theirs)


def test_what_a_worker_finds_wrong_is_told_once_and_not_tried_again(go: Go, undisturbed: Path, tmp_path: Path) -> None:
    made = recipe(tmp_path, "other")
    for part in ("checkpoints/pretrain/step-6", "tokenizer", "start"):
        shutil.copytree(undisturbed / part, tmp_path / "runs" / "other" / part)
    manifest = json.loads((undisturbed / "manifest.json").read_text()) | {"stages": {}}
    (tmp_path / "runs" / "other" / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "runs" / "other" / "recipe.yaml").write_text(dump_recipe(absolute(made)))
    (tmp_path / "corpus.txt").write_text("\n\n".join(f"{i} other words" for i in range(300)))
    with pytest.raises(DataError, match="The corpus changed since the checkpoint"):
        go(made)


def test_workers_find_a_run_folder_and_sources_that_are_named_relative_to_where_the_run_began(
    go: Go, tmp_path: Path
) -> None:
    made = recipe(Path(os.path.relpath(tmp_path)), "near", num_steps=1, evaluate_every=None)
    assert not Path(made.runs).is_absolute()
    folder = go(made)
    assert (folder / "models" / "base" / "model.safetensors").is_file()
    assert [path.name for path in (tmp_path / "runs" / "near" / "checkpoints" / "pretrain").glob("step-*")] == [
        "step-1"
    ]


def test_workers_that_no_cluster_of_this_size_holds_are_refused_at_once(go: Go, tmp_path: Path) -> None:
    made = recipe(tmp_path, "wide", num_workers=3)
    wide = made.model_copy(update={"cluster": made.cluster.model_copy(update={"cpus_per_worker": 900.0})})
    with pytest.raises(PlacementError, match="takes 2700 logical CPUs"):
        go(wide)


def test_workers_that_others_leave_no_place_are_told_within_the_deadline(go: Go, tmp_path: Path) -> None:
    made = recipe(tmp_path, "late", num_workers=1)
    cpus = ray.cluster_resources()["CPU"]
    late = made.model_copy(update={"cluster": made.cluster.model_copy(update={"cpus_per_worker": cpus, "wait_s": 12})})
    others = placement_group([{"CPU": 1}])
    try:
        assert others.wait(30)
        with pytest.raises(PlacementError, match=f"1 workers of {cpus:g}"):
            go(late)
    finally:
        remove_placement_group(others)


def test_workers_may_take_all_that_there_is(go: Go, tmp_path: Path) -> None:
    made = recipe(tmp_path, "all", num_steps=1)
    cluster = made.cluster.model_copy(update={"cpus_per_worker": ray.cluster_resources()["CPU"]})
    assert len(curve(go(made.model_copy(update={"cluster": cluster})))) >= 1
