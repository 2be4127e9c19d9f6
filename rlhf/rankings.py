"""Rankings of a group: from scores to tiers, and how far two agree (rlhf/ranking_losses.py has how to learn from them).

Tiers hold answer indices, best tier first. Several answers in one tier are a tie; answers in no tier were not ranked.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch  # which takes seconds, and the desk needs none of it

Tiers = Sequence[Sequence[int]]


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


def kendall_tau_b(a: Sequence[float] | torch.Tensor, b: Sequence[float] | torch.Tensor) -> float:
    """Rank correlation in [-1, 1] of two series of numbers, corrected for ties (Kendall 1945).

    0 where one of the two is one big tie, for which the coefficient is not defined: it agrees with nothing.
    """
    x, y = _floats(a), _floats(b)
    assert len(x) == len(y), f"{len(x)} numbers against {len(y)}"
    signs = [(_sign(x[i], x[j]), _sign(y[i], y[j])) for i, j in itertools.combinations(range(len(x)), 2)]
    norm = sum(abs(one) for one, _ in signs) * sum(abs(other) for _, other in signs)
    return sum(one * other for one, other in signs) / math.sqrt(norm) if norm else 0.0


def pairwise_accuracy(scores: Sequence[float] | torch.Tensor, tiers: Tiers) -> tuple[float, int]:
    """(right, total) over the pairs that the ranking orders; a pair with equal scores is half right."""
    numbers = _floats(scores)
    right, total = 0.0, 0
    for better, worse in ordered_pairs(tiers):
        right += 1.0 if numbers[better] > numbers[worse] else 0.5 if numbers[better] == numbers[worse] else 0.0
        total += 1
    return right, total


def ordered_pairs(tiers: Tiers) -> list[tuple[int, int]]:
    """(better, worse) for every pair of answers in different tiers."""
    return [pair for upper, lower in itertools.combinations(tiers, 2) for pair in itertools.product(upper, lower)]


def _floats(numbers: Sequence[float] | torch.Tensor) -> list[float]:
    plain = numbers if isinstance(numbers, Sequence) else numbers.detach().double().cpu()
    return [float(number) for number in plain]


def _sign(one: float, other: float) -> int:
    return (one > other) - (one < other)
