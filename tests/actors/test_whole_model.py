"""The learner over a whole model: what pretraining and full fine-tuning stand on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.base import Base
from actors.learner import Learner
from configs.schema import Dtype, LearnerConfig, LoraConfig, ModelConfig, OptimizerConfig
from tests.actors.ranks import EPS, distance, make_groups, num_tokens, same_bits
from tests.actors.test_learner import cut, loss_of, train

pytestmark = pytest.mark.engine

ADAM = OptimizerConfig(lr=1e-3, weight_decay=0.1, eps=EPS, max_grad_norm=0.5)


def make(model: Path, stage: int = 0, dtype: Dtype = "float32", num_updates: int | None = None, **changes: Any):
    base = Base(ModelConfig(path=str(model), dtype=dtype), LoraConfig(), seed=0)
    config = LearnerConfig(zero_stage=stage)
    return base, Learner(base, None, None, ADAM.model_copy(update=changes), config, 0, 1, num_updates)


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("max_tokens", [10_000, 30])
def test_an_update_of_all_parameters_is_that_of_plain_torch(
    tiny_model: Path, process_group: None, stage: int, max_tokens: int
):
    groups = make_groups()
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    matrices = [parameter for parameter in plain.parameters() if parameter.dim() > 1]
    norms = [parameter for parameter in plain.parameters() if parameter.dim() == 1]
    adamw = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}],
        lr=1e-3,
        betas=(0.9, 0.95),
        eps=EPS,
    )
    total = torch.zeros(())
    flat = [(group.prompt.token_ids, answer.token_ids) for group in groups for answer in group.answers]
    for index, (prompt, answer) in enumerate(flat):
        logits = plain(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
        logprobs = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).squeeze(1)
        total = total + (torch.sin(7.0 * index + 3.0 * torch.arange(len(answer)) + 1.0) * logprobs).sum()
    (total / num_tokens(groups)).backward()
    norm = float(torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5))
    adamw.step()
    base, learner = make(tiny_model, stage)
    metrics = learner.step(cut(groups, "separate", max_tokens), loss_of(base), num_tokens(groups))
    assert norm > 0.5 and metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
    expected = {name: parameter.detach() for name, parameter in plain.named_parameters()}
    assert distance(learner.tensors(), expected) < 1e-5


@pytest.mark.parametrize("stage", [0, 2])
def test_three_updates_a_resume_and_three_more_are_six_bit_for_bit(tiny_model: Path, process_group: None, stage: int):
    base, whole = make(tiny_model, stage, "float32", 6, schedule="cosine", warmup_steps=1)
    train(base, whole, range(6))
    base, first = make(tiny_model, stage, "float32", 6, schedule="cosine", warmup_steps=1)
    train(base, first, range(3))
    base, second = make(tiny_model, stage, "float32", 6, schedule="cosine", warmup_steps=1)
    second.load_state(first.state())
    train(base, second, range(3, 6))
    assert same_bits(second.state(), whole.state())


def test_weights_are_float32_where_passes_are_bfloat16(tiny_model: Path, process_group: None):
    groups = make_groups()
    losses: list[float] = []
    for dtype in ("float32", "bfloat16"):
        base, learner = make(tiny_model, 0, dtype)
        losses.append(learner.step(cut(groups), loss_of(base), num_tokens(groups))["lowest_max"])
        assert {tensor.dtype for tensor in learner.tensors().values()} == {torch.float32}
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.02)


def test_a_cosine_rises_over_the_warm_up_and_ends_at_its_share_with_the_last_update(
    tiny_model: Path, process_group: None
):
    _, learner = make(tiny_model, 0, "float32", 6, schedule="cosine", warmup_steps=1, min_lr_share=0.2, lr=1.0)
    rates: list[float] = []
    for update in range(8):
        learner.updates = update
        rates.append(learner.lr)
    falling = [0.2 + 0.8 * (1 + math.cos(math.pi * way / 4)) / 2 for way in range(5)]
    assert rates == pytest.approx([0.5, *falling, 0.2, 0.2])
    assert rates[1] == 1.0 and rates[5] == pytest.approx(0.2)


def test_adapters_do_not_go_on_a_model_that_is_trained_as_a_whole(tiny_model: Path):
    base = Base(ModelConfig(path=str(tiny_model), dtype="float32"), LoraConfig(), seed=0)
    base.attach("policy")
    with pytest.raises(AssertionError, match="has adapters: policy"):
        base.train_all()
