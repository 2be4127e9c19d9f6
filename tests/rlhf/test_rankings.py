from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.ranking_losses import all_pairs_loss, normal_scores, plackett_luce_loss, select
from rlhf.rankings import kendall_tau_b, pairwise_accuracy, tiers_from_scores

Tiers = tuple[tuple[int, ...], ...]
Loss = Callable[[torch.Tensor, Sequence[Sequence[int]]], torch.Tensor]


@st.composite
def rankings(draw: st.DrawFn, max_answers: int = 6) -> tuple[list[float], Tiers]:
    """Scores and a ranking of the same answers, with ties, some of them perhaps not ranked."""
    num = draw(st.integers(2, max_answers))
    scores = draw(st.lists(st.floats(-4, 4), min_size=num, max_size=num))
    places = draw(st.lists(st.integers(0, 3), min_size=num, max_size=num))
    tiers = tuple(tuple(i for i in range(num) if places[i] == place) for place in range(3))
    return scores, tuple(tier for tier in tiers if tier)


def nll_over_all_orders(scores: list[float], tiers: Tiers) -> float:
    """-log of the sum, over all full orders that agree with the tiers, of their Plackett-Luce probabilities."""
    total = 0.0
    for order in itertools.product(*(itertools.permutations(tier) for tier in tiers)):
        flat = [index for tier in order for index in tier]
        total += math.prod(
            math.exp(scores[index]) / sum(math.exp(scores[other]) for other in flat[place:])
            for place, index in enumerate(flat)
        )
    return -math.log(total)


def test_tiers_are_best_first_and_equal_scores_are_a_tie():
    assert tiers_from_scores([0.5, 2.0, 0.5, -1.0, 2.0]) == ((1, 4), (0, 2), (3,))
    assert tiers_from_scores(torch.tensor([1.0, 1.0])) == ((0, 1),)


def test_scores_nearer_than_the_margin_are_a_tie():
    assert tiers_from_scores([1.0, 0.75, 0.5], tie_margin=0.25) == ((0,), (1,), (2,))
    assert tiers_from_scores([1.0, 0.75, 0.5], tie_margin=0.3) == ((0, 1), (2,))


def test_a_chain_of_small_steps_is_not_one_big_tie():
    assert tiers_from_scores([0.0, 0.1, 0.2, 0.3, 0.4, 0.5], tie_margin=0.25) == ((3, 4, 5), (0, 1, 2))


def test_a_score_that_is_not_finite_cannot_be_ranked():
    with pytest.raises(AssertionError, match="finite"):
        tiers_from_scores([1.0, math.nan])


def test_normal_scores_of_ten_are_bloms():
    tiers = [(i,) for i in range(10)]
    expected = [-NormalDist().inv_cdf((rank - 0.375) / 10.25) for rank in range(1, 11)]
    assert normal_scores(tiers, 10).tolist() == pytest.approx(expected, abs=1e-6)
    # Expected normal order statistics of ten (Harter 1961), which Blom approximates.
    exact = [1.5388, 1.0014, 0.6561, 0.3758, 0.1227]
    assert normal_scores(tiers, 10)[:5].tolist() == pytest.approx(exact, abs=0.01)


def test_ties_share_the_mean_of_their_ranks_scores():
    plain = normal_scores([(2,), (0,), (1,), (3,)], 4)
    tied = normal_scores([(2,), (0, 1), (3,)], 4)
    assert tied.tolist() == pytest.approx([0.0, 0.0, float(plain[2]), float(plain[3])], abs=1e-6)
    tied_at_the_top = normal_scores([(0, 1), (2,), (3,)], 4)
    top = [-NormalDist().inv_cdf((rank - 0.375) / 4.25) for rank in (1, 2)]
    assert float(tied_at_the_top[0]) == float(tied_at_the_top[1]) == pytest.approx(sum(top) / 2, abs=1e-6)


def test_a_fully_tied_group_and_unranked_answers_get_exactly_zero():
    assert normal_scores([tuple(range(10))], 10).tolist() == [0.0] * 10
    assert normal_scores([], 3).tolist() == [0.0] * 3
    assert normal_scores([(4,), (1,)], 5).tolist() == pytest.approx([0, -0.5895, 0, 0, 0.5895], abs=1e-4)


@given(rankings())
def test_normal_scores_are_centred_and_fall_from_tier_to_tier(case: tuple[list[float], Tiers]):
    scores, tiers = case
    numbers = normal_scores(tiers, len(scores))
    assert float(numbers.sum()) == pytest.approx(0.0, abs=1e-5)
    for upper, lower in itertools.pairwise(tiers):
        assert float(numbers[list(upper)].min()) > float(numbers[list(lower)].max())
    for tier in tiers:
        assert len({float(numbers[i]) for i in tier}) == 1


