"""How far people agree: with each other, with themselves, with the reward model."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rlhf.desk.consensus import mean, ranks, tau
from rlhf.desk.records import GRADES, Agreement, Grade, PairAgreement, PersonAgreement, Tiers
from rlhf.rankings import tiers_from_scores

Label = float | int


@dataclass(frozen=True, slots=True)
class Vote:
    """What one person said of one group, as far as it counts."""

    item: int
    person: str
    tiers: Tiers
    grades: Mapping[int, Grade]
    repeat: bool


def measure(votes: Sequence[Vote], scores: Mapping[int, Sequence[float]]) -> Agreement:
    """Agreement over these votes. Repeats count against their person only.

    Args:
        votes: of all people; at most one of a person and a group that is no repeat, and one that is.
        scores: the reward model's [n], by group, of those that have some.
    """
    first = [vote for vote in votes if not vote.repeat]
    by_item = _by_item(first)
    of_pairs: dict[tuple[str, str], list[float]] = {}
    for group in by_item.values():
        for one, other in itertools.combinations(sorted(group, key=lambda vote: vote.person), 2):
            if (found := tau(one.tiers, other.tiers)) is not None:
                of_pairs.setdefault((one.person, other.person), []).append(found)
    with_self = _with_self(votes)
    with_reward: dict[str, list[float]] = {}
    for vote in first:
        if vote.item in scores and (found := tau(vote.tiers, tiers_from_scores(scores[vote.item]))) is not None:
            with_reward.setdefault(vote.person, []).append(found)
    people = sorted({vote.person for vote in votes})
    return Agreement(
        tau=mean(_all(of_pairs.values())),
        alpha=alpha_ordinal(
            [(vote.person, (vote.item, index), rank) for vote in first for index, rank in ranks(vote.tiers).items()]
        ),
        alpha_grades=alpha_ordinal(
            [(v.person, (v.item, index), GRADES.index(grade)) for v in first for index, grade in v.grades.items()]
        ),
        with_reward=mean(_all(with_reward.values())),
        with_self=mean(_all(with_self.values())),
        num_groups=sum(len(group) > 1 for group in by_item.values()),
        pairs=tuple(
            PairAgreement(one, other, sum(taus) / len(taus), len(taus))
            for (one, other), taus in sorted(of_pairs.items())
        ),
        people=tuple(
            PersonAgreement(
                person,
                mean(_all(taus for pair, taus in of_pairs.items() if person in pair)),
                mean(with_self.get(person, [])),
                len(with_self.get(person, [])),
                mean(with_reward.get(person, [])),
            )
            for person in people
        ),
    )


def alpha_ordinal(labels: Sequence[tuple[str, object, Label]]) -> float | None:
    """Krippendorff's alpha for ordinal data, from (who, which unit, label) triples; None where no unit has two labels.

    The metric is δ²(c, k) = (Σ n(g) for g from c to k, less (n(c) + n(k)) / 2)², n(g) being how often the label g is
    among those that can be paired (Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", section C); the
    rest is NLTK's. Where all of those are the same label, people agree fully: 1.
    """
    by_unit: dict[object, list[Label]] = {}
    for _, unit, label in labels:
        by_unit.setdefault(unit, []).append(label)
    pairable = {unit for unit, found in by_unit.items() if len(found) > 1}
    counts: dict[Label, int] = {}
    for unit in pairable:
        for label in by_unit[unit]:
            counts[label] = counts.get(label, 0) + 1
    if not counts:
        return None
    below: dict[Label, float] = {}  # labels under the middle of each label's own
    total = 0
    for label in sorted(counts):
        below[label] = total + counts[label] / 2
        total += counts[label]

    def distance(c: Label, k: Label) -> float:
        return (below[c] - below[k]) ** 2

    from nltk.metrics.agreement import AnnotationTask  # here, since it takes more than a second

    data = [(who, unit, label) for who, unit, label in labels if unit in pairable]
    return float(AnnotationTask(data, distance=distance).alpha())


def _with_self(votes: Sequence[Vote]) -> dict[str, list[float]]:
    """tau-b of each repeat with its first, by person."""
    first = {(vote.person, vote.item): vote.tiers for vote in votes if not vote.repeat}
    found: dict[str, list[float]] = {}
    for vote in votes:
        before = first.get((vote.person, vote.item))
        if vote.repeat and before is not None and (one := tau(before, vote.tiers)) is not None:
            found.setdefault(vote.person, []).append(one)
    return found


def _by_item(votes: Sequence[Vote]) -> dict[int, list[Vote]]:
    found: dict[int, list[Vote]] = {}
    for vote in votes:
        found.setdefault(vote.item, []).append(vote)
    return found


def _all(lists: Iterable[Sequence[float]]) -> list[float]:
    return list(itertools.chain.from_iterable(lists))
