from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.minibatches import deal, plan
from rlhf.records import Rollout
from rlhf.rollout import answer_mask, sampling_logprobs
from tests.rlhf.made import make_groups


def rollout_of(
    lengths: Sequence[Sequence[int]],
    *,
    step: int = 0,
    dropped: Sequence[int] = (),
    prompt_lens: Sequence[int] | None = None,
) -> Rollout:
    groups = make_groups(lengths, prompt_lens)
    mask = answer_mask(groups)
    selected = torch.ones(len(mask), dtype=torch.bool)
    selected[list(dropped)] = False
    return Rollout(
        step=step,
        groups=tuple(groups),
        mask=mask,
        selected=selected,
        sampling_logprobs=sampling_logprobs(groups),
        old_logprobs=None,
        ref_logprobs=None,
        values=None,
        advantages=torch.zeros(mask.shape),
        returns=None,
        scores=torch.zeros(len(mask)),
        beta=0.0,
    )


SIXTEEN = [[3, 4, 5]] * 16


def contents(minibatches: list[list[list[int]]]) -> list[list[int]]:
    return [sorted(i for rank in minibatch for i in rank) for minibatch in minibatches]


@given(
    lengths=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=7),
    num_minibatches=st.integers(1, 5),
    world_size=st.integers(1, 5),
    data=st.data(),
)
def test_every_selected_answer_appears_exactly_once_whatever_the_ranks(
    lengths: list[list[int]], num_minibatches: int, world_size: int, data: st.DataObject
):
    num = sum(len(group) for group in lengths)
    dropped = data.draw(st.sets(st.integers(0, num - 1), max_size=num - 1))
    rollout = rollout_of(lengths, dropped=sorted(dropped))
    made = plan(rollout, num_minibatches=num_minibatches, epoch=0, seed=1, world_size=world_size)
    assert all(len(minibatch) == world_size for minibatch in made)
    assert all(any(rank for rank in minibatch) for minibatch in made)
    assert sorted(i for part in contents(made) for i in part) == sorted(set(range(num)) - dropped)
    alone = plan(rollout, num_minibatches=num_minibatches, epoch=0, seed=1, world_size=1)
    assert contents(made) == contents(alone)


def test_minibatches_hold_whole_groups_in_nearly_equal_numbers():
    made = contents(plan(rollout_of(SIXTEEN), num_minibatches=3, epoch=0, seed=0, world_size=2))
    assert sorted(len(part) for part in made) == [15, 15, 18]
    for part in made:
        assert all(i // 3 * 3 + k in part for i in part for k in range(3))


def test_each_epoch_step_and_seed_has_an_order_of_its_own_and_a_repeat_the_same():
    def order(step: int, epoch: int, seed: int) -> list[list[int]]:
        return contents(plan(rollout_of(SIXTEEN, step=step), num_minibatches=4, epoch=epoch, seed=seed, world_size=2))

    orders = [order(*where) for where in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))]
    assert all(orders[a] != orders[b] for a in range(4) for b in range(a))
    assert order(1, 0, 0) == orders[1]


def test_whole_groups_stay_on_one_rank_where_there_are_enough():
    (minibatch,) = plan(rollout_of(SIXTEEN), num_minibatches=1, epoch=0, seed=0, world_size=3)
    for rank in minibatch:
        assert all(i // 3 * 3 + k in rank for i in rank for k in range(3))


def test_answers_are_dealt_one_by_one_where_there_are_fewer_groups_than_ranks():
    (minibatch,) = plan(rollout_of([[5] * 10]), num_minibatches=1, epoch=0, seed=0, world_size=3)
    assert sorted(len(rank) for rank in minibatch) == [3, 3, 4]


def test_ranks_are_balanced_by_tokens_prompt_included():
    # Groups cost 3 + 30, 3 + 10, 3 + 9, 3 + 8 tokens: the long one alone against the three others.
    rollout = rollout_of([[10], [30], [9], [8]])
    (minibatch,) = plan(rollout, num_minibatches=1, epoch=0, seed=0, world_size=2)
    assert sorted(minibatch) == [[0, 2, 3], [1]]
    # A long prompt makes the first group the heavy one.
    rollout = rollout_of([[10], [10], [10], [10]], prompt_lens=[60, 2, 2, 2])
    (minibatch,) = plan(rollout, num_minibatches=1, epoch=0, seed=0, world_size=2)
    assert sorted(minibatch) == [[0], [1, 2, 3]]


def test_there_are_no_empty_minibatches_where_groups_are_fewer():
    made = plan(rollout_of([[2, 2], [3, 3]]), num_minibatches=5, epoch=0, seed=0, world_size=1)
    assert sorted(contents(made)) == [[0, 1], [2, 3]]


def test_a_group_without_a_selected_answer_is_left_out():
    made = plan(rollout_of([[2, 2], [3, 3]], dropped=[0, 1]), num_minibatches=2, epoch=0, seed=0, world_size=1)
    assert contents(made) == [[2, 3]]


def test_nothing_selected_gives_no_minibatches():
    assert plan(rollout_of([[2]], dropped=[0]), num_minibatches=2, epoch=0, seed=0, world_size=1) == []


def test_longest_first_dealing_at_hand_worked_values():
    # 7 -> first, 6 -> second, 5 -> second (11), 4 -> first (11), 3 -> first (14)
    assert deal([3, 7, 5, 6, 4], 2) == [[0, 1, 4], [2, 3]]
    assert deal([2, 2, 2], 2) == [[0, 2], [1]]
    assert deal([1], 3) == [[0], [], []]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 6))
def test_dealing_is_never_worse_than_grahams_bound(costs: list[int], num: int):
    dealt = deal(costs, num)
    assert sorted(i for part in dealt for i in part) == list(range(len(costs)))
    most = max(sum(costs[i] for i in part) for part in dealt)
    assert most <= sum(costs) / num + max(costs) * (1 - 1 / num) + 1e-9


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_plan_is_the_same_on_every_rank(world_size: int):
    rollout = rollout_of(SIXTEEN)
    first, second = (plan(rollout, num_minibatches=4, epoch=2, seed=5, world_size=world_size) for _ in range(2))
    assert first == second
