from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.losses import importance_weights, policy_loss, policy_metrics, value_loss

OLD = torch.tensor([-1.0, -1.0, -1.0, -1.0, -1.0])
RATIOS = torch.tensor([1.0, 1.5, 1.5, 0.5, 0.5])
ADVANTAGES = torch.tensor([2.0, 1.0, -1.0, 1.0, -1.0])


def test_policy_loss_at_hand_worked_values():
    logprobs = (OLD + RATIOS.log()).requires_grad_()
    terms = policy_loss(logprobs, OLD, ADVANTAGES, clip_low=0.2, clip_high=0.3)
    # -A·r, or -A·clip(r, 0.8, 1.3) where that is larger
    torch.testing.assert_close(terms.loss, torch.tensor(-2.0 - 1.3 + 1.5 - 0.5 + 0.8))
    assert int(terms.clipped) == 2
    terms.loss.backward()
    # No gradient where the clip decides; elsewhere -A·r.
    torch.testing.assert_close(logprobs.grad, torch.tensor([-2.0, 0.0, 1.5, -0.5, 0.0]))


def test_low_and_high_clip_are_separate():
    logprobs = OLD + RATIOS.log()
    wide_above = policy_loss(logprobs, OLD, ADVANTAGES, clip_low=0.2, clip_high=0.6)
    assert int(wide_above.clipped) == 1
    torch.testing.assert_close(wide_above.loss, torch.tensor(-2.0 - 1.5 + 1.5 - 0.5 + 0.8))
    wide_below = policy_loss(logprobs, OLD, ADVANTAGES, clip_low=0.6, clip_high=0.2)
    torch.testing.assert_close(wide_below.loss, torch.tensor(-2.0 - 1.2 + 1.5 - 0.5 + 0.5))


def test_weights_scale_the_loss_of_each_token_but_no_statistic():
    logprobs = OLD + RATIOS.log()
    weights = torch.tensor([1.0, 2.0, 0.0, 0.5, 0.25])
    plain = policy_loss(logprobs, OLD, ADVANTAGES, clip_low=0.2, clip_high=0.3)
    weighted = policy_loss(logprobs, OLD, ADVANTAGES, clip_low=0.2, clip_high=0.3, weights=weights)
    torch.testing.assert_close(weighted.loss, torch.tensor(-2.0 - 2.6 + 0.0 - 0.25 + 0.2))
    assert weighted.clipped == plain.clipped
    assert weighted.approx_kl == plain.approx_kl


def test_with_the_updates_own_logprobs_the_ratio_is_1_and_the_gradient_that_of_policy_gradient():
    logprobs = torch.tensor([-0.3, -2.0], requires_grad=True)
    terms = policy_loss(logprobs, logprobs.detach(), torch.tensor([0.7, -1.1]), clip_low=0.2, clip_high=0.2)
    assert float(terms.ratio_shift) == 0
    assert float(terms.approx_kl) == 0
    terms.loss.backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([-0.7, 1.1]))


def test_policy_metrics_at_hand_worked_values():
    terms = policy_loss(OLD + RATIOS.log(), OLD, ADVANTAGES, clip_low=0.2, clip_high=0.3)
    metrics = policy_metrics(
        clipped=float(terms.clipped),
        approx_kl=float(terms.approx_kl),
        ratio_shift=float(terms.ratio_shift),
        ratio_shift_sq=float(terms.ratio_shift_sq),
        num_tokens=5,
    )
    assert metrics["policy/clipfrac_avg"] == pytest.approx(0.4)
    assert metrics["policy/approxkl_avg"] == pytest.approx((2 * math.log(1.5) ** 2 + 2 * math.log(0.5) ** 2) / 2 / 5)
    assert metrics["val/ratio"] == pytest.approx(1.0)
    assert metrics["val/ratio_var"] == pytest.approx((2 * 0.25 + 2 * 0.25) / 5)


def test_the_variance_of_ratios_near_1_survives_float32():
    log_ratio = torch.tensor([1e-5, -1e-5] * 5000)
    terms = policy_loss(log_ratio, torch.zeros(10_000), torch.ones(10_000), clip_low=0.2, clip_high=0.2)
    metrics = policy_metrics(
        clipped=0, approx_kl=0, ratio_shift=float(terms.ratio_shift), ratio_shift_sq=float(terms.ratio_shift_sq),
        num_tokens=10_000,
    )  # fmt: skip
    assert metrics["val/ratio_var"] == pytest.approx(1e-10, rel=1e-3)


