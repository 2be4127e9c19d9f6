"""The command: help, dry runs, errors and their exit codes, pages."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

import cluster.preview
from cluster.cli import app
from configs.load import dump_recipe, load_recipe
from rlhf.store import RunStore
from tests.recipes import tiny_recipe

RECIPES = Path(__file__).parents[2] / "configs" / "recipes"
HEAVY = {"torch", "ray", "vllm", "transformers", "deepspeed", "wandb"}


def tenfold(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def recipe_file(tiny_model: Path, tmp_path: Path) -> Path:
    recipe = tiny_recipe(tiny_model, tmp_path, rules=[{"name": "complete"}])
    path = tmp_path / "tiny.yaml"
    path.write_text(dump_recipe(recipe))
    return path


def test_help_names_every_command_and_is_quick() -> None:
    code = "import sys, cluster.cli; print(*sys.modules); sys.argv = ['tenfold', '--help']; cluster.cli.main()"
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert time.perf_counter() - began < 5  # on a busy machine; alone it is well under one
    assert not HEAVY & set(done.stdout.splitlines()[0].split())
    for command in (
        "run",
        "sample",
        "rank",
        "reward",
        "ppo",
        "evaluate",
        "show",
        "export",
        "resume",
        "runs",
        "chaos",
        "annotate",
        "import-model",
        "serve",
        "chat",
        "submit",
        "status",
        "logs",
        "stop",
        "doctor",
    ):
        assert f" {command} " in done.stdout


def test_the_version_is_told() -> None:
    result = tenfold("--version")
    assert result.exit_code == 0
    assert result.output.startswith("tenfold")


@pytest.mark.parametrize(
    ("name", "kind", "groups", "gpus"),
    [
        ("one_gpu_24gib", "shared", {"trainer": 1, "generator": 1}, 1),
        ("one_gpu_80gib", "shared", {"trainer": 1, "generator": 1}, 1),
        ("eight_gpu", "separate", {"policy": 2, "critic": 2, "reward": 1, "reference": 1, "generator": 2}, 8),
    ],
)
def test_gpu_recipes_are_planned_on_a_machine_without_their_model_data_and_gpus(
    name: str, kind: str, groups: dict[str, int], gpus: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cluster.preview, "gpus_here", lambda: 0)
    result = tenfold("run", RECIPES / f"{name}.yaml", "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert [stage["stage"] for stage in plan["stages"]] == ["sample", "rank", "reward", "ppo", "evaluate"]
    assert {stage["state"] for stage in plan["stages"]} == {"run"}
    assert plan["placement"]["kind"] == kind
    assert {group["group"]: group["workers"] for group in plan["placement"]["groups"]} == groups
    assert plan["placement"]["gpus"] == gpus
    assert [line.split(":")[0] for line in plan["missing"]] == ["the model", "the prompts", "GPUs"]
    assert list(tmp_path.iterdir()) == []

    page = tenfold("run", RECIPES / f"{name}.yaml", "--dry-run")
    assert page.exit_code == 0
    assert "Missing on this machine" in page.output
    assert "nothing was started" in page.output


@pytest.mark.parametrize(("overrides", "gpus"), [([], 8), (["cluster.gpus=1", "cluster.workers.trainer=1"], 1)])
def test_a_dry_run_counts_the_gpus_of_pretraining(
    overrides: list[str], gpus: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cluster.preview, "gpus_here", lambda: 0)
    result = tenfold("pretrain", RECIPES / "gpt2_124m.yaml", *overrides, "--dry-run", "--json")
    plan = json.loads(result.stdout)
    assert plan["crew"] == {"group": "trainer", "workers": gpus, "roles": ["pretrain"], "cpus": 0.25, "gpus": 1.0}
    assert plan["placement"]["gpus"] == gpus
    assert f"GPUs: the run takes {gpus}, this machine has 0" in plan["missing"]
    page = tenfold("pretrain", RECIPES / "gpt2_124m.yaml", *overrides, "--dry-run")
    assert f"GPUs: {gpus}" in page.output and "0.25 CPU, 1 GPU" in page.output


def test_the_recipe_of_gpt2s_size_is_ten_billion_tokens_in_whole_passes_on_eight_gpus_or_one() -> None:
    recipe = load_recipe(RECIPES / "gpt2_124m.yaml")
    pretrain, workers = recipe.pretrain, recipe.cluster.workers["trainer"]
    assert pretrain.batch_rows * pretrain.row_tokens == 524_288
    assert (pretrain.num_steps or 0) * 524_288 == 10_000_269_312
    assert workers == recipe.cluster.gpus == 8
    assert 524_288 % (workers * recipe.learner.micro_batch_tokens) == 0
    one = ["cluster.gpus=1", "cluster.workers.trainer=1", "pretrain.save_every=250"]  # as the recipe's comment says
    alone = load_recipe(RECIPES / "gpt2_124m.yaml", one)
    assert alone.pretrain.model_copy(update={"save_every": pretrain.save_every}) == pretrain
    assert (alone.cluster.gpus, alone.cluster.workers) == (1, {"trainer": 1})


def test_a_dry_run_counts_prompts_and_answers_and_marks_what_is_done(recipe_file: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe("unused", tmp_path)
    tree = yaml.safe_load(recipe_file.read_text())
    with RunStore.open(tree["runs"], recipe.model_validate(tree)) as store:
        store.finish("sample", {"num_prompts": 8})
    plan = json.loads(tenfold("run", recipe_file, "--dry-run", "--json").stdout)
    assert plan["missing"] == []
    assert plan["begun"] is True
    assert plan["prompts"]["total"] == 20
    assert plan["prompts"]["train"] + plan["prompts"]["held_out"] == 20
    assert {stage["stage"]: stage["state"] for stage in plan["stages"]}["sample"] == "done"
    assert plan["stages"][1]["state"] == "run"
    assert "2 prompts with 10 answers each (20 answers a step)" in plan["stages"][3]["what"]


def test_a_dry_run_of_one_stage_shows_that_stage(recipe_file: Path) -> None:
    plan = json.loads(tenfold("ppo", recipe_file, "ppo.num_steps=7", "--dry-run", "--json").stdout)
    assert [stage["stage"] for stage in plan["stages"]] == ["ppo"]
    assert plan["stages"][0]["what"].startswith("7 steps")


@pytest.mark.parametrize("command", ["pretrain", "sft"])
@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("none.jsonl", None, "matches no file"),
        ("empty.jsonl", b"", "no document|no conversation"),
        ("binary.jsonl", b"\x80\x81\x00", "binary.jsonl, line 1: not UTF-8"),
        ("other.jsonl", b'{"words": "a"}\n', "other.jsonl, line 1"),
    ],
)
def test_text_that_no_model_can_be_made_of_is_told_before_anything_is_begun(
    recipe_file: Path, tmp_path: Path, command: str, name: str, content: bytes | None, told: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    words = [command, recipe_file, f"{command}.sources=[{{path: {tmp_path / name}}}]"]
    plan = json.loads(tenfold(*words, "--dry-run", "--json").stdout)
    assert any(re.search(told, line) for line in plan["missing"])
    result = tenfold(*words)
    assert result.exit_code == 2 and re.search(told, result.output.replace("\n", " "))
    assert "start Ray" not in result.output and not list(tmp_path.glob("runs/*/wandb"))


@pytest.mark.parametrize("command", ["pretrain", "sft"])
def test_a_recipe_without_text_is_told_before_anything_is_begun(recipe_file: Path, command: str) -> None:
    assert f"{command}: the recipe names no" in tenfold(command, recipe_file, "--dry-run").output
    result = tenfold(command, recipe_file)
    assert result.exit_code == 2 and f"{command}: the recipe names no" in result.output
    assert "start Ray" not in result.output


@pytest.mark.parametrize("dry", [["--dry-run"], []])
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ppo.num_step=3", "did you mean ppo.num_steps"),
        ("ppo.num_steps=0", "ppo.num_steps"),
        ("sampling.top_p=0.9", "leave top_p at 1"),
        ("rules=[{name: complet}]", "complet"),
        ("nonsense", "key=value"),
    ],
)
def test_a_bad_recipe_is_one_message_and_exit_code_2(
    recipe_file: Path, tmp_path: Path, dry: list[str], override: str, message: str
) -> None:
    result = tenfold("run", recipe_file, override, "tracker.mode=disabled", *dry)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output


def test_a_recipe_that_is_not_there_names_a_near_one() -> None:
    result = tenfold("run", RECIPES / "eight_gpus.yaml", "--dry-run")
    assert result.exit_code == 2
    assert "eight_gpu.yaml" in result.output.replace("\n", "")


def test_a_malformed_line_of_data_is_named_with_file_and_line(recipe_file: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "fine"}\n{"prompt": \n')
    result = tenfold("run", recipe_file, f"data.prompts={broken}", "name=other", "tracker.mode=disabled")
    assert result.exit_code == 2
    assert "broken.jsonl, line 2" in result.output


def test_a_run_folder_that_cannot_be_made_is_one_message(recipe_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    result = tenfold("run", recipe_file, f"runs={tmp_path / 'file'}")
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_show_prints_the_page_of_a_run_from_its_folder_alone(recipe_file: Path, tmp_path: Path) -> None:
    tree = yaml.safe_load(recipe_file.read_text())
    recipe = tiny_recipe("unused", tmp_path).model_validate(tree)
    with RunStore.open(recipe.runs, recipe) as store:
        store.finish("rank", {"judge": "rules", "num_groups": 12, "time_s": 61.0})
        page = tenfold("show", store.folder)  # while the run is held by another
    assert page.exit_code == 0
    assert "ranked the answers of 12 prompts" in " ".join(page.output.split())
    assert "1 min 01 s" in page.output
    as_json = tenfold("show", store.folder, "--json")
    assert json.loads(as_json.stdout)["rank"]["num_groups"] == 12


def test_show_of_no_run_names_those_that_are_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "manifest.json").write_text("{}")
    result = tenfold("show", "yours")
    assert result.exit_code == 2
    assert "runs/mine" in result.output


def test_importing_a_model_that_is_not_there_is_one_message(tmp_path: Path) -> None:
    result = tenfold("import-model", tmp_path / "no.gguf", tmp_path / "model")
    assert result.exit_code == 2
    assert "no.gguf" in result.output.replace("\n", "")
    assert "Traceback" not in result.output


def test_a_model_is_imported_into_a_folder(tiny_model: Path, tmp_path: Path) -> None:
    result = tenfold("import-model", tiny_model, tmp_path / "model", "--dtype", "float32")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "model" / "config.json").exists()


def test_runs_lists_what_is_there_for_people_and_programs(recipe_file: Path, tmp_path: Path) -> None:
    assert "There are no runs here." in tenfold("runs", tmp_path / "runs").output
    with RunStore.open(tmp_path / "runs", tiny_recipe("m", tmp_path)):
        pass
    listed = tenfold("runs", tmp_path / "runs", "--json")
    (row,) = json.loads(listed.stdout)
    assert (row["state"], row["stage"], row["checkpoint"]) == ("stopped", "sample", None)
    assert "stopped" in tenfold("runs", tmp_path / "runs").output


@pytest.mark.parametrize("words", [("resume", "nothing"), ("resume", "/no/such/folder"), ("show", "nothing")])
def test_a_run_that_is_not_there_is_one_message(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    result = tenfold(*words)
    assert result.exit_code == 2
    assert f"There is no run {words[1]}." in result.output and "Traceback" not in result.output


def test_a_resume_takes_a_change_over_only_if_it_is_accepted(recipe_file: Path, tmp_path: Path) -> None:
    with RunStore.open(tmp_path / "runs", tiny_recipe("m", tmp_path)) as store:
        store.log("sample", 1, {})
    refused = tenfold("resume", tmp_path / "runs" / "tiny", "ppo.num_steps=9")
    assert refused.exit_code == 2
    assert "ppo.num_steps: 2 -> 9" in refused.output and "--accept ppo.num_steps" in refused.output
    taken = tenfold("resume", tmp_path / "runs" / "tiny", "ppo.num_steps=9", "--accept", "ppo.num_steps")
    assert (
        taken.exit_code == 2 and "there is no such folder" in taken.output
    )  # it is past the recipe: there is no model


def test_a_run_that_another_process_holds_is_refused(recipe_file: Path, tmp_path: Path) -> None:
    with RunStore.open(tmp_path / "runs", tiny_recipe("m", tmp_path)):
        second = tenfold("resume", tmp_path / "runs" / "tiny")
    assert second.exit_code == 2 and "is in use by another process" in second.output