def test_kendalls_tau_at_hand_worked_values():
    assert kendall_tau_b([1, 2, 3, 4], [10, 20, 30, 40]) == 1.0
    assert kendall_tau_b([1, 2, 3, 4], [4, 3, 2, 1]) == -1.0
    assert kendall_tau_b([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx((5 - 1) / 6)
    # one tie in a: 2 concordant pairs of 3, over √(2 · 3)
    assert kendall_tau_b(torch.tensor([1.0, 1.0, 2.0]), [1, 2, 3]) == pytest.approx(2 / math.sqrt(6))
    assert kendall_tau_b([1, 1, 1], [1, 2, 3]) == 0.0


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=12))
def test_kendalls_tau_is_kendalls_count_of_pairs(points: list[tuple[int, int]]):
    concordant = discordant = only_in_a = only_in_b = 0
    for (a1, b1), (a2, b2) in itertools.combinations(points, 2):
        concordant += (a1 - a2) * (b1 - b2) > 0
        discordant += (a1 - a2) * (b1 - b2) < 0
        only_in_a += a1 == a2 and b1 != b2
        only_in_b += b1 == b2 and a1 != a2
    pairs = concordant + discordant
    norm = math.sqrt((pairs + only_in_a) * (pairs + only_in_b))
    expected = (concordant - discordant) / norm if norm else 0.0
    assert kendall_tau_b([a for a, _ in points], [b for _, b in points]) == pytest.approx(expected)


def test_pairwise_accuracy_counts_ordered_pairs_and_halves_equal_scores():
    # pairs: 0>1 right, 0>2 right, 0>3 equal; 1 and 2 are tied, so are no pair; 1>3 wrong, 2>3 right
    assert pairwise_accuracy([2.0, 0.0, 3.0, 2.0], [(0,), (1, 2), (3,)]) == (1 + 0 + 0.5 + 0 + 1, 5)
    assert pairwise_accuracy(torch.tensor([2.0, 0.0]), [(0, 1)]) == (0.0, 0)
    assert pairwise_accuracy([5.0, 1.0, 9.0], [(0,), (1,)]) == (1.0, 1)


@pytest.mark.parametrize("better", [-40.0, -1.5, 0.0, 0.3, 20.0])
def test_both_losses_of_two_answers_without_a_tie_are_bradley_terry(better: float):
    scores = torch.tensor([0.25, better], dtype=torch.float64, requires_grad=True)
    expected = -torch.nn.functional.logsigmoid(scores[1] - scores[0])
    (gradient,) = torch.autograd.grad(expected, scores)
    for loss in (plackett_luce_loss, all_pairs_loss):
        value = loss(scores, [(1,), (0,)])
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(torch.autograd.grad(value, scores)[0], gradient)


def test_plackett_luce_of_three_at_hand_worked_values():
    scores = torch.tensor([math.log(1.0), math.log(2.0), math.log(3.0)])
    # 3 first of {1, 2, 3}, then 1 of {1, 2}
    torch.testing.assert_close(plackett_luce_loss(scores, [(2,), (0,), (1,)]), -torch.tensor(3 / 6 * 1 / 3).log())
    # the order of the two that follow is not known
    torch.testing.assert_close(plackett_luce_loss(scores, [(2,), (0, 1)]), -torch.tensor(3 / 6).log())
    # 2 and 3 before 1, in either order: 2/6 · 3/4 + 3/6 · 2/3
    torch.testing.assert_close(plackett_luce_loss(scores, [(1, 2), (0,)]), -torch.tensor(0.25 + 1 / 3).log())


@settings(deadline=None)
@given(rankings())
def test_plackett_luce_sums_over_all_orders_of_the_tied(case: tuple[list[float], Tiers]):
    scores, tiers = case
    loss = plackett_luce_loss(torch.tensor(scores, dtype=torch.float64), tiers)
    assert float(loss) == pytest.approx(nll_over_all_orders(scores, tiers), abs=1e-9)


