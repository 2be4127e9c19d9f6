"""Records of the desk out of rows of its tables, and back."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from rlhf.desk.records import LABELS, Card, Draft, Submission, Task, Verdict
from rlhf.rankings_schema import drafts, items, persons, submissions, tasks
from rlhf.records import Message

Row = sa.Row[Any]


def shown_order(seed: int, num_answers: int) -> tuple[int, ...]:
    """[n] the answer index at each place, for a task's recorded seed."""
    return tuple(random.Random(seed).sample(range(num_answers), num_answers))


def verdict_to_plain(verdict: Verdict) -> dict[str, Any]:
    """A verdict as JSON holds it: kept, exported. One verdict is one text, in whatever order it was said."""
    return {
        "tiers": [sorted(tier) for tier in verdict.tiers],
        "grades": {str(index): grade for index, grade in sorted(verdict.grades.items())},
        "flags": {str(index): sorted(flags) for index, flags in sorted(verdict.flags.items()) if flags},
        "all_wrong": verdict.all_wrong,
    }


def verdict_from_plain(said: Mapping[str, Any]) -> Verdict:
    """The verdict that `verdict_to_plain` was given."""
    return Verdict(
        tiers=tuple(tuple(tier) for tier in said["tiers"]),
        grades={int(index): grade for index, grade in said["grades"].items()},
        flags={int(index): frozenset(flags) for index, flags in said["flags"].items()},
        all_wrong=said["all_wrong"],
    )


def newest(only: sa.ColumnElement[bool] | None = None) -> sa.Select[Any]:
    """The newest submission of each task, of those tasks of which `only` is true."""
    ids = sa.select(sa.func.max(submissions.c.id)).join(tasks, tasks.c.id == submissions.c.task_id)
    if only is not None:
        ids = ids.where(only)
    return every().where(submissions.c.id.in_(ids.group_by(submissions.c.task_id)))


def every() -> sa.Select[Any]:
    """All submissions, oldest first, with what `submission_of` needs."""
    return (
        sa.select(
            submissions,
            *(tasks.c.seed, tasks.c.repeat, tasks.c.item_id, tasks.c.person_id),
            *(items.c.prompt_id, items.c.round, items.c.messages, items.c.answers),
            *(persons.c.name, persons.c.withdrawn),
        )
        .join(tasks, tasks.c.id == submissions.c.task_id)
        .join(items, items.c.id == tasks.c.item_id)
        .join(persons, persons.c.id == tasks.c.person_id)
        .order_by(submissions.c.id)
    )


def submission_of(row: Row) -> Submission:
    """What a row of `newest` or `every` says."""
    said = json.loads(row.said)
    return Submission(
        id=row.id,
        task_id=row.task_id,
        person=row.name,
        prompt_id=row.prompt_id,
        round=row.round,
        question=next((m.content for m in reversed(messages_of(row.messages)) if m.role == "user"), ""),
        verdict=None if "skipped" in said else verdict_from_plain(said),
        reason=said.get("skipped", ""),
        time_ms=row.time_ms,
        order=shown_order(row.seed, len(json.loads(row.answers))),
        repeat=row.repeat,
        created=row.created,
    )


def messages_of(text: str) -> tuple[Message, ...]:
    """The turns of a prompt."""
    return tuple(Message(role, content) for role, content in json.loads(text))


def draft_of(connection: sa.Connection, task_id: int) -> Draft | None:
    """The draft of a task."""
    row = connection.execute(sa.select(drafts).where(drafts.c.task_id == task_id)).one_or_none()
    return None if row is None else Draft(json.loads(row.state), row.time_ms, row.saved)


def task_of(connection: sa.Connection, task_id: int) -> Task:
    """The task, with what was saved and handed in of it."""
    query = (
        sa.select(tasks, items.c.prompt_id, items.c.round, items.c.messages, items.c.answers)
        .join(items, items.c.id == tasks.c.item_id)
        .where(tasks.c.id == task_id)
    )
    row = connection.execute(query).one()
    answers = json.loads(row.answers)
    order = shown_order(row.seed, len(answers))
    found = None
    if row.state != "open":
        found = connection.execute(newest(tasks.c.id == task_id)).one_or_none()
    return Task(
        id=row.id,
        prompt_id=row.prompt_id,
        round=row.round,
        messages=messages_of(row.messages),
        cards=tuple(Card(LABELS[place], index, answers[index]) for place, index in enumerate(order)),
        seed=row.seed,
        expires=row.expires,
        draft=draft_of(connection, task_id),
        submission=None if found is None else submission_of(found),
    )
