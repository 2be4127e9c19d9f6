"""The rule that asks reasoning-gym: what a right, a wrapped and a wrong answer get, and which rows it refuses."""

from __future__ import annotations

import json
from typing import Any

import pytest

from configs.schema import RuleConfig
from rlhf.errors import ScoreError
from rlhf.gym import score
from rlhf.records import Answer, AnswerGroup, Message, Prompt
from rlhf.rules import RuleScorer


def asked(task: str = "chain_sum", answer: str = "42") -> Prompt:
    entry: dict[str, Any] = {"question": "12 + 30 =", "answer": answer, "metadata": {"source_dataset": task}}
    return Prompt("p", (Message("user", entry["question"]),), (1,), {"entry": json.dumps(entry)})


def said(text: str) -> Answer:
    return Answer((1,), (0.0,), "eos", 0, text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("42", 1.0), (" 42\n", 1.0), ("42.", 1.0), ("It is 42", 2 / 8), ("41", 0.0), ("-42", 2 / 3), ("", 0.0)],
)
def test_an_answer_gets_what_its_task_gives_it(text: str, expected: float) -> None:
    assert score(asked(), said(text)) == pytest.approx(expected)


def test_tasks_of_several_kinds_may_stand_in_one_file() -> None:
    scorer = RuleScorer([RuleConfig(name="rlhf.gym.score")])
    groups = [
        AnswerGroup(asked(), (said("42"), said("7"))),
        AnswerGroup(asked("basic_arithmetic", "-7"), (said("-7"),)),
    ]
    assert scorer.scores(groups).tolist() == [1.0, 0.0, 1.0]


def test_a_row_without_its_entry_or_of_an_unknown_task_stops_the_run() -> None:
    scorer = RuleScorer([RuleConfig(name="rlhf.gym.score")])
    bare = Prompt("p", (Message("user", "12 + 30 ="),), (1,))
    with pytest.raises(ScoreError, match="entry"):
        scorer.scores([AnswerGroup(bare, (said("42"),))])
    with pytest.raises(ScoreError, match="no_such_task"):
        scorer.scores([AnswerGroup(asked("no_such_task"), (said("42"),))])
