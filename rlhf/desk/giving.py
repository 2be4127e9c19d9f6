"""Giving tasks out: to how many people, for how long, and which are given a second time without being told."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from configs.desk import MOST_RANKED, DeskConfig
from rlhf.database import Database
from rlhf.desk.errors import DeskError, NotThere
from rlhf.desk.people import person_of
from rlhf.desk.records import OwnProgress, Person, Task
from rlhf.desk.rows import task_of
from rlhf.rankings_schema import items, persons, submissions, tasks
from rlhf.records import AnswerGroup, Message
from rlhf.seeds import shuffle_seed

PLACES = 400  # looked up at once: SQLite takes so many parameters only
NOT_BEFORE = 3  # so many other groups lie between a group and its repeat, at the least


class Giving:
    """Groups on the desk and who has them. What the methods do is said at those of `Desk`."""

    def __init__(self, database: Database, config: DeskConfig, seed: int, clock: Callable[[], datetime]) -> None:
        self._database, self._config, self._seed, self._clock = database, config, seed, clock

    def add_groups(self, groups: Sequence[AnswerGroup], round: int) -> int:
        rows = [
            item_row(group.prompt.id, round, group.prompt.messages, [answer.text for answer in group.answers])
            for group in groups
        ]
        assert len({row["prompt_id"] for row in rows}) == len(rows), "a prompt twice among the groups of one round"
        with self._database.write() as connection:
            return len(put(connection, rows, stamp(self._clock())))

    def next_task(self, person_id: int) -> Task | None:
        with self._database.write() as connection:
            person = person_by_id(connection, person_id)
            if person.withdrawn:
                return None
            now = self._clock()
            found = self._open(connection, person_id, now)
            if found is None:
                found = self._repeat(connection, person, now)
            if found is None:
                found = self._new(connection, person, now)
            return None if found is None else task_of(connection, found)

    def renew(self, connection: sa.Connection, row: sa.Row[Any], now: datetime) -> bool:
        """Whether the lease of a task that is open runs again: not where its place was given to somebody else."""
        runs = self._holds(connection, row, now)
        if runs:
            connection.execute(tasks.update().where(tasks.c.id == row.id).values(expires=self._expires(now)))
        return runs

    def own_progress(self, person_id: int) -> OwnProgress:
        with self._database.read() as connection:
            person = person_by_id(connection, person_id)
            given = connection.execute(
                sa.select(tasks)
                .join(items, items.c.id == tasks.c.item_id)
                .where(tasks.c.person_id == person_id, sa.not_(items.c.imported))
            ).all()
            left = 0 if person.withdrawn else self._num_left(connection, person, given)
            spent = (
                sa.select(sa.func.max(submissions.c.time_ms))
                .join(tasks, tasks.c.id == submissions.c.task_id)
                .where(tasks.c.person_id == person_id)
                .group_by(submissions.c.task_id)
            )
            time_ms = sum(connection.scalars(spent))
        num = Counter(row.state for row in given)
        return OwnProgress(num["ranked"], num["skipped"], left, time_ms)

    def _num_left(self, connection: sa.Connection, person: Person, given: Sequence[sa.Row[Any]]) -> int:
        """What the person can be given, repeats that are to come among it: the sum tells of none when it comes."""
        now = self._clock()
        free = self._free(person.id, now).with_only_columns(items.c.id).order_by(None).subquery()
        num_free = connection.scalar(sa.select(sa.func.count()).select_from(free)) or 0
        still = [row for row in given if row.state == "open" and self._holds(connection, row, now)]
        num_first = num_free + sum(not row.repeat for row in (*still, *(r for r in given if r.state == "ranked")))
        num_repeats = sum(row.repeat for row in given)
        due = repeats_due(num_first, self._config.repeats, self._seed, person.name)
        return num_free + len(still) + max(0, min(due, num_first - NOT_BEFORE) - num_repeats)

    def _holds(self, connection: sa.Connection, row: sa.Row[Any], now: datetime) -> bool:
        """Whether the task, which is open, is still its person's to do."""
        return row.repeat or row.expires > stamp(now) or self._has_room(connection, row.item_id, now)

    def _open(self, connection: sa.Connection, person_id: int, now: datetime) -> int | None:
        """The task that the person has open, its lease renewed."""
        query = sa.select(tasks).where(tasks.c.person_id == person_id, tasks.c.state == "open").order_by(tasks.c.id)
        return next((row.id for row in connection.execute(query).all() if self.renew(connection, row, now)), None)

    def _new(self, connection: sa.Connection, person: Person, now: datetime) -> int | None:
        """A group that this person has not had."""
        row = connection.execute(self._free(person.id, now).limit(1)).one_or_none()
        return None if row is None else self._give(connection, person, row, False, now)

    def _repeat(self, connection: sa.Connection, person: Person, now: datetime) -> int | None:
        """A group that the person has ranked before, where one is due and there is one that is long enough ago."""
        mine = sa.and_(tasks.c.person_id == person.id, tasks.c.state == "ranked")
        again = sa.select(tasks.c.item_id).where(tasks.c.person_id == person.id, tasks.c.repeat)
        ranked = connection.execute(
            sa.select(tasks.c.item_id, items.c.prompt_id, items.c.round, items.c.answers)
            .join(items, items.c.id == tasks.c.item_id)
            .where(mine, sa.not_(tasks.c.repeat), sa.not_(items.c.imported))
            .order_by(tasks.c.id)
        ).all()
        given = set(connection.scalars(again))
        if len(given) >= repeats_due(len(ranked), self._config.repeats, self._seed, person.name):
            return None
        fit = [row for row in ranked[:-NOT_BEFORE] if row.item_id not in given]
        if not fit:
            return None
        chosen = fit[shuffle_seed(self._seed, f"repeat of {person.name}", len(ranked)) % len(fit)]
        return self._give(connection, person, chosen, True, now)

    def _give(self, connection: sa.Connection, person: Person, item: Any, repeat: bool, now: datetime) -> int:
        """The id of a new task."""
        seed = order_seed(self._seed, item, person.name, repeat)
        row = {"item_id": item.item_id, "person_id": person.id, "repeat": repeat, "seed": seed, "state": "open"}
        row |= {"given": stamp(now), "expires": self._expires(now)}
        return inserted(connection.execute(tasks.insert().values(row)))

    def _has_room(self, connection: sa.Connection, item_id: int, now: datetime) -> bool:
        """Whether the group may be given to one more."""
        taken, skips = self._counts(now)
        num_taken = connection.scalar(sa.select(taken.c.num).where(taken.c.item_id == item_id)) or 0
        num_skips = connection.scalar(sa.select(skips.c.num).where(skips.c.item_id == item_id)) or 0
        return num_taken < self._config.quota and num_skips < self._config.max_skips

    def _free(self, person_id: int, now: datetime) -> sa.Select[Any, Any, Any]:
        """Groups that may be given to this person, those first that somebody has ranked: they are nearest to done."""
        taken, skips = self._counts(now)
        num_taken = sa.func.coalesce(taken.c.num, 0)
        had = sa.select(tasks.c.item_id).where(tasks.c.person_id == person_id, sa.not_(tasks.c.repeat))
        return (
            sa.select(items.c.id.label("item_id"), items.c.prompt_id, items.c.round)
            .outerjoin(taken, taken.c.item_id == items.c.id)
            .outerjoin(skips, skips.c.item_id == items.c.id)
            .where(
                num_taken < self._config.quota,
                sa.func.coalesce(skips.c.num, 0) < self._config.max_skips,
                sa.not_(items.c.imported),
                items.c.id.not_in(had),
            )
            .order_by(num_taken.desc(), items.c.id)
        )

    def _counts(self, now: datetime) -> tuple[sa.Subquery, sa.Subquery]:
        """(places that are taken, skips that count), by item; no row where there is none."""
        holds = sa.or_(tasks.c.state == "ranked", sa.and_(tasks.c.state == "open", tasks.c.expires > stamp(now)))

        def by_item(condition: sa.ColumnElement[bool]) -> sa.Subquery:
            return (
                sa.select(tasks.c.item_id, sa.func.count().label("num"))
                .join(persons, persons.c.id == tasks.c.person_id)
                .where(condition, sa.not_(tasks.c.repeat), sa.not_(persons.c.withdrawn))
                .group_by(tasks.c.item_id)
                .subquery()
            )

        return by_item(holds), by_item(tasks.c.state == "skipped")

    def _expires(self, now: datetime) -> str:
        return stamp(now + timedelta(minutes=self._config.lease_minutes))


