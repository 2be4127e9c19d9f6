"""Models in Hugging Face layout that stages write: a new decoder from sizes, and what was trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from configs.model_stages import ModelSizes
from rlhf.disk import replacing
from rlhf.import_model import quiet_transformers, set_end_tokens
from rlhf.tokenizer import num_ids

STEP = 64  # the intermediate size is a multiple of it


def llama_config(sizes: ModelSizes, vocab_size: int) -> LlamaConfig:
    """The configuration of a decoder of these sizes, without special tokens."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size or -(-8 * sizes.hidden_size // (3 * STEP)) * STEP,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        num_key_value_heads=sizes.num_key_value_heads or sizes.num_heads,
        max_position_embeddings=sizes.context_tokens,
        tie_word_embeddings=sizes.tie_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": sizes.rope_theta},
    )


def write_new_model(sizes: ModelSizes, tokenizer: Any, folder: Path, *, seed: int) -> int:
    """The number of parameters of the untrained decoder that `folder` now holds, with the tokenizer; float32.

    The same sizes, tokenizer and seed give the same weights: normal with standard deviation 0.02, norms 1.
    """
    config = llama_config(sizes, num_ids(tokenizer))
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = LlamaForCausalLM(config)
    with quiet_transformers(), replacing(folder) as made:
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
    return num_parameters(model)


def write_trained_model(
    model: Any, tensors: Mapping[str, torch.Tensor], tokenizer: Path, folder: Path, dtype: torch.dtype
) -> None:
    """Nothing; `folder` now holds the model with these weights as `dtype`, and the tokenizer of another folder.

    Generation ends at each token that ends a text or a turn. Raises StoreError where it cannot be written.
    """
    words = AutoTokenizer.from_pretrained(str(tokenizer))
    set_end_tokens(model, words)
    with quiet_transformers(), replacing(folder) as made:
        model.save_pretrained(made, state_dict={name: tensor.to(dtype) for name, tensor in tensors.items()})
        model.config.dtype = dtype  # that of the model it was trained in has been written
        model.config.save_pretrained(made)
        words.save_pretrained(made)


def num_parameters(model: Any) -> int:
    """All parameters, those that two layers share counted once."""
    return sum(parameter.numel() for parameter in model.parameters())
