"""Addresses for those who rank."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query

from cluster.page.routes_of_all import SIGNED_IN, AtDesk, Someone
from cluster.page.shapes import (
    BIGGEST_INT,
    DraftIn,
    Given,
    HandedIn,
    HandIn,
    OwnProgress,
    Past,
    Problem,
    ShownDraft,
    ShownTask,
    Skip,
    beginning,
    shown_task,
    verdict_of,
)
from rlhf.desk.desk import Desk
from rlhf.desk.records import Submission

annotators = APIRouter(prefix="/api/tasks", tags=["annotators"], dependencies=SIGNED_IN)

TaskId = Annotated[int, Path(ge=1, le=BIGGEST_INT)]
NO_SUCH_TASK: dict[int | str, dict[str, Any]] = {404: {"model": Problem, "description": "No such task of this person"}}


@annotators.post("/next")
def next_task(desk: AtDesk, person: Someone) -> Given:
    """What is to be ranked now: the task that is open, else a new one."""
    task = desk.next_task(person.id)
    return Given(task=task and shown_task(task), progress=_progress(desk, person.id))


@annotators.get("/progress")
def progress(desk: AtDesk, person: Someone) -> OwnProgress:
    """How far one is."""
    return _progress(desk, person.id)


@annotators.get("")
def history(desk: AtDesk, person: Someone, limit: Annotated[int, Query(ge=1, le=200)] = 50) -> list[Past]:
    """What was handed in, newest first."""
    return [_past(one) for one in desk.history(person.id, limit)]


@annotators.get("/{task_id}", responses=NO_SUCH_TASK)
def task(desk: AtDesk, person: Someone, task_id: TaskId) -> ShownTask:
    """A task that one was given, handed in or not."""
    return shown_task(desk.task(person.id, task_id))


@annotators.put("/{task_id}/draft", responses=NO_SUCH_TASK)
def save_draft(desk: AtDesk, person: Someone, task_id: TaskId, draft: DraftIn) -> ShownDraft:
    """Keeps work that is under way."""
    kept = desk.save_draft(person.id, task_id, draft.state, draft.time_ms)
    return ShownDraft(state=dict(kept.state), time_ms=kept.time_ms, saved=kept.saved)


@annotators.post("/{task_id}/verdict", responses=NO_SUCH_TASK)
def submit(desk: AtDesk, person: Someone, task_id: TaskId, said: HandIn) -> HandedIn:
    """Hands a verdict in; a second one corrects the first."""
    verdict = verdict_of(said, desk.task(person.id, task_id))
    return _handed_in(desk, person.id, desk.submit(person.id, task_id, verdict, said.time_ms))


@annotators.post("/{task_id}/skip", responses=NO_SUCH_TASK)
def skip(desk: AtDesk, person: Someone, task_id: TaskId, why: Skip) -> HandedIn:
    """Leaves a task to others."""
    return _handed_in(desk, person.id, desk.skip(person.id, task_id, why.reason, why.time_ms))


def _handed_in(desk: Desk, person_id: int, taken: Submission) -> HandedIn:
    return HandedIn(task_id=taken.task_id, created=taken.created, progress=_progress(desk, person_id))


def _progress(desk: Desk, person_id: int) -> OwnProgress:
    return OwnProgress(**asdict(desk.own_progress(person_id)))


def _past(one: Submission) -> Past:
    return Past(task_id=one.task_id, question=beginning(one.question), skipped=one.verdict is None, created=one.created)
