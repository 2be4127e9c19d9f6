"""Counts of parameters: exact, from configurations alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.plan.shape import known_model, known_models, shape_of
from configs.schema import LoraConfig, Recipe
from rlhf.errors import ModelError
from tests.recipes import tiny_recipe

# As their makers publish them (the sum over the safetensors' index on each model's page).
PUBLISHED = {
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-72b": 72_706_203_648,
    "mistral-7b": 7_248_023_552,
    "gemma-2b": 2_506_172_416,
    "gemma-7b": 8_537_680_896,
    "smollm2-135m": 134_515_008,
}


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return tiny_recipe("models/Qwen2.5-7B-Instruct", tmp_path)


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_the_count_of_a_known_model_is_the_published_one(recipe: Recipe, name: str, count: int) -> None:
    assert shape_of(recipe, name).num_parameters == count


def test_a_llama_is_counted_as_by_hand(recipe: Recipe, tmp_path: Path) -> None:
    sizes = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
             "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}  # fmt: skip
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "llama", **sizes}))
    shape = shape_of(recipe, str(file))
    layer = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 96 + 2 * 64  # q; k and v; o; gate, up, down; two norms
    assert shape.num_parameters == 2 * 100 * 64 + 3 * layer + 64
    assert (shape.hidden, shape.queries, shape.keys, shape.widest) == (64, 64, 32, 96)
    assert shape.norms_per_layer == 128
    assert shape.largest_module == 100 * 64
    adapter = 3 * 4 * ((64 + 64) * 2 + (64 + 32) * 2 + (64 + 96) * 3)
    assert shape.adapter_parameters(LoraConfig(rank=4)) == adapter
    assert shape.adapter_parameters(LoraConfig(rank=4, targets=("q_proj",))) == 3 * 4 * 128
    assert shape.key_value_bytes(2) == 2 * 3 * 32 * 2


def test_norms_of_queries_and_keys_run_over_each_head(recipe: Recipe) -> None:
    shape = shape_of(recipe, "qwen3-0.6b")
    assert shape.norms_per_layer == 2 * 1024 + 16 * 128 + 8 * 128


def test_a_model_that_is_not_here_is_known_by_its_name(recipe: Recipe) -> None:
    assert shape_of(recipe).name == "qwen2.5-7b"
    assert known_model("Llama-3.1-8B-Instruct") == "llama-3.1-8b"
    assert known_model("gemma-2b-it") == "gemma-2b"
    assert known_model("Mistral-7B-Instruct-v0.3") == "mistral-7b"
    assert known_model("gpt-9") is None


def test_a_folder_is_measured_as_it_is(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    recipe = tiny_recipe(tiny_model, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert shape_of(recipe).num_parameters == sum(parameter.numel() for parameter in model.parameters())


def test_a_model_that_pretrain_makes_has_the_recipes_sizes(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "num_layers": 2, "num_heads": 2}
    recipe = tiny_recipe(
        "", tmp_path, stages=["pretrain"], pretrain={"sizes": sizes, "sources": [{"path": "x.txt"}], "vocab_size": 300}
    )
    shape = shape_of(recipe)
    # The intermediate size is 8/3 of 64 in steps of 64: 192. Embeddings are tied.
    assert shape.num_parameters == 300 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 192 + 2 * 64) + 64


@pytest.mark.parametrize(
    ("text", "words"),
    [("{}", "model_type"), ("not json", "cannot be read"), ('{"model_type": "no-such"}', "builds no decoder")],
)
def test_a_configuration_that_is_none_is_refused(recipe: Recipe, tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(ModelError, match=words):
        shape_of(recipe, str(file))


def test_a_model_that_nobody_knows_is_refused_with_those_that_are(recipe: Recipe) -> None:
    with pytest.raises(ModelError, match=r"Known by name are .*qwen2\.5-7b"):
        shape_of(recipe, "models/gpt-9")


def test_a_lora_target_that_the_model_lacks_is_refused(recipe: Recipe) -> None:
    with pytest.raises(ModelError, match="has no linear layer 'x_proj'"):
        shape_of(recipe).adapter_parameters(LoraConfig(targets=("x_proj",)))


def test_all_known_models_are_of_the_families_that_are_promised() -> None:
    kinds = {json.loads(file.read_text())["model_type"] for file in known_models().values()}
    assert kinds == {"llama", "qwen2", "qwen3", "mistral", "gemma", "gemma3_text"}
