"""What `benchmarks/people.py` makes of scores: folds of whole trees, pairs that were ordered right, intervals."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.estimates import Estimate
from rlhf.rankings import Tiers, pairwise_accuracy
from rlhf.statistics import bootstrap_ratio

RESAMPLES, SEED = 10_000, 0


@dataclass(frozen=True, slots=True)
class List:
    """Answers to one prompt as people ranked them."""

    prompt_id: str
    tree: str  # lists of one tree share prompts and the people who wrote them
    tiers: Tiers


def folds_of(trees: Sequence[str], num: int, seed: int) -> dict[str, int]:
    """The fold of each tree, 0 .. num - 1: all lists of a tree are in one fold, and folds have as many trees, or one
    less.

    By a hash, so that the order in which trees are given plays no part.
    """
    assert num >= 2, "one part is held out, and something is left to train on"
    ordered = sorted(set(trees), key=lambda tree: hashlib.sha256(f"{seed}|fold|{tree}".encode()).hexdigest())
    return {tree: place % num for place, tree in enumerate(ordered)}


def right_by_tree(lists: Sequence[List], scores: Mapping[str, Sequence[float]]) -> tuple[torch.Tensor, torch.Tensor]:
    """([G] pairs in the right order, [G] pairs) of each tree, in order of the trees' names.

    Pairs are those that people ordered; one whose scores are equal is half right.
    """
    counts: dict[str, tuple[float, int]] = {tree: (0.0, 0) for tree in sorted({one.tree for one in lists})}
    for one in lists:
        right, total = pairwise_accuracy(scores[one.prompt_id], one.tiers)
        before = counts[one.tree]
        counts[one.tree] = (before[0] + right, before[1] + total)
    right, total = zip(*counts.values(), strict=True)
    return torch.tensor(right, dtype=torch.float64), torch.tensor(total, dtype=torch.float64)


def accuracy(lists: Sequence[List], scores: Mapping[str, Sequence[float]]) -> Estimate:
    """The share of all pairs that the scores order right; trees are drawn for the interval."""
    right, total = right_by_tree(lists, scores)
    return _estimate(right, total)


def gain(lists: Sequence[List], scores: Mapping[str, Sequence[float]], over: Mapping[str, Sequence[float]]) -> Estimate:
    """The first's accuracy less the other's, on the same pairs and with the same trees drawn for both."""
    right, total = right_by_tree(lists, scores)
    return _estimate(right - right_by_tree(lists, over)[0], total)


def mean_of_lists(lists: Sequence[List], scores: Mapping[str, Sequence[float]]) -> float:
    """Accuracy as the stage `reward` tells it: each list counts once, however many pairs it has."""
    shares = [right / total for right, total in (pairwise_accuracy(scores[o.prompt_id], o.tiers) for o in lists)]
    return sum(shares) / len(shares)


def summary(lists: Sequence[List], judges: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, Any]:
    """All figures of these lists, as JSON holds them.

    Args:
        judges: by name, the scores [n] of each list, by prompt id.
    """
    names = list(judges)
    return {
        "num_trees": len({one.tree for one in lists}),
        "num_lists": len(lists),
        "num_pairs": int(right_by_tree(lists, judges[names[0]])[1].sum()),
        "accuracy": {name: _plain(accuracy(lists, judges[name])) for name in names},
        "mean_of_lists": {name: mean_of_lists(lists, judges[name]) for name in names},
        "gain": {
            f"{one} less {other}": _plain(gain(lists, judges[one], judges[other]))
            for place, one in enumerate(names)
            for other in names[place + 1 :]
        },
    }


def table(found: Mapping[str, Any], seconds: Mapping[str, float]) -> str:
    """A line for each judge and for each difference."""
    lines = [
        f"\n{found['num_lists']} lists of {found['num_trees']} trees, {found['num_pairs']} pairs that people ordered",
        f"{'':36}{'accuracy':>9}  {'95 % (trees)':>16}{'mean of lists':>15}{'training':>10}",
    ]
    for name, one in found["accuracy"].items():
        took = f"{seconds[name]:8.0f} s" if name in seconds else ""
        spread = f"{one['low']:.3f} - {one['high']:.3f}"
        lines.append(f"{name:36}{one['mean']:9.3f}  {spread:>16}{found['mean_of_lists'][name]:15.3f}{took:>10}")
    for name, one in found["gain"].items():
        spread = f"{one['low']:+.3f} - {one['high']:+.3f}"
        lines.append(f"{name:36}{one['mean']:+9.3f}  {spread:>16}")
    return "\n".join(lines) + "\n"


def _estimate(part: torch.Tensor, whole: torch.Tensor) -> Estimate:
    return Estimate(float(part.sum() / whole.sum()), *bootstrap_ratio(part, whole, RESAMPLES, SEED))


def _plain(one: Estimate) -> dict[str, float]:
    return {"mean": one.mean, "low": one.low, "high": one.high}
