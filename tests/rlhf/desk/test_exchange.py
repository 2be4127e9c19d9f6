"""Rankings go out and come back; on both databases."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rlhf.desk.records import Verdict
from rlhf.errors import DataError, TenfoldError
from tests.rlhf.desk.conftest import MakeDesk
from tests.rlhf.desk.groups import group, groups, person, rank_all

PROMPT = [{"role": "user", "content": "question p000"}]


RANKED: dict[str, Any] = {"prompt": "q", "answers": ["a", "b"], "tiers": [[1], [0]]}
OTHER = RANKED | {"prompt": "other"}


def pair(prompt: object, chosen: str, rejected: str) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_rows_hold_all_that_was_said(make_desk: MakeDesk):
    desk = make_desk(quota=2, max_skips=3)
    desk.add_groups(groups(1))
    ann, bob, eve = (person(desk, name) for name in ("ann", "bob", "eve"))
    task = desk.next_task(ann)
    assert task is not None
    said = Verdict(((1,), (0, 2)), {1: "good"}, {0: frozenset({"untrue"})})
    desk.submit(ann, task.id, said, 7)
    task = desk.next_task(bob)
    assert task is not None
    desk.skip(bob, task.id, "no idea", 3)
    rank_all(desk, eve)
    desk.withdraw("eve", "lea")
    (row,) = desk.export_rows()
    assert json.loads(json.dumps(row)) == row
    assert (row["prompt"], row["answers"]) == (PROMPT, ["p000 answer 0", "p000 answer 1", "p000 answer 2"])
    first, skip, last = row["rankings"]
    assert (first["by"], first["tiers"], first["grades"]) == ("ann", [[1], [0, 2]], {"1": "good"})
    assert (first["flags"], first["time_ms"], first["withdrawn"]) == ({"0": ["untrue"]}, 7, False)
    assert (skip["by"], skip["skipped"]) == ("bob", "no idea")
    assert last["withdrawn"]
    assert row["consensus"] == {"tiers": [[1], [0, 2]], "agreement": None, "accepted": True}


def test_pairs_are_all_that_the_consensus_orders(make_desk: MakeDesk):
    desk = make_desk()
    desk.add_groups(groups(1))
    rank_all(desk, person(desk, "ann"), ((1,), (0, 2)))
    rows = list(desk.export_pairs())
    assert [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in rows] == [
        ("p000 answer 1", "p000 answer 0"),
        ("p000 answer 1", "p000 answer 2"),
    ]
    assert all(row["prompt"] == PROMPT and row["chosen"][0]["role"] == "assistant" for row in rows)


def test_our_rows_come_back_as_they_were_and_once(make_desk: MakeDesk):
    desk = make_desk(quota=2)
    desk.add_groups(groups(3))
    rank_all(desk, person(desk, "ann"), ((1,), (0, 2)))
    rank_all(desk, person(desk, "bob"), ((1,), (0,), (2,)))
    rows = list(desk.export_rows())
    assert desk.import_rows(rows, "file", round=4) == 6
    assert desk.import_rows(rows, "file", round=4) == 0
    assert [(one.tiers, one.people) for one in desk.consensus(4)] == [
        (one.tiers, one.people) for one in desk.consensus(0)
    ]
    assert [one.name for one in desk.people()] == ["ann", "bob"]


@pytest.mark.parametrize("as_messages", [True, False])
def test_pairs_of_one_prompt_come_back_as_one_ranking(make_desk: MakeDesk, as_messages: bool):
    desk = make_desk()
    desk.add_groups([group("p000", 4)])
    rank_all(desk, person(desk, "ann"), ((3,), (0, 2), (1,)))
    rows = list(desk.export_pairs())
    if not as_messages:
        rows = [pair("question p000", r["chosen"][0]["content"], r["rejected"][0]["content"]) for r in rows]
    assert desk.import_rows(rows, "file", round=1) == 1
    (item,) = desk.items(1)
    (one,) = desk.consensus(1)
    assert [sorted(item.answers[i] for i in tier) for tier in one.tiers] == [
        ["p000 answer 3"],
        ["p000 answer 0", "p000 answer 2"],
        ["p000 answer 1"],
    ]


def test_ranked_answers_and_an_implicit_prompt_are_taken_in(make_desk: MakeDesk):
    desk = make_desk()
    turn = {"role": "assistant", "content": "good"}
    rows = [
        {"messages": PROMPT, "ranked_answers": ["a", "b", "c"], "ranks": [0, 1, 1]},
        {"prompt": "q", "answers": ["a", "b"], "tiers": [[1], [0]], "by": "eve"},
        {
            "chosen": [{"role": "user", "content": "r"}, turn],
            "rejected": [{"role": "user", "content": "r"}, turn | {"content": "bad"}],
        },
    ]
    assert desk.import_rows(rows, "file") == 3
    assert [(one.tiers, one.people) for one in desk.consensus(0)] == [
        (((0,), (1, 2)), ("file",)),
        (((1,), (0,)), ("eve",)),
        (((0,), (1,)), ("file",)),
    ]


def test_who_was_only_taken_in_can_be_invited_and_keeps_what_they_said(make_desk: MakeDesk):
    desk = make_desk()
    desk.import_rows([RANKED | {"by": "ann"}], "file")
    assert desk.sign_in(desk.invite("ann")) is not None
    assert [one.people for one in desk.consensus(0)] == [("ann",)]
    with pytest.raises(TenfoldError, match="was invited before"):
        desk.invite("ann")


def test_nobody_can_sign_in_as_who_was_only_imported(make_desk: MakeDesk):
    desk = make_desk()
    desk.import_rows([{"prompt": "q", "answers": ["a", "b"], "tiers": [[1], [0]]}], "file")
    token = desk.renew_token("file")
    assert desk.sign_in(token) is not None


def test_groups_that_come_with_rankings_are_not_given_out_and_not_waited_for(make_desk: MakeDesk):
    desk = make_desk(quota=2)
    rows: list[dict[str, Any]] = [
        {"prompt": "q", "answers": ["a", "b"], "tiers": [[1], [0]]},
        {"prompt": "nobody ranked it", "answers": ["a", "b"], "rankings": []},
    ]
    assert desk.import_rows(rows, "file") == 1
    assert [item.imported for item in desk.items()] == [True, False]
    assert desk.progress().num_short == 1  # nobody is invited: whoever was only taken in can rank nothing
    people = [person(desk, name) for name in ("ann", "bob")]
    found = desk.progress()
    assert (found.num_groups, found.num_done, found.num_rankings, found.num_wanted) == (2, 1, 0, 2)
    assert [len(rank_all(desk, one, ((0,), (1,)))) for one in people] == [1, 1]
    assert desk.progress().complete


def test_a_ranking_of_a_group_that_is_there_takes_one_place(make_desk: MakeDesk):
    desk = make_desk(quota=2)
    desk.add_groups(groups(1))
    row = {"prompt_id": "p000", "prompt": PROMPT, "answers": [f"p000 answer {i}" for i in range(3)], "by": "eve"}
    assert desk.import_rows([row | {"tiers": [[0], [1]]}], "file") == 1
    assert len(rank_all(desk, person(desk, "ann"))) == 1 and rank_all(desk, person(desk, "bob")) == []


def test_rows_of_several_people_are_one_group(make_desk: MakeDesk):
    desk = make_desk()
    row: dict[str, Any] = {"prompt": "q", "answers": ["a", "b"]}
    rows = [
        row | {"by": "ann", "tiers": [[0], [1]], "flags": {"1": ["untrue"]}},
        row | {"by": "bob", "tiers": [[0, 1]]},
    ]
    assert desk.import_rows([*rows, rows[0]], "file") == 2
    assert [one.people for one in desk.consensus(0)] == [("ann", "bob")]
    assert [one["flags"] for one in next(desk.export_rows())["rankings"]] == [{"1": ["untrue"]}, {}]


def test_an_older_export_takes_no_correction_back(make_desk: MakeDesk):
    desk = make_desk()
    desk.add_groups(groups(1))
    ann = person(desk, "ann")
    task = desk.next_task(ann)
    assert task is not None
    desk.submit(ann, task.id, Verdict(((0,), (1,))), 0)
    before = list(desk.export_rows())
    desk.submit(ann, task.id, Verdict(((1,), (0,))), 0)
    assert desk.import_rows(before, "file") == 0
    assert desk.consensus(0)[0].tiers == ((1,), (0,))


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (RANKED | {"tiers": [["a"], [0]]}, "tiers.0.0: .* valid integer"),
        (RANKED | {"tiers": [[0.0], [1]]}, "tiers.0.0: .* valid integer"),
        (RANKED | {"rankings": [{"tiers": [[0], [1]], "time_ms": float("inf")}]}, "rankings.0.time_ms"),
        (RANKED | {"rankings": [{"tiers": [[0], [1]], "time_ms": 10**30}]}, "rankings.0.time_ms"),
        (RANKED | {"rankings": [{"by": "ann"}]}, "'tiers' is missing"),
        (RANKED | {"by": "\ud800"}, "cannot be a person's name"),
        (RANKED | {"prompt_id": "x" * 65}, "prompt_id: .* at most 64"),
        (RANKED | {"prompt_id": "\ud800"}, "prompt_id"),
        (RANKED | {"answers": "ab"}, "answers: .* valid list"),
        (RANKED | {"answers": ["a", None]}, "answers.1: .* valid string"),
        (RANKED | {"answers": ["a", " "]}, "answer 1 is empty"),
        (RANKED | {"prompt": [{"role": "user", "content": None}]}, "prompt.0.content: .* valid string"),
        (RANKED | {"prompt": [{"role": "wizard", "content": "q"}]}, "prompt.0.role"),
        (RANKED | {"prompt": " "}, "the prompt is empty"),
        ({"prompt": "q", "ranked_answers": ["a", "b", "c"], "ranks": [0, 1]}, "2 ranks of 3"),
        ({"prompt": "q", "ranked_answers": ["a", "b"], "ranks": [0, "x"]}, "ranks.1"),
        (pair("q", "a", "a"), "chosen and rejected are the same"),
        (OTHER | {"answers": ["b", "a"]}, "Row 2 .* with other answers, or in another order"),
        (OTHER | {"tiers": [[0], [1]]}, "Row 2 .* file ranks the prompt .* twice"),
        ({"prompt": "q", "chosen": "a"}, r"Row 2 .* 'rejected' is missing"),
        ({"prompt": [], "chosen": "a", "rejected": "b"}, r"Row 2 .* prompt: .* at least 1 item"),
        ({"prompt": "q", "answers": ["a", "b"]}, r"'tiers' is missing"),
        ({"prompt": "q", "answers": ["a", "b"], "tiers": [[0], [2]]}, r"answer 2 is not one of 0 to 1"),
        ({"prompt": "q", "answers": ["a"], "tiers": [[0]]}, r"1 answers"),
    ],
)
def test_a_row_that_cannot_be_used_is_told_and_none_is_taken(make_desk: MakeDesk, row: dict[str, Any], why: str):
    desk = make_desk()
    with pytest.raises(TenfoldError, match=why):
        desk.import_rows([OTHER, row], "file")
    assert desk.items() == [] and desk.people() == []


def test_too_many_answers_in_pairs_are_refused(make_desk: MakeDesk):
    rows = [pair("q", f"a{i}", f"a{i + 1}") for i in range(26)]
    with pytest.raises(DataError, match="pairs of 27 answers"):
        make_desk().import_rows(rows, "file")
