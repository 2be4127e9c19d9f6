"""New decoders from sizes, and models as they are written."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from configs.load import load_recipe
from configs.model_stages import ModelSizes
from rlhf.base_model import llama_config, num_parameters, write_trained_model

RECIPES = Path(__file__).parents[2] / "configs" / "recipes"


def count(sizes: ModelSizes, vocab_size: int) -> int:
    with torch.device("meta"):
        return num_parameters(LlamaForCausalLM(llama_config(sizes, vocab_size)))


def test_the_recipe_of_gpt2s_size_has_as_many_parameters_as_its_page_says() -> None:
    pretrain = load_recipe(RECIPES / "gpt2_124m.yaml").pretrain
    assert pretrain.sizes is not None
    attention, feed_forward, norms = 4 * 768**2, 3 * 768 * 2048, 2 * 768
    worked = 50_304 * 768 + 12 * (attention + feed_forward + norms) + 768
    assert count(pretrain.sizes, pretrain.vocab_size) == worked == 123_587_328


def test_key_heads_that_are_shared_and_a_head_of_its_own_count_as_they_are() -> None:
    sizes = ModelSizes(
        hidden_size=128,
        num_layers=2,
        num_heads=4,
        num_key_value_heads=2,
        intermediate_size=320,
        context_tokens=64,
        tie_embeddings=False,
    )
    # queries and outputs 128², keys and values half of that; three feed-forward matrices; two norms a layer
    layer = 2 * 128**2 + 2 * 128 * 64 + 3 * 128 * 320 + 2 * 128
    assert count(sizes, 300) == 2 * 300 * 128 + 2 * layer + 128


def test_the_feed_forward_width_is_eight_thirds_of_the_hidden_one_in_steps_of_64() -> None:
    sizes = ModelSizes(hidden_size=192, num_layers=1, num_heads=6)
    assert llama_config(sizes, 300).intermediate_size == 512  # 8/3 of 192
    sizes = ModelSizes(hidden_size=256, num_layers=1, num_heads=8)
    assert llama_config(sizes, 300).intermediate_size == 704  # 682.7, up


def test_a_model_trained_in_float32_is_written_and_described_in_the_recipes_type(
    tiny_model: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(str(tiny_model), dtype=torch.float32)
    written = tmp_path / "written"
    write_trained_model(model, model.state_dict(), tiny_model, written, torch.bfloat16)
    assert AutoConfig.from_pretrained(str(written)).dtype == torch.bfloat16
    again = AutoModelForCausalLM.from_pretrained(str(written), dtype="auto")
    assert again.dtype == torch.bfloat16
    assert all(torch.equal(value, model.state_dict()[name].bfloat16()) for name, value in again.state_dict().items())
