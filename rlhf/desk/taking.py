"""Taking in what people hand over: drafts, verdicts, skips; and what they may go back to."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from rlhf.database import Database
from rlhf.desk.errors import BadVerdict, NotThere
from rlhf.desk.giving import Giving, stamp
from rlhf.desk.records import FLAGS, GRADES, Draft, Submission, Task, Verdict
from rlhf.desk.rows import newest, submission_of, task_of, verdict_to_plain
from rlhf.rankings_schema import drafts, items, submissions, tasks

LONGEST_STATE = 200_000  # characters of a draft
LONGEST_REASON = 1_000
LONGEST_MS = 7 * 24 * 3_600_000  # a week on one task is a clock gone wrong


class Taking:
    """What people hand over. What the methods do is said at those of `Desk`."""

    def __init__(self, database: Database, giving: Giving, clock: Callable[[], datetime]) -> None:
        self._database, self._giving, self._clock = database, giving, clock

    def task(self, person_id: int, task_id: int) -> Task:
        with self._database.read() as connection:
            self._own(connection, person_id, task_id)
            return task_of(connection, task_id)

    def save_draft(self, person_id: int, task_id: int, state: Mapping[str, Any], time_ms: int) -> Draft:
        text = _state(state)
        _check_time(time_ms)
        with self._database.write() as connection:
            row, now = self._own(connection, person_id, task_id), self._clock()
            if row.state == "open":
                self._giving.renew(connection, row, now)
            kept = {"state": text, "time_ms": time_ms, "saved": stamp(now)}
            if not connection.execute(drafts.update().where(drafts.c.task_id == task_id).values(kept)).rowcount:
                connection.execute(drafts.insert().values(kept | {"task_id": task_id}))
        return Draft(json.loads(text), time_ms, stamp(now))

    def submit(self, person_id: int, task_id: int, verdict: Verdict, time_ms: int) -> Submission:
        _check_time(time_ms)
        with self._database.write() as connection:
            row = self._own(connection, person_id, task_id)
            check_verdict(verdict, len(json.loads(row.answers)))
            now = stamp(self._clock())
            hand_in(connection, row.id, "ranked", verdict_to_plain(verdict), time_ms, now)
            return submission_of(connection.execute(newest(tasks.c.id == task_id)).one())

    def skip(self, person_id: int, task_id: int, reason: str, time_ms: int) -> Submission:
        _check_time(time_ms)
        if not reason.strip() or len(reason) > LONGEST_REASON:
            raise BadVerdict(
                f"A reason of {len(reason.strip())} characters cannot be taken.",
                limit=f"A skip has a reason of 1 to {LONGEST_REASON} characters.",
            )
        with self._database.write() as connection:
            row = self._own(connection, person_id, task_id)
            hand_in(connection, row.id, "skipped", {"skipped": reason}, time_ms, stamp(self._clock()))
            return submission_of(connection.execute(newest(tasks.c.id == task_id)).one())

    def history(self, person_id: int, limit: int) -> list[Submission]:
        query = newest(tasks.c.person_id == person_id).order_by(None).order_by(submissions.c.id.desc()).limit(limit)
        with self._database.read() as connection:
            return [submission_of(row) for row in connection.execute(query)]

    def _own(self, connection: sa.Connection, person_id: int, task_id: int) -> sa.Row[Any]:
        """The task's row, with the answers, if it is this person's. Raises NotThere."""
        query = (
            sa.select(tasks, items.c.answers)
            .join(items, items.c.id == tasks.c.item_id)
            .where(tasks.c.id == task_id, tasks.c.person_id == person_id)
        )
        row = connection.execute(query).one_or_none()
        if row is None:
            raise NotThere(f"There is no task {task_id} of this person.")
        return row


def hand_in(
    connection: sa.Connection, task_id: int, state: str, said: Mapping[str, Any], time_ms: int, now: str
) -> bool:
    """Whether a row was added: not where the newest of the task says the same."""
    text = json.dumps(said)
    of_task = submissions.c.task_id == task_id
    before = sa.select(submissions.c.said).where(of_task).order_by(submissions.c.id.desc()).limit(1)
    if connection.scalar(before) == text:
        return False
    row = {"task_id": task_id, "said": text, "time_ms": time_ms, "created": now}
    connection.execute(submissions.insert().values(row))
    connection.execute(tasks.update().where(tasks.c.id == task_id).values(state=state))
    return True


def was_said(connection: sa.Connection, task_id: int, said: Mapping[str, Any]) -> bool:
    """Whether a row of the task says the same, be it that it was corrected since."""
    query = sa.select(submissions.c.id).where(submissions.c.task_id == task_id, submissions.c.said == json.dumps(said))
    return connection.scalar(query.limit(1)) is not None


def check_verdict(verdict: Verdict, num_answers: int) -> None:
    """Nothing, if the verdict fits a group of so many answers. Raises BadVerdict."""
    if problems := list(_problems(verdict, num_answers)):
        raise BadVerdict(f"The ranking cannot be taken: {'; '.join(problems)}.")


def _problems(verdict: Verdict, num_answers: int) -> Iterator[str]:
    """What is wrong with a verdict on a group of so many answers."""
    ranked = [index for tier in verdict.tiers for index in tier]
    named = [*ranked, *verdict.grades, *verdict.flags]
    if strangers := sorted({index for index in named if not 0 <= index < num_answers}):
        yield f"answer {strangers[0]} is not one of 0 to {num_answers - 1}"
    if twice := sorted({index for index in ranked if ranked.count(index) > 1}):
        yield f"answer {twice[0]} stands in two places"
    if not all(verdict.tiers):
        yield "a tier is empty"
    if len(ranked) < 2 and not verdict.all_wrong:
        yield f"{len(ranked)} answers are ranked; rank at least 2, or say that all are wrong, or skip the group"
    if unknown := sorted(set(verdict.grades.values()) - set(GRADES)):
        yield f"{unknown[0]!r} is not one of {', '.join(GRADES)}"
    elif crossed := _crossed(verdict):
        yield f"answer {crossed[1]} is {verdict.grades[crossed[1]]}, and stands below answer {crossed[0]}, " + (
            f"which is {verdict.grades[crossed[0]]}"
        )
    if unknown := sorted(set[str]().union(*verdict.flags.values()) - set(FLAGS)):
        yield f"{unknown[0]!r} is not one of {', '.join(FLAGS)}"


def _crossed(verdict: Verdict) -> tuple[int, int] | None:
    """(an answer, one below it that was sorted into a better group), if there are such."""
    worst: int | None = None
    for tier in verdict.tiers:
        graded = [index for index in tier if index in verdict.grades]
        for index in graded:
            if worst is not None and _place(verdict, index) < _place(verdict, worst):
                return worst, index
        worst = max([*graded, *([] if worst is None else [worst])], key=lambda i: _place(verdict, i), default=None)
    return None


def _place(verdict: Verdict, index: int) -> int:
    return GRADES.index(verdict.grades[index])


def _state(state: Mapping[str, Any]) -> str:
    try:
        text = json.dumps(dict(state), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise BadVerdict(f"The draft cannot be kept: {error}.", limit="It is what JSON can hold.") from error
    if len(text) > LONGEST_STATE:
        raise BadVerdict(
            f"The draft has {len(text)} characters, and cannot be kept.", limit=f"It has at most {LONGEST_STATE}."
        )
    return text


def _check_time(time_ms: int) -> None:
    if not 0 <= time_ms <= LONGEST_MS:
        raise BadVerdict(f"time_ms={time_ms} cannot be.", limit=f"It is 0 to {LONGEST_MS}.")
