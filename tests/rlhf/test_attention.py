"""Attention over rows: the same rule in every form, and no model that it would be wrong for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from rlhf import attention
from rlhf.errors import ModelError
from rlhf.forward import hidden_states
from rlhf.records import Answer, AnswerGroup, Prompt
from rlhf.rows import MicroBatch, make_micro_batches, visible


def one_batch() -> MicroBatch:
    """Two groups in shared rows; the longest sequence has 9 + 12 tokens."""
    groups = [
        AnswerGroup(
            Prompt("p", (), tuple(range(prompt_len))),
            tuple(Answer(tuple(range(count)), (0.0,) * count, "eos", 0, "") for count in answer_lens),
        )
        for prompt_len, answer_lens in [(5, [3, 1, 7]), (9, [12, 2, 2, 4])]
    ]
    (batch,) = make_micro_batches(groups, rows="shared", max_tokens=1000)
    return batch


@pytest.fixture
def model(tiny_model: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)


@pytest.fixture
def plain(tiny_model: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation="eager")


def test_attention_by_pieces_is_attention_under_the_dense_mask(model: PreTrainedModel) -> None:
    batch = one_batch()
    with torch.no_grad():
        by_pieces = hidden_states(model, batch)
        model.set_attn_implementation("sdpa")
        body = model.base_model
        dense = body(batch.token_ids, position_ids=batch.position_ids, attention_mask=batch.mask).last_hidden_state[0]
    assert torch.allclose(by_pieces, dense[batch.predict], atol=2e-5)


def test_a_padded_batch_means_the_same_after_rows_were_used(model: PreTrainedModel, plain: PreTrainedModel) -> None:
    batch = one_batch()
    ids = torch.tensor([[261, 261, 5, 6], [1, 2, 3, 4]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    with torch.no_grad():
        hidden_states(model, batch)
        found, expected = (one(ids, attention_mask=mask).logits for one in (model, plain))
    assert torch.allclose(found[mask.bool()], expected[mask.bool()], atol=2e-5)


def test_flex_attention_takes_the_same_rule() -> None:
    batch = one_batch()
    query, key, value = torch.randn(3, 1, 2, batch.num_tokens, 16, generator=torch.Generator().manual_seed(0))
    block = create_block_mask(
        visible(batch.row, batch.branch), None, None, batch.num_tokens, batch.num_tokens, device="cpu"
    )
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=batch.mask)
    with pytest.warns(UserWarning, match="flex_attention called without torch.compile"):
        assert torch.allclose(flex_attention(query, key, value, block_mask=block), dense, atol=1e-5)


def test_attention_that_has_no_rows_is_transformers_own(model: PreTrainedModel, plain: PreTrainedModel) -> None:
    model.set_attn_implementation(attention.NAME)
    ids = torch.arange(6)[None]
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, plain(ids).logits, atol=2e-5)


def tiny_qwen(window: int | None = None) -> PreTrainedModel:
    config = Qwen2Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        use_sliding_window=window is not None,
        sliding_window=window,
        max_window_layers=0,
    )
    return Qwen2ForCausalLM(config)


def test_a_sliding_window_that_is_too_short_is_refused() -> None:
    roomy = tiny_qwen(window=21)
    hidden_states(roomy, one_batch())
    narrow = tiny_qwen(window=20)
    with pytest.raises(ModelError, match=r"21 tokens.*see 20 tokens back"):
        hidden_states(narrow, one_batch())
