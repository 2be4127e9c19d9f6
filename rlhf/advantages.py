"""Advantages: how much better an answer, or a token of it, was than expected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

WHITEN_EPSILON = 1e-8  # of the variance, as TRL's PPO
GROUP_EPSILON = 1e-4  # of the standard deviation, as TRL's GRPO


def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and returns, both [N, T], 0 at padding (Schulman et al. 2016, arXiv:1506.02438, equations 11 to 16).

    The last token of an answer ends it, whether it is an EOS or was cut by length: no value is bootstrapped behind it.
    Padding is never read, whatever it holds.

    Args:
        rewards: [N, T], on writing each token.
        values: [N, T], of the state before each token.
        mask: [N, T] bool, true at answer tokens; padding on the right.
        gamma: discount per token.
        lam: λ; 1 gives Monte Carlo returns, 0 one-step errors.
    """
    rewards, values = rewards.where(mask, 0), values.where(mask, 0)
    advantages = torch.zeros_like(rewards)
    next_advantage = next_value = torch.zeros_like(rewards[:, 0])
    for step in reversed(range(rewards.shape[1])):
        error = rewards[:, step] + gamma * next_value - values[:, step]
        # At padding rewards and values are 0 and so is this: the last token finds nothing behind it.
        next_advantage = error + gamma * lam * next_advantage
        next_value = values[:, step]
        advantages[:, step] = next_advantage
    return advantages, advantages + values


def whiten(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[N, T] with mean 0 and standard deviation 1 over all answer tokens together, 0 at padding.

    One call sees the whole batch of a step, before it is split over ranks and micro-batches: the split cannot
    change the result. The variance is the unbiased one, as in TRL; fewer than two tokens are only centred.
    """
    valid = x[mask].double()
    if valid.numel() == 0:
        return torch.zeros_like(x)
    scale = torch.rsqrt(valid.var() + WHITEN_EPSILON) if valid.numel() > 1 else 1.0
    white = torch.zeros_like(x)
    white[mask] = ((valid - valid.mean()) * scale).to(x.dtype)
    return white


def group_advantages(
    scores: torch.Tensor, group_sizes: Sequence[int], scale: Literal["std", "none"] = "std"
) -> torch.Tensor:
    """[N] score minus the mean of its group, divided by the group's standard deviation unless `scale` is "none".

    GRPO (Shao et al. 2024, arXiv:2402.03300, section 4.1.2; without the division: Liu et al. 2025, arXiv:2503.20783).
    The standard deviation is the unbiased one. A group whose scores are all equal, or that has one answer, gets
    exactly 0.
    """
    parts = [_centred(group) for group in _groups(scores, group_sizes)]
    if scale == "std":
        parts = [part / (part.std() + GROUP_EPSILON) if part.numel() > 1 else part for part in parts]
    return torch.cat(parts).to(scores.dtype)


def group_loo(scores: torch.Tensor, group_sizes: Sequence[int]) -> torch.Tensor:
    """[N] score minus the mean of the other answers of its group.

    RLOO (Ahmadian et al. 2024, arXiv:2402.14740). With n answers that is n / (n - 1) times the distance from the
    group's mean. A group whose scores are all equal, or that has one answer, gets exactly 0.
    """
    parts = [_centred(group) for group in _groups(scores, group_sizes)]
    parts = [part * (part.numel() / (part.numel() - 1)) if part.numel() > 1 else part for part in parts]
    return torch.cat(parts).to(scores.dtype)


def _groups(scores: torch.Tensor, group_sizes: Sequence[int]) -> Sequence[torch.Tensor]:
    assert sum(group_sizes) == len(scores), f"groups of {sum(group_sizes)} answers in all, {len(scores)} scores"
    return torch.split(scores.double(), list(group_sizes))


def _centred(group: torch.Tensor) -> torch.Tensor:
    # Rounding of the mean must not turn a tie into a signal that the division would blow up.
    return torch.zeros_like(group) if bool((group == group[:1]).all()) else group - group.mean()