@given(cut=st.integers(0, 12), seed=st.integers(0, 100))
def test_sums_over_any_split_are_the_sums_over_the_whole(cut: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    new, old, advantages, weights, values, returns = torch.randn(6, 12, generator=generator, dtype=torch.float64)

    def losses(part: slice) -> torch.Tensor:
        terms = policy_loss(
            new[part], old[part], advantages[part], clip_low=0.2, clip_high=0.2, weights=weights[part].abs()
        )
        critic = value_loss(values[part], old[part], returns[part], clip=0.2, weights=weights[part].abs())
        return torch.stack([terms.loss, terms.clipped, terms.approx_kl, terms.ratio_shift, critic.loss, critic.clipped])

    torch.testing.assert_close(losses(slice(0, cut)) + losses(slice(cut, 12)), losses(slice(0, 12)))


@given(
    st.lists(
        st.tuples(st.floats(-3, 3), st.floats(-3, 3), st.floats(-2, 2)), min_size=1, max_size=8
    ),
    st.floats(0.05, 0.9),
    st.floats(0.05, 2),
)  # fmt: skip
def test_policy_loss_is_the_papers_minimum(tokens: list[tuple[float, float, float]], low: float, high: float):
    new, old, advantages = torch.tensor(tokens, dtype=torch.float64).T
    objective = 0.0
    for new_, old_, advantage in tokens:
        ratio = math.exp(new_ - old_)
        objective += min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
    terms = policy_loss(new, old, advantages, clip_low=low, clip_high=high)
    assert float(terms.loss) == pytest.approx(-objective, rel=1e-9, abs=1e-9)


def test_value_loss_at_hand_worked_values():
    values = torch.tensor([1.0, 1.0, -0.5, 0.1], requires_grad=True)
    returns = torch.tensor([2.0, 0.4, 0.0, 0.0])
    terms = value_loss(values, torch.zeros(4), returns, clip=0.2)
    # clipped to 0.2, 0.2, -0.2, 0.1; the larger of (V - R)² and (clipped - R)², halved
    torch.testing.assert_close(terms.loss, torch.tensor((1.8**2 + 0.6**2 + 0.5**2 + 0.1**2) / 2))
    assert int(terms.clipped) == 1
    terms.loss.backward()
    torch.testing.assert_close(values.grad, torch.tensor([0.0, 0.6, -0.5, 0.1]))


def test_value_loss_without_a_clip_is_half_the_squared_error():
    values = torch.tensor([1.0, 1.0], requires_grad=True)
    terms = value_loss(values, torch.zeros(2), torch.tensor([2.0, 0.5]), clip=None, weights=torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(terms.loss, torch.tensor((1.0 + 2 * 0.25) / 2))
    assert int(terms.clipped) == 0


def test_importance_weights_are_truncated_above_and_have_no_gradient():
    old = torch.tensor([-1.0, -1.0, -1.0], requires_grad=True)
    sampling = old.detach() - torch.tensor([math.log(1.5), math.log(3.0), math.log(0.1)])
    weights = importance_weights(old, sampling, clip=2.0)
    torch.testing.assert_close(weights, torch.tensor([1.5, 2.0, 0.1]))
    assert not weights.requires_grad


def test_without_a_clip_there_is_no_importance_correction():
    weights = importance_weights(torch.tensor([-1.0], requires_grad=True), torch.tensor([-3.0]), clip=None)
    assert weights.tolist() == [1.0]
    assert not weights.requires_grad


def test_importance_weights_make_the_gradient_that_of_the_trainers_own_samples():
    """Over all tokens of a small vocabulary: drawn by the engine and weighted, or drawn by the trainer."""
    logits = torch.tensor([0.2, -0.5, 0.9], dtype=torch.float64, requires_grad=True)
    engine = torch.log_softmax(torch.tensor([0.4, -0.4, 0.8], dtype=torch.float64), 0)
    advantages = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    logprobs = torch.log_softmax(logits, 0)
    weights = engine.exp() * importance_weights(logprobs, engine, clip=2.0)
    loss = policy_loss(logprobs, logprobs.detach(), advantages, clip_low=0.2, clip_high=0.2, weights=weights).loss
    (ours,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (exact,) = torch.autograd.grad(-(logprobs.exp() * advantages).sum(), logits)
    torch.testing.assert_close(ours, exact)
