"""How groups are split over ranks and put together again: pure functions."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.handles import balanced, merged, num_tokens
from tests.fakes import answer, group


def test_the_dearest_go_first_each_to_the_lightest_rank() -> None:
    # 8 -> rank 0; 7 -> rank 1; 5 -> rank 1 (7 < 8, now 12); 4 -> rank 0 (12); 3 -> rank 0, the lower of two equal.
    assert balanced([3, 8, 4, 7, 5], 2) == [[0, 1, 2], [3, 4]]


def test_equal_costs_go_round_in_order() -> None:
    assert balanced([5, 5, 5, 5], 3) == [[0, 3], [1], [2]]


def test_a_rank_may_be_left_without_groups() -> None:
    assert balanced([5], 3) == [[0], [], []]


@given(st.lists(st.integers(1, 100), max_size=30), st.integers(1, 8))
def test_every_group_goes_to_one_rank_and_no_rank_has_more_than_a_group_too_much(costs: list[int], num: int) -> None:
    parts = balanced(costs, num)
    assert sorted(index for part in parts for index in part) == list(range(len(costs)))
    loads = [sum(costs[index] for index in part) for part in parts]
    assert max(loads) - min(loads) <= max(costs, default=0)


def test_a_groups_cost_is_its_prompt_and_all_its_answers() -> None:
    assert num_tokens(group("a", answer(1, 2), answer(3))) == 3 + 2 + 1


def test_rows_come_back_in_the_order_of_the_groups_and_are_padded_to_the_longest() -> None:
    # Groups of 1, 2 and 1 answers; rank 0 had the groups 0 and 2, rank 1 the group 1, a longer one.
    first, second = torch.tensor([[1.0], [4.0]]), torch.tensor([[2.0, 2.0], [3.0, 0.0]])
    together = merged([1, 2, 1], [[0, 2], [1]], [first, second])
    assert together.tolist() == [[1.0, 0.0], [2.0, 2.0], [3.0, 0.0], [4.0, 0.0]]


def test_scores_come_back_in_the_order_of_the_groups() -> None:
    scores = merged([2, 1, 1], [[1, 2], [0], []], [torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0]), torch.zeros(0)])
    assert scores.tolist() == [1.0, 2.0, 3.0, 4.0]


def test_a_rank_without_groups_gives_no_rows() -> None:
    assert merged([2], [[0], []], [torch.ones(2, 3), torch.zeros(0, 0)]).tolist() == [[1.0] * 3] * 2
