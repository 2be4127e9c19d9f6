"""Several people's rankings of one group become one, by mean rank."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from rlhf.desk.records import Tiers
from rlhf.rankings import kendall_tau_b

NEAR = 1e-9  # mean ranks nearer than this are equal: thirds add up with an error in the last bits


def ranks(tiers: Tiers) -> dict[int, float]:
    """The rank of each answer, 1 the best; ties have the mean of the ranks that they take up together."""
    found: dict[int, float] = {}
    first = 1
    for tier in tiers:
        found |= dict.fromkeys(tier, first + (len(tier) - 1) / 2)
        first += len(tier)
    return found


def tau(one: Tiers, other: Tiers) -> float | None:
    """Kendall's tau-b in [-1, 1] over the answers that both ranked; None where either calls all of those equal."""
    a, b = ranks(one), ranks(other)
    both = sorted(a.keys() & b.keys())
    x, y = [a[index] for index in both], [b[index] for index in both]
    if len(set(x)) < 2 or len(set(y)) < 2:
        return None
    return kendall_tau_b(x, y)


def mean_tau(rankings: Sequence[Tiers]) -> float | None:
    """Mean tau-b over the pairs of rankings; None where no pair has one."""
    return mean([found for one, other in itertools.combinations(rankings, 2) if (found := tau(one, other)) is not None])


def mean_rank(rankings: Sequence[Tiers]) -> Tiers:
    """One ranking: by the mean, over those who ranked it, of an answer's relative rank; equal means are a tie.

    The relative rank is (rank - 1/2) / (number ranked), so that a rank of a partial ranking weighs as much as that of
    a whole one; where all rankings are whole, the order is that of the mean rank (Borda's). An answer that fewer than
    half of the people ranked is not ranked.
    """
    places: dict[int, list[float]] = {}
    for tiers in rankings:
        found = ranks(tiers)
        for index, rank in found.items():
            places.setdefault(index, []).append((rank - 0.5) / len(found))
    means = {index: sum(p) / len(p) for index, p in places.items() if 2 * len(p) >= len(rankings)}
    merged: list[list[int]] = []
    last = -math.inf
    for index in sorted(means, key=lambda i: (means[i], i)):
        if means[index] - last > NEAR:
            merged.append([])
        last = means[index]
        merged[-1].append(index)
    return tuple(tuple(sorted(tier)) for tier in merged)


def mean(numbers: Sequence[float]) -> float | None:
    """The mean; None of none."""
    return sum(numbers) / len(numbers) if numbers else None
