"""Rows: what lies where, what sees what, how micro-batches are filled."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from rlhf.records import Answer, AnswerGroup, Prompt
from rlhf.rows import MicroBatch, Rows, choose_rows, make_micro_batches, scatter


def make_group(prompt: Sequence[int], *answers: Sequence[int]) -> AnswerGroup:
    made = (Answer(tuple(ids), (0.0,) * len(ids), "eos", 0, "") for ids in answers)
    return AnswerGroup(Prompt("p", (), tuple(prompt)), tuple(made))


def sized_group(prompt_len: int, *answer_lens: int) -> AnswerGroup:
    return make_group([1] * prompt_len, *([2] * length for length in answer_lens))


def answers_of(batches: Sequence[MicroBatch]) -> list[list[int]]:
    return [batch.last_answer.tolist() for batch in batches]


def test_a_shared_row_holds_the_prompt_once_and_positions_restart_after_it() -> None:
    (batch,) = make_micro_batches([make_group([10, 11, 12], [20, 21], [30])], rows="shared", max_tokens=100)
    assert batch.token_ids.tolist() == [[10, 11, 12, 20, 21, 30]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3]]
    assert batch.branch.tolist() == [0, 0, 0, 1, 1, 2]
    assert batch.num_tokens == 6


def test_the_prompts_last_position_predicts_every_answers_first_token() -> None:
    (batch,) = make_micro_batches([make_group([10, 11, 12], [20, 21], [30])], rows="shared", max_tokens=100)
    assert batch.predict.tolist() == [2, 3, 2]
    assert batch.target_ids.tolist() == [20, 21, 30]
    assert batch.answer.tolist() == [0, 0, 1]
    assert batch.step.tolist() == [0, 1, 0]
    assert batch.last.tolist() == [4, 5]


def test_a_token_sees_its_prompt_and_its_own_answer_only() -> None:
    (batch,) = make_micro_batches([make_group([10, 11], [20, 21], [30])], rows="shared", max_tokens=100)
    # fmt: off
    assert batch.mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]
    # fmt: on


def test_a_token_sees_no_other_row() -> None:
    groups = [make_group([10], [20]), make_group([40], [50], [60])]
    (batch,) = make_micro_batches(groups, rows="shared", max_tokens=100)
    # fmt: off
    assert batch.mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 1, 0, 1],
    ]
    # fmt: on


def test_pieces_say_what_the_mask_says() -> None:
    groups = [sized_group(3, 2, 4, 1), sized_group(1, 5), sized_group(2, 3, 3)]
    (batch,) = make_micro_batches(groups, rows="shared", max_tokens=100)
    spans, start = [], 0
    for piece in batch.pieces:
        spans.append(range(start, start + piece.length))
        start += piece.length
    said = torch.zeros(batch.num_tokens, batch.num_tokens, dtype=torch.bool)
    for piece, span in zip(batch.pieces, spans, strict=True):
        for query in span:
            said[query, span.start : query + 1] = True
            if piece.sees is not None:
                said[query, spans[piece.sees]] = True
    assert start == batch.num_tokens
    assert torch.equal(batch.mask[0, 0], said)


def test_a_separate_row_is_one_causal_sequence() -> None:
    batches = make_micro_batches([sized_group(3, 2, 2)], rows="separate", max_tokens=5)
    assert [batch.position_ids.tolist() for batch in batches] == [[[0, 1, 2, 3, 4]]] * 2
    assert [len(batch.pieces) for batch in batches] == [1, 1]


def test_a_group_longer_than_the_limit_is_split_and_repeats_its_prompt() -> None:
    batches = make_micro_batches([sized_group(4, 3, 3, 3, 3, 3)], rows="shared", max_tokens=10)
    assert answers_of(batches) == [[0, 1], [2, 3], [4]]
    assert [batch.num_tokens for batch in batches] == [10, 10, 7]


def test_rows_of_several_groups_share_a_micro_batch() -> None:
    groups = [sized_group(2, 1, 1), sized_group(3, 1), sized_group(4, 2, 2)]
    batches = make_micro_batches(groups, rows="shared", max_tokens=8)
    assert answers_of(batches) == [[0, 1, 2], [3, 4]]
    assert batches[0].row.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("rows", ["shared", "separate", "auto"])
def test_an_answer_longer_than_the_limit_gets_a_micro_batch_of_its_own(rows: Rows) -> None:
    batches = make_micro_batches([sized_group(2, 1, 50, 1)], rows=rows, max_tokens=10)
    assert answers_of(batches) == [[0], [1], [2]]
    assert max(batch.num_tokens for batch in batches) == 52


@pytest.mark.parametrize("rows", ["shared", "separate"])
def test_indices_choose_answers_by_their_flat_place(rows: Rows) -> None:
    groups = [sized_group(2, 1, 2, 3), sized_group(2, 1), sized_group(2, 4, 5)]
    (batch,) = make_micro_batches(groups, [5, 0, 2], rows=rows, max_tokens=100)
    assert batch.last_answer.tolist() == [0, 2, 5]
    assert torch.bincount(batch.answer, minlength=6).tolist() == [1, 0, 3, 0, 0, 5]


def test_no_chosen_answer_gives_no_micro_batch() -> None:
    assert make_micro_batches([sized_group(2, 1, 2)], [], rows="shared", max_tokens=10) == []


def test_scatter_puts_values_at_their_answer_and_step() -> None:
    batches = make_micro_batches([make_group([1], [7, 8], [9]), make_group([2], [5])], rows="shared", max_tokens=4)
    out = torch.zeros(3, 2)
    for batch in batches:
        scatter(batch.target_ids.float().requires_grad_(), batch, out)
    assert out.tolist() == [[7.0, 8.0], [9.0, 0.0], [5.0, 0.0]]


def test_sharing_pays_where_the_prompt_is_long_and_not_where_answers_are_very_long() -> None:
    assert choose_rows(256, [64] * 10) == "shared"
    assert choose_rows(1, [2000] * 10) == "separate"


def test_auto_chooses_for_each_group() -> None:
    groups = [sized_group(256, *[64] * 10), sized_group(1, *[2000] * 3)]
    batches = make_micro_batches(groups, rows="auto", max_tokens=4000)
    assert answers_of(batches) == [[*range(10), 10], [11], [12]]
