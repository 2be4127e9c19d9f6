"""The rule of `reasoning-gym`: an answer is scored by the task that made its prompt.

A recipe names it `rlhf.gym.score`. Beside the prompt, a row has the task's entry, whole and unchanged:
`{"prompt": entry["question"], "entry": entry}`. Tasks of several kinds may stand in one file.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import reasoning_gym

from rlhf.records import Answer, Prompt

ScoreAnswer = Callable[[str, dict[str, Any]], float]


def score(prompt: Prompt, answer: Answer, field: str = "entry") -> float:
    """What the task's own `score_answer` gives: in [0, 1], 1 for a right answer and nothing beside it.

    Most tasks give a small part of it to a right answer within other words. Raises KeyError for a row without `field`,
    and ValueError for an entry of a task that the installed reasoning-gym does not have.
    """
    entry = json.loads(prompt.extra[field])
    return float(_score_answer(entry["metadata"]["source_dataset"])(answer.text.strip(), entry))


@cache
def _score_answer(task: str) -> ScoreAnswer:
    found: Any = reasoning_gym.get_score_answer_fn(task)
    return found