def repeats_due(num_ranked: int, share: float, seed: int, name: str) -> int:
    """How many repeats a person who has ranked so many groups is to have had.

    One in each run of 1 / share groups, at a place in it that a hash chooses: they cannot be counted out.
    """
    if not share:
        return 0
    blocks = range(int(num_ranked * share) + 1)
    places = ((block + shuffle_seed(seed, f"repeats of {name}", block) / 2**62) / share for block in blocks)
    return sum(place < num_ranked for place in places)


def stamp(time: datetime) -> str:
    """ISO 8601 to the millisecond."""
    return time.isoformat(timespec="milliseconds")


def person_by_id(connection: sa.Connection, person_id: int) -> Person:
    """The person. Raises NotThere."""
    row = connection.execute(sa.select(persons).where(persons.c.id == person_id)).one_or_none()
    if row is None:
        raise NotThere(f"There is no person {person_id} at this desk.")
    return person_of(row)


def order_seed(seed: int, item: Any, name: str, repeat: bool) -> int:
    """What the order hangs on in which this person is shown this group; another one for a repeat."""
    return shuffle_seed(seed, f"{item.prompt_id} for {name}", item.round, int(repeat))


def put(connection: sa.Connection, rows: Sequence[Mapping[str, Any]], now: str) -> list[str]:
    """Prompt ids of those rows of items that are new, and now on the desk. Raises DeskError for other answers."""
    place = sa.tuple_(items.c.round, items.c.prompt_id)
    known: dict[tuple[int, str], str] = {}
    for first in range(0, len(rows), PLACES):
        places = [(row["round"], row["prompt_id"]) for row in rows[first : first + PLACES]]
        query = sa.select(items.c.round, items.c.prompt_id, items.c.answers).where(place.in_(places))
        known |= {(row.round, row.prompt_id): row.answers for row in connection.execute(query)}
    new: list[Mapping[str, Any]] = []
    for row in rows:
        there = known.get((row["round"], row["prompt_id"]))
        if there is None:
            new.append({"imported": False} | {**row, "created": now})
        elif there != row["answers"]:
            raise DeskError(
                f"The group of prompt {row['prompt_id']} in round {row['round']} is on the desk with other answers.",
                remedy="A row that is taken in has the answers that are there, or a prompt_id of its own; a database "
                "holds one run (desk.database).",
            )
    if new:
        connection.execute(items.insert(), new)
    return [row["prompt_id"] for row in new]


def item_row(prompt_id: str, round: int, messages: Sequence[Message], answers: Sequence[str]) -> dict[str, Any]:
    """A group as a row of items. Raises DeskError for too few or too many answers."""
    if not 2 <= len(answers) <= MOST_RANKED:
        raise DeskError(
            f"The group of prompt {prompt_id} has {len(answers)} answers.",
            limit=f"People rank 2 to {MOST_RANKED}.",
            remedy="Set sampling.n to a number in these limits.",
        )
    return {
        "round": round,
        "prompt_id": prompt_id,
        "messages": json.dumps([[message.role, message.content] for message in messages]),
        "answers": json.dumps(list(answers)),
    }


def inserted(result: sa.CursorResult[Any]) -> int:
    """The id of the row that was inserted."""
    assert result.inserted_primary_key is not None
    return result.inserted_primary_key[0]
