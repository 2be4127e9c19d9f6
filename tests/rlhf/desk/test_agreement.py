"""Agreement by hand, and against what was published."""

from __future__ import annotations

import pytest

from rlhf.desk.agreement import Vote, alpha_ordinal, measure
from rlhf.desk.consensus import mean_rank, mean_tau, ranks, tau
from rlhf.desk.records import Tiers

# Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", section C: four observers, twelve units.
OBSERVERS = {
    "A": [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
    "B": [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
    "C": [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
    "D": [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
}


def test_ties_share_the_mean_of_their_ranks():
    assert ranks(((3,), (0, 1), (2,))) == {3: 1, 0: 2.5, 1: 2.5, 2: 4}


def test_tau_is_over_what_both_ranked_and_undefined_where_one_orders_nothing_of_it():
    assert tau(((0,), (1,), (2,)), ((0,), (1,), (2,))) == pytest.approx(1)
    assert tau(((0,), (1,), (2,)), ((2,), (1,), (0,))) == pytest.approx(-1)
    # Of three pairs one is a tie in the second: 2 / sqrt(3 · 2).
    assert tau(((0,), (1,), (2,)), ((0,), (1, 2))) == pytest.approx(2 / 6**0.5)
    assert tau(((0,), (1,), (5,)), ((1,), (0,), (7,))) == pytest.approx(-1)
    assert tau(((0,), (1,)), ((0, 1), (2,))) is None
    assert tau(((0,), (1,)), ()) is None


def test_alpha_is_the_published_one():
    labels = [
        (who, unit, value)
        for who, values in OBSERVERS.items()
        for unit, value in enumerate(values)
        if value is not None
    ]
    assert alpha_ordinal(labels) == pytest.approx(0.815, abs=5e-4)


def test_alpha_of_labels_that_cannot_be_compared_is_none_and_of_one_label_full():
    assert alpha_ordinal([]) is None
    assert alpha_ordinal([("a", 1, 2), ("b", 2, 2)]) is None
    assert alpha_ordinal([("a", 1, 2), ("b", 1, 2)]) == 1


@pytest.mark.parametrize(
    ("rankings", "one"),
    [
        ([((0,), (1,), (2,))], ((0,), (1,), (2,))),
        ([((0,), (1,), (2,)), ((1,), (0,), (2,))], ((0, 1), (2,))),
        ([((0,), (1,), (2,)), ((1,), (0,), (2,)), ((0, 1), (2,))], ((0, 1), (2,))),
        # Relative ranks: 0 has (1/6 + 1/4) / 2, 1 has (1/2 + 3/4) / 2, 2 has 5/6 of one who is half of two.
        ([((0,), (1,), (2,)), ((0,), (1,))], ((0,), (1,), (2,))),
        # 2 was ranked by one of three.
        ([((2,), (0,), (1,)), ((0,), (1,)), ((0,), (1,))], ((0,), (1,))),
        ([(), ()], ()),
    ],
)
def test_rankings_become_one_by_mean_rank(rankings: list[Tiers], one: Tiers):
    assert mean_rank(rankings) == one


def test_equal_thirds_are_a_tie():
    assert mean_rank([((0,), (1,), (2,)), ((1,), (2,), (0,)), ((2,), (0,), (1,))]) == ((0, 1, 2),)


def test_mean_tau_leaves_out_pairs_that_say_nothing():
    assert mean_tau([((0,), (1,)), ((0,), (1,)), ((0, 1),)]) == pytest.approx(1)
    assert mean_tau([((0,), (1,))]) is None


def test_agreement_is_told_per_pair_per_person_with_oneself_and_with_the_reward_model():
    up: Tiers = ((0,), (1,), (2,))
    down: Tiers = ((2,), (1,), (0,))
    votes = [
        Vote(1, "ann", up, {0: "good", 2: "bad"}, False),
        Vote(1, "bob", up, {0: "good", 2: "bad"}, False),
        Vote(1, "eve", down, {}, False),
        Vote(2, "ann", up, {}, False),
        Vote(2, "bob", down, {}, False),
        Vote(1, "ann", down, {}, True),
        Vote(2, "ann", up, {}, True),
    ]
    found = measure(votes, {1: [3.0, 2.0, 1.0]})
    pairs = {(pair.one, pair.other): (pytest.approx(pair.tau), pair.num_groups) for pair in found.pairs}
    assert pairs == {("ann", "bob"): (0, 2), ("ann", "eve"): (-1, 1), ("bob", "eve"): (-1, 1)}
    assert found.tau == pytest.approx((1 - 1 - 1 - 1) / 4)
    assert found.num_groups == 2
    assert found.with_self == pytest.approx(0)
    assert found.with_reward == pytest.approx((1 + 1 - 1) / 3)
    assert found.alpha_grades == pytest.approx(1)
    ann, bob, eve = found.people
    assert ann.with_others == pytest.approx((1 - 1 - 1) / 3)
    assert (ann.with_self, ann.num_repeats) == (pytest.approx(0), 2)
    assert (bob.with_self, bob.num_repeats) == (None, 0)
    assert eve.with_reward == pytest.approx(-1)
