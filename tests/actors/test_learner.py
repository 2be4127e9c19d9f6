"""The learner: one update whatever the split, exact resumes, and roles that do not disturb each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.base import Base
from actors.learner import Learner, Loss
from configs.schema import LearnerConfig, LoraConfig, ModelConfig, OptimizerConfig
from rlhf.errors import ModelError, StoreError
from rlhf.forward import CHUNK, token_logprobs, token_values
from rlhf.records import AnswerGroup
from rlhf.rows import MicroBatch, Rows, make_micro_batches
from tests.actors.ranks import EPS, Tensors, distance, make_groups, num_tokens, same_bits

pytestmark = pytest.mark.engine

ADAM = OptimizerConfig(lr=1e-2, weight_decay=0.1, eps=EPS)


def make_base(model: Path, *names: str) -> Base:
    base = Base(ModelConfig(path=str(model), dtype="float32"), LoraConfig(rank=4, alpha=8), seed=0)
    for name in names:
        base.attach(name)
    return base


def make_learner(
    base: Base, name: str = "policy", stage: int = 0, rank: int = 0, world_size: int = 1, **changes: Any
) -> Learner:
    optimizer = ADAM.model_copy(update={k: v for k, v in changes.items() if k != "gradient_checkpointing"})
    config = LearnerConfig(zero_stage=stage, gradient_checkpointing=changes.get("gradient_checkpointing", False))
    return Learner(base, name, None, optimizer, config, rank, world_size)


def weight(answer: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """A different coefficient for every token, the same whatever micro-batch it is in."""
    return torch.sin(7.0 * answer + 3.0 * step + 1.0)


def loss_of(base: Base, chunk: int = CHUNK) -> Loss:
    def loss(micro_batch: MicroBatch) -> tuple[torch.Tensor, dict[str, float]]:
        logprobs, _ = token_logprobs(base.model, micro_batch, 1.0, chunk=chunk)
        total = (weight(micro_batch.answer, micro_batch.step) * logprobs).sum()
        return total, {"tokens": float(len(logprobs)), "lowest_max": float(-logprobs.detach().min())}

    return loss


def cut(
    groups: Sequence[AnswerGroup], rows: Rows = "shared", max_tokens: int = 10_000, indices: Sequence[int] | None = None
) -> list[MicroBatch]:
    return make_micro_batches(groups, indices, rows=rows, max_tokens=max_tokens)


def train(base: Base, learner: Learner, steps: Iterable[int]) -> list[float]:
    """The lowest logprob, negated, of each of some updates, every one on groups of its own."""
    batches = [make_groups(seed=step) for step in steps]
    return [learner.step(cut(groups), loss_of(base), num_tokens(groups))["lowest_max"] for groups in batches]


def by_hand(base: Base, groups: Sequence[AnswerGroup], max_grad_norm: float) -> tuple[Tensors, float]:
    """(parameters after one update, norm of the gradient), by plain torch over one answer at a time."""
    parameters = base.parameters("policy")
    adamw = torch.optim.AdamW(parameters.values(), lr=1e-2, betas=(0.9, 0.95), eps=EPS, weight_decay=0.1)
    with base.use("policy"):
        for index in range(sum(len(group.answers) for group in groups)):
            (micro_batch,) = cut(groups, "separate", indices=[index])
            loss, _ = loss_of(base)(micro_batch)
            (loss / num_tokens(groups)).backward()
    norm = torch.nn.utils.clip_grad_norm_(parameters.values(), max_grad_norm)
    adamw.step()
    return {name: p.detach().clone() for name, p in parameters.items()}, float(norm)


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize(("rows", "max_tokens"), [("shared", 10_000), ("shared", 25), ("separate", 30)])
def test_an_update_is_that_of_plain_torch_however_it_is_split(
    tiny_model: Path, process_group: None, stage: int, rows: Rows, max_tokens: int
):
    groups = make_groups()
    expected, norm = by_hand(make_base(tiny_model, "policy"), groups, max_grad_norm=0.05)
    assert norm > 0.05  # so that clipping matters
    base = make_base(tiny_model, "policy")
    learner = make_learner(base, stage=stage, max_grad_norm=0.05)
    metrics = learner.step(cut(groups, rows, max_tokens), loss_of(base), num_tokens(groups))
    assert distance(learner.tensors(), expected) < 1e-5
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert metrics["tokens"] == num_tokens(groups)


def test_a_second_update_does_not_keep_gradients_of_the_first(tiny_model: Path, process_group: None):
    groups = make_groups()
    norms: list[float] = []
    for stage in (0, 2):
        base = make_base(tiny_model, "policy")
        learner = make_learner(base, stage=stage, lr=1e-30)
        norms += [learner.step(cut(groups), loss_of(base), num_tokens(groups))["grad_norm"] for _ in range(2)]
    assert norms == pytest.approx([norms[0]] * 4, rel=1e-5)


@pytest.mark.parametrize("stage", [0, 2])
def test_training_one_role_leaves_the_other_as_it_was(tiny_model: Path, process_group: None, stage: int):
    base = make_base(tiny_model, "policy", "critic")
    head = base.value_head()
    policy = make_learner(base, "policy", stage)
    critic = Learner(base, "critic", head, ADAM, LearnerConfig(zero_stage=stage), 0, 1)
    frozen = {n: p.detach().clone() for n, p in base.model.named_parameters() if "lora_" not in n}

    def value_loss(micro_batch: MicroBatch) -> tuple[torch.Tensor, dict[str, float]]:
        return (token_values(base.model, head, micro_batch) - 1).square().sum(), {}

    train(base, policy, [0])
    after_policy = policy.tensors()
    groups = make_groups(seed=1)
    for _ in range(2):  # the head is zero at first, so that the adapter gets a gradient in the second update only
        critic.step(cut(groups), value_loss, num_tokens(groups))
    assert distance(policy.tensors(), after_policy) == 0
    after_critic = critic.tensors()
    assert float(after_critic["head.weight"].abs().max()) > 0
    assert any(float(t.abs().max()) > 0 for name, t in after_critic.items() if "lora_B" in name)
    train(base, policy, [1])
    assert distance(critic.tensors(), after_critic) == 0
    assert distance(policy.tensors(), after_policy) > 1e-3
    assert all(torch.equal(p, frozen[n]) for n, p in base.model.named_parameters() if n in frozen)


def test_two_roles_on_one_base_learn_what_they_learn_alone(tiny_model: Path, process_group: None):
    alone = make_base(tiny_model, "policy")
    expected = make_learner(alone)
    train(alone, expected, range(2))
    base = make_base(tiny_model, "policy", "reward")
    policy, reward = make_learner(base, "policy"), make_learner(base, "reward")
    for step in range(2):
        train(base, policy, [step])
        train(base, reward, [step])
    assert distance(policy.tensors(), expected.tensors()) == 0


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_three_updates_a_resume_and_three_more_are_six_bit_for_bit(tiny_model: Path, process_group: None, stage: int):
    base = make_base(tiny_model, "policy")
    straight = make_learner(base, stage=stage, warmup_steps=4)
    train(base, straight, range(3))
    saved = straight.state()
    lowest = train(base, straight, range(3, 6))
    again = make_base(tiny_model, "policy")
    resumed = make_learner(again, stage=stage, warmup_steps=4)
    resumed.load_state(saved)
    assert same_bits(resumed.state(), saved)
    assert train(again, resumed, range(3, 6)) == lowest
    assert same_bits(resumed.state(), straight.state())
    # A learner that has gone on can go back, too.
    straight.load_state(saved)
    train(base, straight, range(3, 6))
    assert same_bits(straight.state(), resumed.state())


def test_a_state_goes_from_one_zero_stage_to_another(tiny_model: Path, process_group: None):
    base = make_base(tiny_model, "policy")
    learner = make_learner(base, stage=0)
    train(base, learner, range(2))
    saved = learner.state()
    train(base, learner, [2])
    other_base = make_base(tiny_model, "policy")
    other = make_learner(other_base, stage=2)
    other.load_state(saved)
    assert same_bits(other.state(), saved)
    train(other_base, other, [2])
    assert distance(other.state().tensors, learner.state().tensors) < 1e-5


def test_a_state_from_before_the_first_update_starts_afresh(tiny_model: Path, process_group: None):
    base = make_base(tiny_model, "policy")
    learner = make_learner(base)
    start = learner.state()
    train(base, learner, range(2))
    expected = learner.state()
    learner.load_state(start)
    train(base, learner, range(2))
    assert same_bits(learner.state(), expected)


def test_a_state_of_another_shape_is_refused(tiny_model: Path, process_group: None):
    learner = make_learner(make_base(tiny_model, "policy"))
    wide = Base(ModelConfig(path=str(tiny_model), dtype="float32"), LoraConfig(rank=8), seed=0)
    wide.attach("policy")
    with pytest.raises(StoreError, match=r"does not fit: .*lora_A.* is \(8, 256\), here it is \(4, 256\)"):
        learner.load_state(make_learner(wide).state())


def test_the_rate_warms_up_in_a_line_and_stays(tiny_model: Path, process_group: None):
    base = make_base(tiny_model, "policy")
    learner = make_learner(base, lr=0.4, warmup_steps=3)
    groups = make_groups(1)
    rates = [learner.step(cut(groups), loss_of(base), num_tokens(groups))["lr"] for _ in range(5)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4])


@pytest.mark.parametrize("stage", [0, 2])
def test_a_gradient_that_is_not_finite_stops_the_run_and_changes_nothing(
    tiny_model: Path, process_group: None, stage: int
):
    base = make_base(tiny_model, "policy")
    learner = make_learner(base, stage=stage)
    groups = make_groups()
    before = learner.tensors()

    def broken(micro_batch: MicroBatch) -> tuple[torch.Tensor, dict[str, float]]:
        loss, sums = loss_of(base)(micro_batch)
        return loss * float("nan"), sums

    with pytest.raises(ModelError, match=r"gradient of policy at update 1 .*learning rate \(0\.01\)"):
        learner.step(cut(groups), broken, num_tokens(groups))
    assert distance(learner.tensors(), before) == 0
    assert not base.model.training
    train(base, learner, [0])
    fresh_base = make_base(tiny_model, "policy")
    fresh = make_learner(fresh_base, stage=stage)
    train(fresh_base, fresh, [0])
    assert distance(learner.tensors(), fresh.tensors()) == 0


def test_gradient_checkpointing_changes_no_update(tiny_model: Path, process_group: None):
    results: list[Tensors] = []
    for checkpointing in (False, True):
        base = make_base(tiny_model, "policy")
        learner = make_learner(base, gradient_checkpointing=checkpointing)
        train(base, learner, [0])
        results.append(learner.tensors())
        assert not base.model.training
    assert distance(*results) < 1e-6
    assert any(getattr(module, "gradient_checkpointing", False) for module in base.model.modules())
