"""`tenfold plan`, and the plan that a run makes by itself."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

import cluster.gpus
from cluster.cli import app
from cluster.console import LineConsole
from cluster.gpus import told_by_driver
from cluster.plan.budget import Budget
from cluster.plan.devices import GPUS, this_cpu
from cluster.plan.search import plan
from cluster.plan.shape import shape_of
from cluster.planning import as_begun, keep, numbers, planned
from configs.load import load_recipe
from configs.schema import Recipe
from rlhf.errors import PlacementError
from rlhf.store import RunStore
from tests.recipes import tiny_recipe

RECIPES = Path(__file__).parents[2] / "configs" / "recipes"


def tenfold(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    tree = {
        "name": "open",
        "runs": str(tmp_path / "runs"),
        "model": {"path": "models/qwen2.5-7b-instruct"},
        "data": {"prompts": "prompts.jsonl"},
        "rules": [{"name": "short"}],
    }
    path = tmp_path / "open.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def with_gpus(monkeypatch: pytest.MonkeyPatch, *gpus: tuple[str, float]) -> None:
    """Makes this machine one with these GPUs, as far as the plan can see."""
    monkeypatch.setattr("cluster.preview.gpus_here", lambda: len(gpus))
    monkeypatch.setattr(cluster.gpus, "told_by_driver", lambda: list(gpus))


def test_a_plan_says_model_budget_settings_memory_and_time(recipe_file: Path) -> None:
    done = tenfold("plan", recipe_file, "--gpus", 1, "--gpu-memory", "80GB")
    assert done.exit_code == 0, done.output
    for words in (
        "7,615,616,512 parameters", "1 x H100", "79.1 GiB are usable", "weights", "KV cache", "head-room", "estimate",
        "learner.micro_batch_tokens", "generate", "hand over",
    ):  # fmt: skip
        assert words in done.output, words


def test_a_plan_as_json_is_all_of_it(recipe_file: Path) -> None:
    done = tenfold("plan", recipe_file, "--gpus", 8, "--gpu", "H100", "--json")
    found = json.loads(done.stdout)
    assert found["fits"] and found["gpus_used"] <= 8
    assert found["budget"]["usable_bytes"] == GPUS["H100"].usable
    trainer = found["groups"][0]
    assert sum(trainer["bytes"].values()) - trainer["bytes"]["total"] == trainer["bytes"]["total"]
    times = found["estimated_seconds"]
    assert sum(times.values()) == pytest.approx(2 * times["step"])
    assert "cluster.placement" in found["chosen"]


def test_a_refusal_is_said_with_what_would_fit_and_exit_code_2(recipe_file: Path) -> None:
    done = tenfold("plan", recipe_file, "cluster.placement=separate", "--gpus", 2, "--gpu", "H100")
    assert done.exit_code == 2
    assert "It does not fit. Groups of their own take at least 5 GPUs" in " ".join(done.output.split())
    assert "It fits with 5 GPUs, or cluster.placement left to the plan" in " ".join(done.output.split())
    told = tenfold("plan", recipe_file, "cluster.placement=separate", "--gpus", 2, "--gpu", "H100", "--json")
    assert told.exit_code == 2
    assert not json.loads(told.stdout)["fits"]
    assert json.loads(told.stdout)["refusal"]["remedy"].startswith("It fits with 5 GPUs")


def test_numbers_of_gpus_are_compared_a_line_each(recipe_file: Path) -> None:
    done = tenfold("plan", recipe_file, "--compare", "1,2,8", "--gpu", "RTX-4090", "--model", "qwen2.5-1.5b", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [one["budget"]["gpus"] for one in found] == [1, 2, 8]
    steps = [one["estimated_seconds"]["step"] for one in found]
    assert steps == sorted(steps, reverse=True)
    page = tenfold("plan", recipe_file, "--compare", "1,8", "--gpu", "RTX-4090")  # 7B: one is too small
    assert "trainer" in page.output and "estimates" in page.output


def test_without_a_gpu_a_plan_weighs_the_processes_against_this_machines_memory(recipe_file: Path) -> None:
    done = tenfold("plan", recipe_file, "model.dtype=float32", "--model", "smollm2-135m", "--gpus", 0)
    assert done.exit_code == 0, done.output
    assert "no GPU" in done.output and "All processes share" in done.output


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--gpus", 8), "It is not known which GPUs the 8 are."),
        (("--gpu", "H100"), "It is not known how many GPUs there are."),
        (("--gpus", 1, "--gpu", "V100"), "not in the table of devices"),
        (("--gpus", 1, "--gpu-memory", "much"), "that is not an amount of memory"),
        (("--gpus", 1, "--gpu", "H1000"), "not in the table of devices"),
        (("--compare", "1,2", "--gpus", 4, "--gpu", "H100"), "--compare names the numbers of GPUs itself"),
        (("--compare", "1,x", "--gpu", "H100"), "these are not numbers of GPUs"),
        (("--gpus", 1, "--gpu", "H100", "--model", "gpt-9"), "none of that name is known"),
    ],
)
def test_what_cannot_be_planned_is_one_message_and_exit_code_2(
    recipe_file: Path, words: tuple[object, ...], told: str
) -> None:
    done = tenfold("plan", recipe_file, *words)
    assert done.exit_code == 2
    assert told in " ".join(done.output.split())
    assert "Traceback" not in done.output


def test_numbers_are_in_order_and_once() -> None:
    assert numbers("8, 1,2,8") == (1, 2, 8)
    assert numbers(None) == ()
    with pytest.raises(PlacementError, match="1 to 4096"):
        numbers("0,1")


@pytest.fixture
def console() -> LineConsole:
    return LineConsole(StringIO())


def said(console: LineConsole) -> str:
    file = console.rich.file
    assert isinstance(file, StringIO)
    return file.getvalue()


def test_a_run_chooses_what_the_recipe_leaves_open_and_says_it_in_a_line(
    recipe_file: Path, console: LineConsole, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_gpus(monkeypatch, *[("NVIDIA H100 80GB HBM3", 81559.0)] * 2)
    recipe = load_recipe(recipe_file, ["learner.micro_batch_tokens=4096"])
    resolved, found = planned(recipe, console, recipe.stages)
    assert found is not None
    assert resolved.cluster.gpus == 2 and resolved.cluster.workers == {"trainer": 2, "generator": 2}
    assert resolved.learner.micro_batch_tokens == 4096
    assert resolved.stages == recipe.stages
    assert said(console).count("\n") == 1
    assert "plan: shared on 2 of 2 GPUs (trainer 2, generator 2)" in said(console)
    assert "(estimate)" in said(console)


def test_a_run_that_cannot_fit_is_refused_before_anything_starts(
    recipe_file: Path, console: LineConsole, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_gpus(monkeypatch, ("NVIDIA GeForce RTX 4090", 24564.0))
    recipe = load_recipe(recipe_file)
    with pytest.raises(PlacementError, match=r"cluster\.plan=false tries it as it is"):
        planned(recipe, console, recipe.stages)
    as_it_is = load_recipe(recipe_file, ["cluster.plan=false"])
    assert planned(as_it_is, console, as_it_is.stages) == (as_it_is, None)
    assert not Path(recipe.runs).exists()


@pytest.mark.parametrize("gpus", [[], [("NVIDIA H100 80GB HBM3", 81559.0), ("NVIDIA L40S", 46068.0)]])
def test_gpus_that_are_not_known_or_not_alike_are_not_planned_for(
    recipe_file: Path, console: LineConsole, monkeypatch: pytest.MonkeyPatch, gpus: list[tuple[str, float]]
) -> None:
    monkeypatch.setattr("cluster.preview.gpus_here", lambda: 2)
    monkeypatch.setattr(cluster.gpus, "told_by_driver", lambda: gpus)
    recipe = load_recipe(recipe_file)
    assert planned(recipe, console, recipe.stages) == (recipe, None)
    assert "what memory the GPUs have is not known" in said(console)


@pytest.mark.parametrize(
    ("told", "name", "usable"),
    [
        (("NVIDIA A100-SXM4-80GB", 81920.0), "A100-80GB", 79.14),
        (("NVIDIA H200", 143771.0), "H200", 139.8),
        (("NVIDIA GeForce RTX 3090", 24576.0), "RTX-4090", 23.52),  # as much memory, and the nearest speed known
    ],
)
def test_a_gpu_is_known_by_what_its_driver_tells(
    monkeypatch: pytest.MonkeyPatch, told: tuple[str, float], name: str, usable: float
) -> None:
    with_gpus(monkeypatch, told)
    budget = cluster.gpus.budget_here()
    assert budget is not None
    assert (budget.device.name, budget.device.usable_gib) == (name, usable)


def test_a_driver_that_is_not_there_tells_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert told_by_driver() == []


@pytest.mark.parametrize("output", ["echo 'NVIDIA L40S, 46068'", "echo broken", "exit 9"])
def test_a_driver_is_read_or_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, output: str) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\n{output}\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert told_by_driver() == ([("NVIDIA L40S", 46068.0)] if "L40S" in output else [])


def dry_run(recipe_file: Path, *overrides: str) -> Any:
    done = tenfold("run", recipe_file, *overrides, "--dry-run", "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_a_dry_run_shows_what_the_plan_chooses_as_the_run_would_have_it(
    recipe_file: Path, console: LineConsole, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_gpus(monkeypatch, *[("NVIDIA H100 80GB HBM3", 81559.0)] * 4)
    recipe = load_recipe(recipe_file)
    resolved, _ = planned(recipe, console, recipe.stages)
    shown = dry_run(recipe_file)
    assert shown["placement"]["gpus"] == 4
    groups = {group["group"]: group["workers"] for group in shown["placement"]["groups"]}
    assert groups == resolved.cluster.workers == {"trainer": 4, "generator": 4}
    assert shown["plan"]["said"] in said(console)
    assert shown["plan"]["chosen"]["cluster.workers"] == groups
    page = tenfold("run", recipe_file, "--dry-run").output
    assert "plan: shared on 4 of 4 GPUs" in page
    assert not Path(recipe.runs).exists()


def test_a_dry_run_says_what_does_not_fit_and_shows_the_recipe_as_it_is(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_gpus(monkeypatch, ("NVIDIA GeForce RTX 4090", 24564.0))
    shown = dry_run(recipe_file)
    lacking = next(line for line in shown["missing"] if line.startswith("memory or GPUs"))
    assert "GiB are missing" in lacking and "It fits with" in lacking
    assert shown["plan"] == {"said": "", "chosen": {}}
    assert "memory or GPUs" not in "".join(dry_run(recipe_file, "cluster.plan=false")["missing"])


def test_a_dry_run_of_a_run_that_has_begun_shows_what_it_began_with(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(recipe_file)
    begun(recipe, shape_of(recipe), Budget(4, 4, GPUS["H100"]))
    with_gpus(monkeypatch, ("NVIDIA GeForce RTX 4090", 24564.0))
    assert dry_run(recipe_file)["placement"]["gpus"] == 4


def test_a_dry_run_for_a_cluster_elsewhere_reaches_nothing(recipe_file: Path) -> None:
    shown = dry_run(recipe_file, "cluster.address=10.0.0.1:6379")
    assert shown["plan"]["said"] == "plan: made when the cluster is reached"


def begun(recipe: Recipe, shape: Any, budget: Budget) -> Path:
    """The folder of a run that was begun with the plan for this budget."""
    found = plan(recipe, shape, budget)
    assert not isinstance(found, type(None)) and hasattr(found, "placement")
    with RunStore.open(recipe.runs, found.recipe) as store:  # type: ignore[union-attr]
        keep(found, store.folder)  # type: ignore[arg-type]
        return store.folder


def test_a_run_that_has_begun_goes_on_as_it_began_whatever_there_is_now(
    recipe_file: Path, console: LineConsole, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(recipe_file)
    folder = begun(recipe, shape_of(recipe), Budget(4, 4, GPUS["H100"]))
    with_gpus(monkeypatch, ("NVIDIA GeForce RTX 4090", 24564.0))
    again, found = planned(recipe, console, recipe.stages)
    assert found is None and said(console) == ""
    assert again.cluster.gpus == 4 and again.cluster.workers == {"trainer": 4, "generator": 4}
    with RunStore.open(recipe.runs, again) as store:  # the same recipe: nothing to accept
        assert store.folder == folder
    kept = json.loads((folder / "plan.json").read_text())
    assert kept["budget"]["gpus"] == 4 and "cluster.workers" in kept["chosen"]


def test_what_the_recipe_says_now_is_not_hidden_by_what_the_run_began_with(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    folder = begun(recipe, shape_of(recipe), Budget(4, 4, GPUS["H100"]))
    changed = as_begun(load_recipe(recipe_file, ["cluster.gpus=2"]), folder)
    assert changed.cluster.gpus == 2 and changed.cluster.workers == {"trainer": 4, "generator": 4}


def test_a_run_without_a_gpu_keeps_its_recipe(tiny_model: Path, tmp_path: Path, console: LineConsole) -> None:
    recipe = tiny_recipe(tiny_model, tmp_path)
    resolved, found = planned(recipe, console, recipe.stages)
    assert resolved == recipe and found is not None
    assert "plan: no GPU; about" in said(console)


def test_a_machine_without_the_memory_is_refused(
    tiny_model: Path, tmp_path: Path, console: LineConsole, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster.gpus, "this_machine", lambda: this_cpu(0.5, 2))
    recipe = tiny_recipe(tiny_model, tmp_path)
    with pytest.raises(PlacementError, match="on this machine"):
        planned(recipe, console, recipe.stages)


def test_a_model_that_is_not_here_is_left_to_who_loads_it(tmp_path: Path, console: LineConsole) -> None:
    recipe = tiny_recipe("nowhere", tmp_path)
    assert planned(recipe, console, recipe.stages) == (recipe, None)
