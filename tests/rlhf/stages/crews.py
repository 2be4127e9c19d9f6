"""A crew that trains nothing and keeps what it was asked, and a run for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from configs.schema import Recipe
from rlhf.stages.model_context import ModelContext
from rlhf.store import RunStore
from rlhf.training import Job, Report
from tests.fakes import ListTracker, SilentConsole


class AskedCrew:
    """Reports one step of each job and, unless it was stopped there, that the model is written."""

    def __init__(self) -> None:
        self.is_stopped = False
        self.jobs: list[Job] = []
        self.figures: dict[str, float] = {}

    def train(self, job: Job, heard: Callable[[Report], None]) -> None:
        self.jobs.append(job)
        heard(Report("start", 0))
        heard(Report("row", 1, self.figures, samples=[("once", "upon a time")]))
        if self.is_stopped:
            heard(Report("saved", 1))
        else:
            heard(Report("written", 1))

    def stop(self) -> None:
        self.is_stopped = True


@contextmanager
def model_context(recipe: Recipe) -> Iterator[tuple[ModelContext, AskedCrew]]:
    """A stage's context over a real store."""
    crew, console = AskedCrew(), SilentConsole()
    with RunStore.open(recipe.runs, recipe) as store:
        yield ModelContext(recipe, crew, store, ListTracker(store), console), crew


def recipe_of(folder: Path, **keys: Any) -> Recipe:
    """A recipe whose runs are in `folder`."""
    return Recipe.model_validate({"name": "made", "runs": str(folder / "runs"), **keys})
