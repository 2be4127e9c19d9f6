"""What a run has to serve, and what is refused before anything starts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from actors.base import Base
from cluster.serve_engine import engine_settings, environment
from cluster.served import served
from configs.load import load_recipe
from configs.schema import LoraConfig, ModelConfig
from rlhf.chat import ChatTokenizer
from rlhf.errors import ModelError, StoreError
from rlhf.store import RunStore
from tests.cluster.test_cli import tenfold
from tests.cluster.test_export import in_one_line, make_run
from tests.recipes import tiny_recipe


def make_peft_folder(model: Path, folder: Path, rank: int = 4, targets: Any = "all-linear", **config: object) -> Path:
    """An adapter as plain `peft` leaves one: no manifest of ours."""
    base = Base(ModelConfig(path=str(model), dtype="float32"), LoraConfig(rank=rank, alpha=8, targets=targets), seed=3)
    base.attach("law")
    folder.mkdir()
    tensors = {name: torch.full(values.shape, 0.02) for name, values in base.parameters("law").items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**base.adapter_config("law"), **config}))
    return folder


@pytest.fixture
def run(tiny_model: Path, tmp_path: Path) -> Path:
    return make_run(tiny_model, tmp_path, 0.05)


def test_the_policy_is_served_beside_its_base_and_further_adapters(run: Path, tiny_model: Path, tmp_path: Path) -> None:
    law = make_peft_folder(tiny_model, tmp_path / "law", rank=12, targets=("q_proj", "v_proj"))
    recipe = load_recipe(run / "recipe.yaml")
    what = served(run, recipe, [f"law={law}"])
    assert what.names == ("base", "policy", "law")
    assert (what.base, what.adapters["policy"]) == (tiny_model.resolve(), run / "models" / "policy")
    assert what.rank == 16  # room for 4 and 12
    assert {"q_proj", "v_proj", "down_proj"} <= set(what.targets)
    assert set(what.eos_ids) == ChatTokenizer(tiny_model).eos_ids
    settings = engine_settings(what, recipe, on_gpu=False)
    assert settings["lora_modules"] == [
        {"name": "policy", "path": str(run / "models" / "policy")},
        {"name": "law", "path": str(law)},
    ]
    assert (settings["max_loras"], settings["max_lora_rank"]) == (2, 16)
    assert settings["distributed_executor_backend"] == "mp"


def test_a_gpu_is_the_endpoints_alone_and_a_cpu_gets_the_threads_of_the_recipe(run: Path) -> None:
    recipe = load_recipe(run / "recipe.yaml", ["generator.kv_cache_gib=null", "cluster.threads=3"])
    what = served(run, recipe)
    on_gpu = engine_settings(what, recipe, on_gpu=True)
    assert on_gpu["kv_cache_memory_bytes"] is None and "gpu_memory_utilization" not in on_gpu
    assert "distributed_executor_backend" not in on_gpu
    assert engine_settings(what, recipe, on_gpu=False)["kv_cache_memory_bytes"] == 1024**3
    assert environment(recipe, on_gpu=False)["OMP_NUM_THREADS"] == "3"
    assert "OMP_NUM_THREADS" not in environment(recipe, on_gpu=True)


def test_a_run_that_made_a_whole_model_serves_it_alone(tiny_model: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tiny_model, tmp_path, stages=["sft"], sft={"sources": [{"path": "x.jsonl"}]})
    with RunStore.open(recipe.runs, recipe) as store:
        shutil.copytree(tiny_model, store.folder / "models" / "sft")
        store.finish("sft", {})
    what = served(store.folder, recipe)
    assert what.names == ("base",)
    assert what.base == (store.folder / "models" / "sft").resolve()
    assert "enable_lora" not in engine_settings(what, recipe, on_gpu=False)


def test_a_run_that_trained_nothing_has_nothing_to_serve(tiny_model: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tiny_model, tmp_path)
    with RunStore.open(recipe.runs, recipe) as store:
        store.finish("sample", {})
    with pytest.raises(StoreError, match="trained no model yet"):
        served(store.folder, recipe)


@pytest.mark.parametrize("entry", ["law", "law=", "=folder", "a:b=folder", "../x=folder", "a/b=folder"])
def test_an_adapter_that_is_not_named_as_it_should_be_is_refused(run: Path, entry: str) -> None:
    with pytest.raises(ModelError, match="NAME=FOLDER"):
        served(run, load_recipe(run / "recipe.yaml"), [entry])


@pytest.mark.parametrize("name", ["base", "policy"])
def test_a_name_that_is_taken_is_refused(run: Path, tiny_model: Path, tmp_path: Path, name: str) -> None:
    law = make_peft_folder(tiny_model, tmp_path / "law")
    with pytest.raises(ModelError, match=f"{name} is taken"):
        served(run, load_recipe(run / "recipe.yaml"), [f"{name}={law}"])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"r": 0}, "numbers above 0"),
        ({"r": 8}, "does not fit the base"),
        ({"r": 1024}, "does not fit the base"),
    ],
)
def test_an_adapter_that_the_engine_would_take_wrongly_is_refused(
    run: Path, tiny_model: Path, tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    law = make_peft_folder(tiny_model, tmp_path / "law", **config)
    with pytest.raises(ModelError, match=message):
        served(run, load_recipe(run / "recipe.yaml"), [f"law={law}"])


def test_an_adapter_of_another_base_is_refused(run: Path, tiny_model: Path, tmp_path: Path) -> None:
    law = make_peft_folder(tiny_model, tmp_path / "law")
    tensors = {"base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": torch.zeros(4, 128)}
    save_file(tensors, law / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"does not fit the base .*layers\.9.*no such layer"):
        served(run, load_recipe(run / "recipe.yaml"), [f"law={law}"])
    save_file({"base_model.model.model.h.0.attn.lora_A.weight": torch.zeros(4, 128)}, law / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"adapts attn\..*The base has .*q_proj"):
        served(run, load_recipe(run / "recipe.yaml"), [f"law={law}"])


def test_a_dry_run_says_what_would_be_served_and_starts_nothing(run: Path, tiny_model: Path) -> None:
    plan = json.loads(tenfold("serve", run, "--dry-run", "--json").stdout)
    assert plan["url"] == "http://127.0.0.1:8000/v1"
    assert (plan["base"], list(plan["adapters"]), plan["key"]) == (str(tiny_model.resolve()), ["policy"], False)
    page = tenfold("serve", run, "--dry-run", "--port", 8123)
    assert page.exit_code == 0
    assert "http://127.0.0.1:8123/v1 would serve, without an API key (nothing was started)" in in_one_line(page.output)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--host", "0.0.0.0"], "there is no API key"),
        (["--api-key-file", "no-such-file"], "cannot be read"),
        (["--adapter", "law=no-such-folder"], "there is no such folder"),
    ],
)
def test_what_cannot_be_served_is_one_message_and_exit_code_2(run: Path, words: list[str], message: str) -> None:
    result = tenfold("serve", run, *words)
    assert result.exit_code == 2
    assert message in in_one_line(result.output)
    assert "Traceback" not in result.output