@settings(deadline=None, max_examples=30)
@given(rankings(max_answers=5))
def test_the_gradient_of_plackett_luce_is_that_of_finite_differences(case: tuple[list[float], Tiers]):
    scores, tiers = case
    tensor = torch.tensor(scores, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(plackett_luce_loss(tensor, tiers), tensor)
    for index in range(len(scores)):
        up, down = list(scores), list(scores)
        up[index] += 1e-5
        down[index] -= 1e-5
        slope = (nll_over_all_orders(up, tiers) - nll_over_all_orders(down, tiers)) / 2e-5
        assert float(gradient[index]) == pytest.approx(slope, abs=1e-7)


def test_plackett_luce_of_a_large_tie_is_finite_in_float32_for_any_scores():
    for scale in (1.0, 100.0, 1000.0):
        scores = (torch.randn(40, generator=torch.Generator().manual_seed(0)) * scale).requires_grad_()
        loss = plackett_luce_loss(scores, [tuple(range(20)), tuple(range(20, 40))])
        (gradient,) = torch.autograd.grad(loss, scores)
        assert bool(loss.isfinite()) and bool(gradient.isfinite().all())
        assert float(gradient.sum()) == pytest.approx(0.0, abs=1e-4)  # only differences of scores count


def test_a_tie_that_is_far_ahead_costs_almost_nothing_and_still_the_right_amount():
    scores = torch.tensor([20.0, 20.5, 0.0], dtype=torch.float64)
    # The chance that the third comes before the later of the two: its worth times the mean time until both are there.
    expected = math.exp(-20) + math.exp(-20.5) - 1 / (math.exp(20) + math.exp(20.5))
    assert float(plackett_luce_loss(scores, [(0, 1), (2,)])) == pytest.approx(expected, rel=1e-4)


def test_all_pairs_loss_is_the_mean_over_the_groups_pairs():
    scores = torch.tensor([0.3, -0.2, 1.0, 0.7])
    tiers = [(2,), (0, 3), (1,)]
    pairs = [(2, 0), (2, 3), (2, 1), (0, 1), (3, 1)]
    expected = sum(math.log1p(math.exp(-float(scores[a] - scores[b]))) for a, b in pairs) / len(pairs)
    assert float(all_pairs_loss(scores, tiers)) == pytest.approx(expected)


@pytest.mark.parametrize("loss", [plackett_luce_loss, all_pairs_loss])
def test_a_fully_tied_group_has_neither_loss_nor_gradient(loss: Loss):
    scores = torch.tensor([0.3, -0.2, 1.0], requires_grad=True)
    for tiers in ([(0, 1, 2)], [(1,)], []):
        value = loss(scores, tiers)
        assert float(value.detach()) == 0.0
        assert torch.autograd.grad(value, scores)[0].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("loss", [plackett_luce_loss, all_pairs_loss])
def test_answers_that_are_not_ranked_are_left_out_of_the_losses(loss: Loss):
    scores = torch.tensor([0.3, 50.0, -0.2, 1.0], requires_grad=True)
    value = loss(scores, [(3,), (0, 2)])
    torch.testing.assert_close(value, loss(scores[[0, 2, 3]], [(2,), (0, 1)]))
    assert float(torch.autograd.grad(value, scores)[0][1]) == 0.0


def test_the_best_and_the_worst_are_selected():
    tiers = [(3,), (0,), (4,), (1,), (2,)]
    assert select(tiers, 5, best=2, worst=1).tolist() == [True, False, True, True, False]
    assert select(tiers, 5, best=0, worst=2).tolist() == [False, True, True, False, False]
    assert select(tiers, 5, best=2, worst=0).tolist() == [True, False, False, True, False]


def test_a_tie_at_the_cut_is_kept_together():
    tiers = [(3,), (0, 4), (1,), (2, 5)]
    assert select(tiers, 6, best=2, worst=0).tolist() == [True, False, False, True, True, False]
    assert select(tiers, 6, best=1, worst=1).tolist() == [False, False, True, True, False, True]
    assert select([(0, 1, 2)], 3, best=1, worst=0).tolist() == [True] * 3


def test_an_answer_that_is_both_best_and_worst_is_selected_once_and_an_unranked_one_never():
    assert select([(0,), (2,)], 4, best=2, worst=2).tolist() == [True, False, True, False]


@given(rankings(), st.integers(0, 6), st.integers(0, 6))
def test_selection_never_splits_a_tie_and_takes_at_least_what_is_asked(
    case: tuple[list[float], Tiers], best: int, worst: int
):
    scores, tiers = case
    chosen = select(tiers, len(scores), best, worst)
    for tier in tiers:
        assert len({bool(chosen[i]) for i in tier}) == 1
    num_ranked = sum(len(tier) for tier in tiers)
    assert int(chosen.sum()) >= min(max(best, worst), num_ranked)
