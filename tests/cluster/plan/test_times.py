"""Estimates of a step's phases, where they can be checked by hand."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from cluster.plan.devices import GPUS
from cluster.plan.engine_memory import token_bytes
from cluster.plan.times import generate_time
from cluster.plan.work import Layout, Work
from tests.cluster.plan.test_memory import SHAPE
from tests.recipes import tiny_recipe

LAYOUT = Layout("shared", 0, 256, False, 1, {"generator": 1}, 0.5)


@pytest.fixture
def work(tmp_path: Path) -> Work:
    recipe = tiny_recipe("m", tmp_path, ppo={"num_prompts": 30}, generator={"max_running": 256})
    return Work.of(recipe, SHAPE, GPUS["H100"])


def cache_of(work: Work, answers: int) -> int:
    """Bytes that hold so many answers, each with its share of the prompt."""
    return answers * token_bytes(work, LAYOUT) * (work.answer_tokens + -(-work.prompt_tokens // 10))


def test_more_room_for_answers_never_makes_writing_them_slower(work: Work) -> None:
    times = [generate_time(work, LAYOUT, cache_of(work, answers)) for answers in range(1, 320)]
    assert all(after <= 1.001 * before for before, after in itertools.pairwise(times))
    assert times[299] == times[255]  # 256 at most run at once


def test_answers_that_find_no_room_are_written_when_those_before_them_have_ended(work: Work) -> None:
    # 300 answers: 150 and 150 take as long as two rounds; 200 leave 100 for a second round, which is no longer.
    halves, unequal = (generate_time(work, LAYOUT, cache_of(work, answers)) for answers in (150, 200))
    assert unequal == pytest.approx(halves)
