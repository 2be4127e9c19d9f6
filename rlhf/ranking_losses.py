"""What is learned from the ranking of a group: losses, the scores that ranks stand for, which answers are taken.

Tiers are those of `rlhf.rankings`.
"""

from __future__ import annotations

import math

import torch

from rlhf.rankings import Tiers, ordered_pairs

# Of the integral in `_log_tier_first`, over x = log(time · worth of the rest). With this step the trapezoid rule is
# exact to double precision; at the low end the integrand is under exp(LOW), at the high end it has long vanished.
LOW, ABOVE, STEP = -34.0, 6.0, 0.25


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


def all_pairs_loss(scores: torch.Tensor, tiers: Tiers) -> torch.Tensor:
    """Scalar: the mean of -log sigmoid(better - worse) over all pairs that the ranking orders; 0 if there is none.

    Bradley-Terry as in InstructGPT (Ouyang et al. 2022, arXiv:2203.02155, equation 1), where the mean over the pairs of
    a group makes the group one element of the batch. Ties and answers that are not ranked form no pairs.

    Args:
        scores: [n], with a gradient.
        tiers: the ranking.
    """
    pairs = ordered_pairs(tiers)
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
