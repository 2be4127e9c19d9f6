"""The loss of text against plain cross-entropy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf.packing import pack
from rlhf.text_loss import text_loss

TEXTS = [[5, 9, 17, 3, 8], [40, 41, 42], [7, 7, 7, 7, 90, 12, 4]]


def whole(texts: list[list[int]], trained: list[list[bool]] | None = None) -> Any:
    """One micro-batch of these texts; by default all of each is trained."""
    masks = trained or [[True] * len(ids) for ids in texts]
    pairs = [(np.array(ids), np.array(mask)) for ids, mask in zip(texts, masks, strict=True)]
    (micro_batch,) = pack(pairs, 100)
    return micro_batch


def plain_nats(model: Any, texts: list[list[int]]) -> torch.Tensor:
    """The same sum by a pass for each text and torch's own cross-entropy."""
    total = torch.zeros(())
    for ids in texts:
        logits = model(torch.tensor([ids])).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum")
    return total


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("chunk", [1, 4, 256])
def test_loss_and_all_gradients_are_those_of_plain_cross_entropy(tiny_model: Path, tied: bool, chunk: int):
    ours: Any = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    theirs: Any = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    for model in (ours, theirs):
        model.config.tie_word_embeddings = tied
        if tied:
            model.lm_head.weight = model.model.embed_tokens.weight
    expected = plain_nats(theirs, TEXTS)
    expected.backward()
    nats = text_loss(ours, whole(TEXTS), chunk=chunk)
    (nats * 0.5).backward()  # a scale reaches both the body and the head
    assert float(nats.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, 0.5 * other.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_only_trained_tokens_cost(tiny_model: Path):
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    ids, mask = [5, 9, 17, 3], [False, False, True, True]
    logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = -(logs[1, 17] + logs[2, 3])
    assert float(text_loss(model, whole([ids], [mask])).detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_a_frozen_head_gets_no_gradient_and_the_body_does(tiny_model: Path):
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model.lm_head.weight.requires_grad_(False)
    text_loss(model, whole(TEXTS)).backward()
    assert model.lm_head.weight.grad is None
    assert float(model.model.layers[0].mlp.up_proj.weight.grad.abs().sum()) > 0


def test_without_gradients_the_loss_is_the_same(tiny_model: Path):
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.no_grad():
        without = text_loss(model, whole(TEXTS))
    assert float(without) == pytest.approx(float(text_loss(model, whole(TEXTS)).detach()), rel=1e-6)


def test_under_autocast_the_gradient_of_the_head_stays_float32(tiny_model: Path):
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        nats = text_loss(model, whole(TEXTS))
        nats.backward()
    assert nats.dtype == model.lm_head.weight.grad.dtype == torch.float32
    assert float(nats.detach()) == pytest.approx(float(plain_nats(model, TEXTS).detach()), rel=0.05)
