"""What policy and critic minimise. Inputs are flat, one element per token; results are sums, never means.

The learner divides by the number of tokens of the whole minibatch, over all ranks and micro-batches, so that any
split gives the same update. Statistics are sums as well, for the same reason.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class PolicyTerms:
    """Sums over the tokens of a micro-batch, each a scalar. All but `loss` are without a gradient and unweighted."""

    loss: torch.Tensor
    clipped: torch.Tensor  # tokens where the clip decided
    approx_kl: torch.Tensor  # ½ (log new - log old)², as TRL's policy/approxkl_avg
    ratio_shift: torch.Tensor  # ratio - 1: near 1 float32 would lose the variance of the ratio itself
    ratio_shift_sq: torch.Tensor


@dataclass(frozen=True, slots=True)
class ValueTerms:
    """Sums over the tokens of a micro-batch, each a scalar; `clipped` is without a gradient and unweighted."""

    loss: torch.Tensor
    clipped: torch.Tensor  # tokens where the clip decided


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
    weights: torch.Tensor | None = None,
) -> PolicyTerms:
    """Sums, of them the loss Σ w · max(-A·r, -A·clip(r, 1 - low, 1 + high)), r = policy / old policy.

    Schulman et al. 2017 (arXiv:1707.06347, equation 7), with two bounds as DAPO (Yu et al. 2025, arXiv:2503.14476,
    equation 10).

    Args:
        logprobs: [K] nats, with a gradient.
        old_logprobs: [K] nats, before the update. Where the update's own serve, give `logprobs.detach()`.
        advantages: [K].
        clip_low: how far the ratio may fall under 1.
        clip_high: how far it may rise over 1.
        weights: [K], constant factor of each token (importance weights); None: 1.
    """
    log_ratio = logprobs - old_logprobs.detach()
    ratio = log_ratio.exp()
    advantages = advantages.detach()
    plain = -advantages * ratio
    bounded = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    losses = torch.maximum(plain, bounded)
    shift = torch.expm1(log_ratio.detach())
    return PolicyTerms(
        loss=(losses if weights is None else weights.detach() * losses).sum(),
        clipped=(bounded > plain).sum(),
        approx_kl=(log_ratio.detach().square() / 2).sum(),
        ratio_shift=shift.sum(),
        ratio_shift_sq=shift.square().sum(),
    )


def policy_metrics(
    *, clipped: float, approx_kl: float, ratio_shift: float, ratio_shift_sq: float, num_tokens: float
) -> dict[str, float]:
    """Metrics, under TRL's names, from sums over any number of micro-batches, minibatches and ranks."""
    shift = ratio_shift / num_tokens
    return {
        "policy/approxkl_avg": approx_kl / num_tokens,
        "policy/clipfrac_avg": clipped / num_tokens,
        "val/ratio": 1 + shift,
        "val/ratio_var": max(ratio_shift_sq / num_tokens - shift * shift, 0.0),
    }


def value_loss(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    *,
    clip: float | None,
    weights: torch.Tensor | None = None,
) -> ValueTerms:
    """Sums, of them the loss Σ w · ½ · max((V - R)², (clip(V, V_old ± clip) - R)²).

    The clip is that of the PPO baselines, kept by TRL (Huang et al. 2024, arXiv:2403.17031, "The N+ Implementation
    Details of RLHF with PPO").

    Args:
        values: [K], with a gradient.
        old_values: [K], before the update.
        returns: [K].
        clip: how far a value may move in one step; None: as far as it likes.
        weights: [K], constant factor of each token; None: 1.
    """
    returns, old_values = returns.detach(), old_values.detach()
    plain = (values - returns).square()
    if clip is None:
        losses, clipped = plain, torch.zeros((), dtype=torch.int64, device=values.device)
    else:
        bounded = (values.clamp(old_values - clip, old_values + clip) - returns).square()
        losses, clipped = torch.maximum(plain, bounded), (bounded > plain).sum()
    return ValueTerms(loss=(losses if weights is None else weights.detach() * losses).sum() / 2, clipped=clipped)


def importance_weights(old_logprobs: torch.Tensor, sampling_logprobs: torch.Tensor, clip: float | None) -> torch.Tensor:
    """Policy / engine per token, at most `clip`, of the shape of the inputs, without a gradient.

    It corrects for tokens that the engine drew with slightly other probabilities than the trainer computes: truncated
    importance sampling (Ionides 2008; for this gap Yao et al. 2025, "Your efficient RL framework secretly brings you
    off-policy RL training"). Where an older policy wrote the answers, the weight corrects for that, too: with the ratio
    of `policy_loss` to the policy before the update, it is the decoupled objective of Hilton et al. 2021
    (arXiv:2110.00641). `clip` None: no correction, all 1.
    """
    if clip is None:
        return torch.ones_like(old_logprobs, requires_grad=False)
    return torch.exp(old_logprobs.detach() - sampling_logprobs.detach()).clamp(max=clip)
