from __future__ import annotations

import math

import pytest
import torch

from rlhf.statistics import bootstrap_interval, bootstrap_ratio, win_rate


def test_the_win_rate_compares_every_pair_of_a_prompt_and_halves_ties():
    before = torch.tensor([1.0, 2.0])
    after = torch.tensor([2.0, 0.0, 3.0])
    # 2 beats 1 and ties 2; 0 loses to both; 3 beats both
    assert float(win_rate(before, after)) == pytest.approx((1 + 0.5 + 0 + 0 + 1 + 1) / 6)


def test_the_win_rate_is_paired_by_prompt():
    # Every answer of the hard prompt is far below every one of the easy: only pairs of the same prompt count.
    before = torch.tensor([[1.0, 1.0], [-9.0, -9.0]])
    after = torch.tensor([[0.0, 1.0], [-8.0, -8.0]])
    assert win_rate(before, after).tolist() == [0.25, 1.0]


def test_nothing_changed_is_a_win_rate_of_one_half():
    scores = torch.randn(20, 10, generator=torch.Generator().manual_seed(0))
    assert win_rate(scores, scores).tolist() == pytest.approx([0.5] * 20)


def test_the_interval_of_equal_numbers_is_a_point():
    assert bootstrap_interval(torch.full((30,), 0.7, dtype=torch.float64), num=50, seed=0) == pytest.approx((0.7, 0.7))


def test_the_interval_of_many_prompts_is_the_normal_one():
    values = torch.randn(400, generator=torch.Generator().manual_seed(1)) * 0.3 + 0.6
    low, high = bootstrap_interval(values, num=4000, seed=0)
    error = float(values.std()) / math.sqrt(400)
    assert low == pytest.approx(float(values.mean()) - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(float(values.mean()) + 1.96 * error, abs=0.2 * error)


def test_the_interval_of_two_prompts_is_that_of_their_four_equally_likely_resamples():
    values = torch.tensor([0.0, 1.0])
    # Means 0, ½, ½, 1: the middle half leaves a quarter outside on each side.
    assert bootstrap_interval(values, num=4001, seed=0, level=0.9) == (0.0, 1.0)
    assert bootstrap_interval(values, num=4001, seed=0, level=0.4) == (0.5, 0.5)


def test_a_higher_level_gives_a_wider_interval_and_the_same_seed_the_same():
    values = torch.rand(40, generator=torch.Generator().manual_seed(1))
    narrow, wide = (bootstrap_interval(values, num=500, seed=3, level=level) for level in (0.8, 0.95))
    assert wide[0] < narrow[0] < narrow[1] < wide[1]
    assert bootstrap_interval(values, num=500, seed=3) == bootstrap_interval(values, num=500, seed=3)
    assert bootstrap_interval(values, num=500, seed=3) != bootstrap_interval(values, num=500, seed=4)


def test_the_interval_of_a_ratio_draws_clusters_and_weighs_them_by_their_size():
    # Draws of (1 of 1, 0 of 3): both of the first 1, both of the second 0, one of each 1 / 4.
    part, whole = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 3.0])
    assert bootstrap_ratio(part, whole, num=400, seed=0) == (0.0, 1.0)
    assert bootstrap_ratio(part, whole, num=400, seed=0, level=0.02)[0] == pytest.approx(0.25)
    # A cluster that has nothing is not drawn: else a draw might have nothing to divide by.
    assert bootstrap_ratio(torch.tensor([2.0, 0.0]), torch.tensor([4.0, 0.0]), num=50, seed=0) == (0.5, 0.5)


def test_the_interval_of_a_ratio_of_clusters_of_one_is_that_of_the_mean():
    values = torch.randn(60, generator=torch.Generator().manual_seed(1))
    assert bootstrap_ratio(values, torch.ones(60), 500, 3) == pytest.approx(bootstrap_interval(values, 500, 3))
