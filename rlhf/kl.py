"""How far the policy is from the reference, and what that costs.

Everywhere, KL means KL(policy || reference), in nats, estimated from tokens that the policy sampled.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, assert_never

import torch

from configs.ppo import KLConfig

Estimator = Literal["k1", "k2", "k3"]

MAX_ERROR = 0.2  # Ziegler et al. 2019, section 2.2


def kl_estimate(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, estimator: Estimator) -> torch.Tensor:
    """Estimates per token (nats), of the shape of the inputs; 0 wherever both inputs are 0, as at padding.

    Schulman, "Approximating KL divergence" (2020), with d = log policy - log reference: k1 = d (unbiased, may be
    negative), k2 = d² / 2 (biased, low variance), k3 = exp(-d) + d - 1 (unbiased, never negative).
    """
    difference = logprobs - ref_logprobs
    match estimator:
        case "k1":
            return difference
        case "k2":
            return difference.square() / 2
        case "k3":
            return torch.expm1(-difference) + difference
    assert_never(estimator)


def kl_loss(
    logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    estimator: Estimator,
    *,
    old_logprobs: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Scalar: the sum over tokens, whose value is that of the estimator and whose gradient is that of the KL.

    Differentiating an estimator does not give the gradient of the KL (Tang and Munos 2025, arXiv:2506.09477; Liu et
    al. 2025, "Rethinking KL regularization in RLHF"): k1's is zero on average, k3's belongs to another divergence.
    The gradient is ∇KL = E_policy[d · ∇log policy], which on fresh samples is k2's. For tokens that an earlier policy
    sampled, both value and gradient carry the ratio policy / old policy, which makes them unbiased again; k3 times
    that ratio then has this very gradient too.

    It is the KL of each next-token distribution at the states that were visited. What a token does to later states is
    not in it; KL in the reward has that.

    Args:
        logprobs: [K] nats, with a gradient.
        ref_logprobs: [K] nats.
        estimator: for the value.
        old_logprobs: [K] nats, of the policy that sampled; None: this policy did.
        weights: [K], constant factor of each token; None: 1.
    """
    fixed = logprobs.detach()
    factor = torch.ones_like(fixed) if old_logprobs is None else torch.exp(fixed - old_logprobs.detach())
    if weights is not None:
        factor = factor * weights.detach()
    value = (factor * kl_estimate(fixed, ref_logprobs.detach(), estimator)).sum()
    slope = factor * (fixed - ref_logprobs.detach())
    # The bracket is exactly 0 in value, so that only the gradient of its first part remains.
    return value + (slope * (logprobs - fixed)).sum()


class KLController:
    """The coefficient β: fixed, or moved towards a target KL (Ziegler et al. 2019, arXiv:1909.08593, section 2.2)."""

    def __init__(self, config: KLConfig) -> None:
        self._config = config
        self.beta = config.beta

    def update(self, kl_per_answer: float, num_answers: int) -> float:
        """The new β after a step of `num_answers` answers with a mean KL of `kl_per_answer` nats.

        β is multiplied by 1 + clip(kl / target - 1, ±0.2) · answers / horizon. A step larger than the horizon counts as
        one horizon, so that β stays positive.
        """
        if self._config.adaptive:
            error = min(max(kl_per_answer / self._config.target - 1, -MAX_ERROR), MAX_ERROR)
            self.beta *= 1 + error * min(num_answers / self._config.horizon, 1.0)
        return self.beta

    def state(self) -> dict[str, object]:
        """What a resume needs, as plain values."""
        return {"beta": self.beta}

    def load_state(self, state: Mapping[str, object]) -> None:
        """Takes back what `state` gave, where β moves; a fixed one is the recipe's, which may have changed."""
        beta = state["beta"]
        assert isinstance(beta, int | float), f"KL state holds beta={beta!r}"
        if self._config.adaptive:
            self.beta = float(beta)
