from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.advantages import gae, group_advantages, group_loo, whiten


def gae_by_definition(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """Equation 16 of the GAE paper for one answer that ends: Σ (γλ)^l δ, with nothing behind the last token."""
    errors = [
        reward + gamma * (values[t + 1] if t + 1 < len(values) else 0.0) - values[t] for t, reward in enumerate(rewards)
    ]
    return [sum((gamma * lam) ** (s - t) * errors[s] for s in range(t, len(errors))) for t in range(len(errors))]


def test_gae_at_hand_worked_values():
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.6, 0.7]])
    advantages, returns = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), gamma=0.9, lam=0.5)
    # errors: 0.9·0.6 - 0.5 = 0.04, 0.9·0.7 - 0.6 = 0.03, 1 - 0.7 = 0.3; each carries 0.45 of the next advantage
    torch.testing.assert_close(advantages, torch.tensor([[0.04 + 0.45 * 0.165, 0.03 + 0.45 * 0.3, 0.3]]))
    torch.testing.assert_close(returns, advantages + values)


def test_without_discount_and_with_lambda_1_returns_are_the_rewards_to_go():
    rewards, values = torch.tensor([[-0.1, -0.2, 2.0]]), torch.tensor([[5.0, -3.0, 0.4]])
    _, returns = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), gamma=1.0, lam=1.0)
    torch.testing.assert_close(returns, torch.tensor([[1.7, 1.8, 2.0]]))


def test_a_cut_answer_has_no_bootstrap():
    # The second answer is longer, so the first has padding, where a value stands that must not be its future.
    mask = torch.tensor([[True, True, False, False], [True, True, True, True]])
    rewards = torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    values = torch.tensor([[0.2, 0.3, 9.0, 9.0], [0.1, 0.1, 0.1, 0.1]])
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=0.95)
    torch.testing.assert_close(advantages[0], torch.tensor([0.1 + 0.95 * 0.7, 0.7, 0.0, 0.0]))
    assert returns[0, 2:].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("garbage", [1e30, math.inf, -math.inf, math.nan])
def test_masked_positions_leak_nothing_into_gae(garbage: float):
    mask = torch.tensor([[True, True, False], [True, True, True], [True, False, False]])
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 3, 3, generator=generator) * mask
    clean = gae(rewards, values, mask, 0.9, 0.8)
    dirty = gae(rewards.where(mask, garbage), values.where(mask, garbage), mask, 0.9, 0.8)
    for ours, theirs in zip(dirty, clean, strict=True):
        assert torch.equal(ours, theirs)
        assert bool((ours[~mask] == 0).all())


@given(
    answers=st.lists(
        st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=1, max_size=6), min_size=1, max_size=4
    ),
    gamma=st.floats(0, 1),
    lam=st.floats(0, 1),
)
def test_gae_is_its_definition_for_any_lengths(answers: list[list[tuple[float, float]]], gamma: float, lam: float):
    width = max(len(answer) for answer in answers)
    padded = torch.full((2, len(answers), width), math.nan, dtype=torch.float64)
    mask = torch.zeros(len(answers), width, dtype=torch.bool)
    for row, answer in enumerate(answers):
        padded[:, row, : len(answer)] = torch.tensor(answer, dtype=torch.float64).T
        mask[row, : len(answer)] = True
    advantages, _ = gae(padded[0], padded[1], mask, gamma, lam)
    for row, answer in enumerate(answers):
        expected = gae_by_definition([r for r, _ in answer], [v for _, v in answer], gamma, lam)
        assert advantages[row, : len(answer)].tolist() == pytest.approx(expected, abs=1e-9)


def test_whitening_is_over_all_tokens_of_the_batch_together():
    mask = torch.tensor([[True, True, True], [True, False, False]])
    x = torch.tensor([[1.0, 2.0, 3.0], [6.0, math.nan, math.inf]])
    white = whiten(x, mask)
    # mean 3, unbiased variance (4 + 1 + 0 + 9) / 3
    expected = torch.tensor([[-2.0, -1.0, 0.0], [3.0, 0.0, 0.0]]) / math.sqrt(14 / 3)
    torch.testing.assert_close(white, expected)


def test_whitening_does_not_depend_on_how_answers_are_ordered_or_padded():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 5, generator=generator)
    mask = torch.arange(5)[None, :] < torch.tensor([1, 5, 3, 2, 4, 5])[:, None]
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    wider = torch.nn.functional.pad(x, (0, 3), value=math.nan), torch.nn.functional.pad(mask, (0, 3))
    torch.testing.assert_close(whiten(x[order], mask[order]), whiten(x, mask)[order])
    torch.testing.assert_close(whiten(*wider)[:, :5], whiten(x, mask))


def test_whitening_equal_or_single_numbers_gives_zero():
    one = torch.tensor([[True, False]])
    assert whiten(torch.tensor([[3.0, math.nan]]), one).tolist() == [[0.0, 0.0]]
    assert whiten(torch.full((2, 2), 3.0), torch.ones(2, 2, dtype=torch.bool)).abs().max() == 0


def test_group_advantages_at_hand_worked_values():
    scores = torch.tensor([1.0, 2.0, 3.0, 10.0, 10.0, 13.0])
    advantages = group_advantages(scores, [3, 3])
    std = math.sqrt(3)  # of the second group: distances -1, -1, 2, unbiased variance 6 / 2
    expected = [-1 / 1.0001, 0, 1 / 1.0001, -1 / (std + 1e-4), -1 / (std + 1e-4), 2 / (std + 1e-4)]
    torch.testing.assert_close(advantages, torch.tensor(expected))


def test_group_advantages_without_scale_are_distances_from_the_mean():
    scores = torch.tensor([1.0, 2.0, 3.0, 10.0, 13.0])
    assert group_advantages(scores, [3, 2], "none").tolist() == [-1.0, 0.0, 1.0, -1.5, 1.5]


def test_leave_one_out_compares_with_the_mean_of_the_others():
    scores = torch.tensor([1.0, 2.0, 6.0, 4.0, 5.0])
    assert group_loo(scores, [3, 2]).tolist() == pytest.approx([1 - 4, 2 - 3.5, 6 - 1.5, -1, 1])


@pytest.mark.parametrize("score", [0.1, 1e7, -3.3333333])
def test_a_fully_tied_group_and_a_group_of_one_get_exactly_zero(score: float):
    scores = torch.tensor([score] * 10 + [5.0])
    assert group_advantages(scores, [10, 1]).tolist() == [0.0] * 11
    assert group_advantages(scores, [10, 1], "none").tolist() == [0.0] * 11
    assert group_loo(scores, [10, 1]).tolist() == [0.0] * 11


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=10))
def test_group_methods_agree_with_loops(numbers: list[float]):
    n = len(numbers)
    scores = torch.tensor(numbers, dtype=torch.float64)
    mean = sum(numbers) / n
    std = math.sqrt(sum((x - mean) ** 2 for x in numbers) / (n - 1))
    loo = [numbers[i] - sum(numbers[j] for j in range(n) if j != i) / (n - 1) for i in range(n)]
    assert group_loo(scores, [n]).tolist() == pytest.approx(loo, abs=1e-9)
    expected = [(x - mean) / (std + 1e-4) for x in numbers]
    assert group_advantages(scores, [n]).tolist() == pytest.approx(expected, abs=1e-6)
