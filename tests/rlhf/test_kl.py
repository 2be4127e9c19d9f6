from __future__ import annotations

import math
from typing import Literal

import pytest
import torch

from configs.ppo import KLConfig
from rlhf.kl import KLController, kl_estimate, kl_loss

ESTIMATORS: tuple[Literal["k1", "k2", "k3"], ...] = ("k1", "k2", "k3")
POLICY = torch.tensor([0.3, -0.8, 1.1, 0.0], dtype=torch.float64)  # logits of a vocabulary of four
REF = torch.log_softmax(torch.tensor([0.9, 0.1, -0.4, 0.2], dtype=torch.float64), 0)
OLD = torch.log_softmax(torch.tensor([0.0, -0.3, 0.6, 0.4], dtype=torch.float64), 0)


def exact_kl(logits: torch.Tensor) -> torch.Tensor:
    logprobs = torch.log_softmax(logits, 0)
    return (logprobs.exp() * (logprobs - REF)).sum()


def exact_gradient() -> torch.Tensor:
    logits = POLICY.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(exact_kl(logits), logits)
    return gradient


def expected_gradient(estimator: Literal["k1", "k2", "k3"], sampled_by: torch.Tensor | None) -> torch.Tensor:
    """The mean of the loss's gradient over all tokens, each as often as the sampling policy draws it."""
    logits = POLICY.clone().requires_grad_()
    logprobs = torch.log_softmax(logits, 0)
    often = (logprobs if sampled_by is None else sampled_by).detach().exp()
    loss = kl_loss(logprobs, REF, estimator, old_logprobs=sampled_by, weights=often)
    (gradient,) = torch.autograd.grad(loss, logits)
    return gradient


def test_the_three_estimators_at_hand_worked_values():
    logprobs, ref = torch.tensor([-1.0, -2.0, 0.0]), torch.tensor([-1.5, -1.0, 0.0])
    assert kl_estimate(logprobs, ref, "k1").tolist() == [0.5, -1.0, 0.0]
    assert kl_estimate(logprobs, ref, "k2").tolist() == [0.125, 0.5, 0.0]
    expected = [math.exp(-0.5) + 0.5 - 1, math.exp(1.0) - 1.0 - 1, 0.0]
    torch.testing.assert_close(kl_estimate(logprobs, ref, "k3"), torch.tensor(expected))


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(estimator: Literal["k1", "k3"]):
    logprobs = torch.log_softmax(POLICY, 0)
    mean = (logprobs.exp() * kl_estimate(logprobs, REF, estimator)).sum()
    torch.testing.assert_close(mean, exact_kl(POLICY))


def test_k2_and_k3_are_never_negative():
    logprobs, ref = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0))
    assert float(kl_estimate(logprobs, ref, "k2").min()) >= 0
    assert float(kl_estimate(logprobs, ref, "k3").min()) >= 0


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_kl_in_the_loss_has_the_gradient_of_the_kl(estimator: Literal["k1", "k2", "k3"]):
    torch.testing.assert_close(expected_gradient(estimator, None), exact_gradient())


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_kl_in_the_loss_has_the_gradient_of_the_kl_on_tokens_of_an_older_policy(estimator: Literal["k1", "k2", "k3"]):
    torch.testing.assert_close(expected_gradient(estimator, OLD), exact_gradient())


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_kl_in_the_loss_has_the_value_of_the_kl_on_tokens_of_an_older_policy(estimator: Literal["k1", "k3"]):
    logprobs = torch.log_softmax(POLICY, 0)
    value = kl_loss(logprobs, REF, estimator, old_logprobs=OLD, weights=OLD.exp())
    torch.testing.assert_close(value, exact_kl(POLICY))


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_differentiating_the_estimator_itself_would_not_give_that_gradient(estimator: Literal["k1", "k3"]):
    logits = POLICY.clone().requires_grad_()
    logprobs = torch.log_softmax(logits, 0)
    loss = (logprobs.detach().exp() * kl_estimate(logprobs, REF, estimator)).sum()
    (naive,) = torch.autograd.grad(loss, logits)
    assert float((naive - exact_gradient()).abs().max()) > 0.05
    if estimator == "k1":
        torch.testing.assert_close(naive, torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_kl_in_the_loss_has_the_value_of_its_estimator(estimator: Literal["k1", "k2", "k3"]):
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    ref = torch.tensor([-1.5, -1.0])
    torch.testing.assert_close(kl_loss(logprobs, ref, estimator), kl_estimate(logprobs, ref, estimator).sum())


def test_weights_and_the_older_policy_scale_each_token():
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    ref, old = torch.tensor([-1.5, -1.0]), torch.tensor([-1.0 - math.log(2), -2.0 + math.log(4)])
    loss = kl_loss(logprobs, ref, "k1", old_logprobs=old, weights=torch.tensor([3.0, 5.0]))
    torch.testing.assert_close(loss, torch.tensor(3 * 2 * 0.5 + 5 * 0.25 * -1.0))
    loss.backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([3 * 2 * 0.5, 5 * 0.25 * -1.0]))


def test_beta_stays_unless_it_is_adaptive():
    controller = KLController(KLConfig(beta=0.3))
    assert controller.update(100.0, 10_000) == 0.3


def test_adaptive_beta_at_hand_worked_values():
    controller = KLController(KLConfig(beta=0.1, adaptive=True, target=5.0, horizon=1000))
    assert controller.update(5.5, 100) == pytest.approx(0.1 * 1.01)  # error 0.1, a tenth of the horizon
    assert controller.update(50.0, 100) == pytest.approx(0.1 * 1.01 * 1.02)  # error 9, clipped to 0.2
    assert controller.update(0.0, 500) == pytest.approx(0.1 * 1.01 * 1.02 * 0.9)  # error -1, clipped to -0.2
    assert controller.update(-3.0, 1000) == pytest.approx(0.1 * 1.01 * 1.02 * 0.9 * 0.8)  # a negative estimate


def test_adaptive_beta_stays_positive_in_steps_larger_than_the_horizon():
    controller = KLController(KLConfig(beta=0.1, adaptive=True, target=5.0, horizon=10))
    assert controller.update(0.0, 1000) == pytest.approx(0.08)


def test_a_restored_controller_goes_on_as_if_nothing_had_happened():
    config = KLConfig(beta=0.1, adaptive=True, target=5.0, horizon=1000)
    through, first, second = KLController(config), KLController(config), KLController(config)
    for kl in (9.0, 2.0):
        through.update(kl, 160)
        first.update(kl, 160)
    second.load_state(first.state())
    assert second.beta == through.beta
    assert second.update(5.3, 160) == through.update(5.3, 160)
