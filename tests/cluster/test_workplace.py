"""One Ray for a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster import workplace
from cluster.placement import Resources
from cluster.workplace import Workplace
from configs.schema import Recipe
from rlhf.ports import Console
from tests.fakes import SilentConsole
from tests.recipes import tiny_recipe

SESSION: Any = SimpleNamespace(resources=Resources(16.0, 0.0), log_dir=None)


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was done with Ray."""
    events: list[str] = []

    @contextmanager
    def own_ray(recipe: Recipe, console: Console) -> Iterator[Any]:
        events.append("started")
        yield SESSION
        events.append("ended")

    monkeypatch.setattr(workplace, "own_ray", own_ray)
    return events


def test_ray_is_started_when_first_needed_and_once_for_all_stages(events: list[str], tmp_path: Path) -> None:
    recipe, console = tiny_recipe("model", tmp_path), SilentConsole()
    with ExitStack() as stack:
        work = Workplace(recipe, console, stack)
        assert events == []
        with work.crew(recipe, console):
            pass
        with work.team(recipe, console):
            pass
        assert events == ["started"]
    assert events == ["started", "ended"]


def test_a_ray_that_was_there_stays(events: list[str], tmp_path: Path) -> None:
    recipe, console = tiny_recipe("model", tmp_path), SilentConsole()
    with ExitStack() as stack:
        work = Workplace(recipe, console, stack, SESSION)
        with work.team(recipe, console):
            assert work.session is SESSION
    assert events == []
