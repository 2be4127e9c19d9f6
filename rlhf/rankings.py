"""Rankings of a group: from scores to tiers, from tiers to numbers, and how to learn from them or test against them.

Tiers hold answer indices, best tier first. Several answers in one tier are a tie; answers in no tier were not ranked.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch

Tiers = Sequence[Sequence[int]]

# Of the integral in `_log_tier_first`, over x = log(time · worth of the rest). With this step the trapezoid rule is
# exact to double precision; at the low end the integrand is under exp(LOW), at the high end it has long vanished.
LOW, ABOVE, STEP = -34.0, 6.0, 0.25


def tiers_from_scores(scores: Sequence[float] | torch.Tensor, tie_margin: float = 0.0) -> tuple[tuple[int, ...], ...]:
    """Tiers, best first, indices ascending inside a tier.

    A tier holds the best score that is left and all that equal it or are nearer to it than `tie_margin`. Distances are
    measured from the best of the tier, not from neighbour to neighbour: a chain of small steps is not one big tie.
    """
    numbers = _floats(scores)
    assert all(math.isfinite(number) for number in numbers), f"scores {numbers} are not all finite"
    tiers: list[list[int]] = []
    best = math.inf
    for index in sorted(range(len(numbers)), key=lambda i: (-numbers[i], i)):
        if tiers and (best == numbers[index] or best - numbers[index] < tie_margin):
            tiers[-1].append(index)
        else:
            tiers.append([index])
            best = numbers[index]
    return tuple(tuple(sorted(tier)) for tier in tiers)


def normal_scores(tiers: Tiers, num_answers: int) -> torch.Tensor:
    """[n] what a standard normal sample of that size would score at these ranks: mean 0, best answer highest.

    Blom's approximation of the expected normal order statistics (Blom 1958): -Φ⁻¹((r - 3/8) / (m + 1/4)) for rank r of
    the m ranked answers, with Φ⁻¹(p) = √2 erf⁻¹(2p - 1). Ties share the mean of their ranks' scores, so the sum stays
    0; a fully tied group and answers that are not ranked get exactly 0.
    """
    scores = torch.zeros(num_answers, dtype=torch.float64)
    if len(tiers) < 2:
        return scores.float()
    num_ranked = sum(len(tier) for tier in tiers)
    ranks = torch.arange(1, num_ranked + 1, dtype=torch.float64)
    by_rank = math.sqrt(2) * torch.erfinv(1 - 2 * (ranks - 0.375) / (num_ranked + 0.25))
    first = 0
    for tier in tiers:
        scores[list(tier)] = by_rank[first : first + len(tier)].mean()
        first += len(tier)
    return scores.float()


def kendall_tau_b(a: Sequence[float] | torch.Tensor, b: Sequence[float] | torch.Tensor) -> float:
    """Rank correlation in [-1, 1] of two series of numbers, corrected for ties (Kendall 1945).

    0 where one of the two is one big tie, for which the coefficient is not defined: it agrees with nothing.
    """
    x, y = (torch.tensor(_floats(series), dtype=torch.float64) for series in (a, b))
    assert len(x) == len(y), f"{len(x)} numbers against {len(y)}"
    signs_x = (x[:, None] - x[None, :]).sign()
    signs_y = (y[:, None] - y[None, :]).sign()
    norm = float(signs_x.abs().sum() * signs_y.abs().sum())
    return float((signs_x * signs_y).sum()) / math.sqrt(norm) if norm else 0.0


def pairwise_accuracy(scores: Sequence[float] | torch.Tensor, tiers: Tiers) -> tuple[float, int]:
    """(right, total) over the pairs that the ranking orders; a pair with equal scores is half right."""
    numbers = _floats(scores)
    right, total = 0.0, 0
    for better, worse in _ordered_pairs(tiers):
        right += 1.0 if numbers[better] > numbers[worse] else 0.5 if numbers[better] == numbers[worse] else 0.0
        total += 1
    return right, total


def all_pairs_loss(scores: torch.Tensor, tiers: Tiers) -> torch.Tensor:
    """Scalar: the mean of -log sigmoid(better - worse) over all pairs that the ranking orders; 0 if there is none.

    Bradley-Terry as in InstructGPT (Ouyang et al. 2022, arXiv:2203.02155, equation 1), where the mean over the pairs of
    a group makes the group one element of the batch. Ties and answers that are not ranked form no pairs.

    Args:
        scores: [n], with a gradient.
        tiers: the ranking.
    """
    pairs = _ordered_pairs(tiers)
    if not pairs:
        return scores.sum() * 0
    better, worse = torch.tensor(pairs, device=scores.device).unbind(1)
    return -torch.nn.functional.logsigmoid(scores[better] - scores[worse]).mean()


def plackett_luce_loss(scores: torch.Tensor, tiers: Tiers) -> torch.Tensor:
    """Scalar: -log of the probability of the ranking, where the worth of an answer is exp(score); 0 for a full tie.

    Plackett-Luce chooses the best of what is left, again and again. A tie says that the order inside it is not known:
    the probability sums over all orders of the tied (partitioned preference, Ma et al. 2021, arXiv:2006.05067; in
    survival analysis the exact likelihood for ties, Kalbfleisch and Prentice 1973). So nothing is learned about the
    order inside a tie, and two answers without one give Bradley-Terry's -log sigmoid(better - worse).

    Args:
        scores: [n], with a gradient. Answers that are not ranked have no part in it.
        tiers: the ranking.
    """
    loss = scores.sum() * 0
    for place, tier in enumerate(tiers[:-1]):
        rest = [index for later in tiers[place + 1 :] for index in later]
        loss = loss - _log_tier_first(scores[list(tier)], scores[rest])
    return loss


def select(tiers: Tiers, num_answers: int, best: int, worst: int) -> torch.Tensor:
    """[n] bool, the `best` best and the `worst` worst answers.

    A tier that the cut would split is taken whole, so more may be chosen than asked for: equal answers are treated
    equally, and nothing depends on the order in which they were written. Answers that are not ranked are never chosen.
    """
    chosen = torch.zeros(num_answers, dtype=torch.bool)
    for wanted, ordered in ((best, tiers), (worst, tiers[::-1])):
        taken = 0
        for tier in ordered:
            if taken >= wanted:
                break
            chosen[list(tier)] = True
            taken += len(tier)
    return chosen


def _log_tier_first(tier: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    """Log probability that all of `tier` [m] are chosen before any of `rest` [r], both log worths.

    Give each answer an exponential arrival time whose rate is its worth: the order of arrival is a Plackett-Luce
    ranking. The first of the rest arrives at a time with rate W = Σ worth of the rest, so the probability is
    ∫ Π (1 - exp(-worth · t)) · W exp(-W t) dt, which costs m per point where summing over orders costs m!.
    """
    if len(tier) == 1:
        return -torch.logsumexp(torch.cat([tier, rest]) - tier, 0)
    # Relative to the rest, in float64, so that large scores neither overflow nor cancel.
    relative = tier.double() - torch.logsumexp(rest.double(), 0)
    top = math.log(len(tier) + 1) + ABOVE
    x = torch.arange(LOW, top, STEP, dtype=torch.float64, device=tier.device)
    log_integrand = _log_1_minus_exp(relative[:, None] + x[None, :]).sum(0) + x - x.exp()
    return (torch.logsumexp(log_integrand, 0) + math.log(STEP)).to(tier.dtype)


def _log_1_minus_exp(log_y: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(-y)), with finite gradients for any log y: log y below the clamp, 0 above it, to double precision."""
    inside = log_y.clamp(-36.0, 6.0)
    return torch.log(-torch.expm1(-inside.exp())) + (log_y - inside).clamp(max=0)


def _ordered_pairs(tiers: Tiers) -> list[tuple[int, int]]:
    """(better, worse) for every pair of answers in different tiers."""
    return [pair for upper, lower in itertools.combinations(tiers, 2) for pair in itertools.product(upper, lower)]


def _floats(numbers: Sequence[float] | torch.Tensor) -> list[float]:
    if isinstance(numbers, torch.Tensor):
        return [float(number) for number in numbers.detach().double().cpu()]
    return [float(number) for number in numbers]
