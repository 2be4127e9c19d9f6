"""What the lead and the run look at: how far it is, how far people agree, what they said."""

from __future__ import annotations

import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from configs.desk import DeskConfig
from rlhf.database import Database
from rlhf.desk.agreement import Vote, measure
from rlhf.desk.consensus import mean_rank, mean_tau
from rlhf.desk.errors import NotThere
from rlhf.desk.giving import stamp
from rlhf.desk.people import person_of
from rlhf.desk.records import Agreement, Consensus, Item, Person, PersonProgress, Progress, Submission, Tiers
from rlhf.desk.rows import every, messages_of, newest, submission_of, verdict_from_plain
from rlhf.rankings_schema import drafts, items, persons, submissions, tasks, withdrawals


class Overview:
    """The state of a desk. What the methods do is said at those of `Desk`."""

    def __init__(self, database: Database, config: DeskConfig, clock: Callable[[], datetime]) -> None:
        self._database, self._config, self._clock = database, config, clock
        self._measured: dict[int | None, tuple[object, Agreement]] = {}  # by round: of which state, and what it was

    def rounds(self) -> tuple[int, ...]:
        with self._database.read() as connection:
            return tuple(connection.scalars(sa.select(items.c.round).distinct().order_by(items.c.round)))

    def progress(self, round: int | None) -> Progress:
        quota = self._config.quota
        with self._database.read() as connection:
            now = stamp(self._clock())
            there = connection.execute(sa.select(items.c.id, items.c.imported).where(_in(round))).all()
            given = connection.execute(
                sa.select(tasks, items.c.round).join(items, items.c.id == tasks.c.item_id).where(_in(round))
            ).all()
            people = [person_of(row) for row in connection.execute(sa.select(persons).order_by(persons.c.id))]
            times, seen = self._times(connection, round), _last_seen(connection)
        ids = [item.id for item in there if not item.imported]  # of those that people are to rank
        active = {person.id for person in people if not person.withdrawn}
        counted = [task for task in given if not task.repeat and task.person_id in active]
        ranked = Counter(task.item_id for task in counted if task.state == "ranked")
        skipped = Counter(task.item_id for task in counted if task.state == "skipped")
        under_way = [task for task in counted if task.state == "open" and task.expires > now]
        done = {item for item in ids if ranked[item] >= quota}
        closed = {item for item in ids if skipped[item] >= self._config.max_skips} - done
        # Whoever ranks: annotators, and leads who took a task.
        workers = {task.person_id for task in given} | {p.id for p in people if p.role == "annotator"}
        workers &= {person.id for person in people if person.invited and not person.withdrawn}
        had = Counter(task.item_id for task in counted if task.state != "open" and task.person_id in workers)
        short = [item for item in ids if item not in done | closed and len(workers) - had[item] < quota - ranked[item]]
        return Progress(
            quota=quota,
            num_groups=len(there),
            num_done=len(done) + len(there) - len(ids),
            num_closed=len(closed),
            num_rankings=sum(min(ranked[item], quota) for item in ids if item not in closed),
            num_wanted=quota * (len(ids) - len(closed)),
            num_open=len(under_way),
            num_short=len(short),
            people=tuple(_person(person, given, times, seen) for person in people),
        )

    def agreement(self, round: int | None) -> Agreement:
        with self._database.read() as connection:
            state = connection.execute(
                sa.select(
                    sa.select(sa.func.max(submissions.c.id)).scalar_subquery(),
                    sa.select(sa.func.max(withdrawals.c.id)).scalar_subquery(),
                    sa.select(sa.func.count(items.c.scores)).scalar_subquery(),
                )
            ).one()
            known = self._measured.get(round)
            if known is not None and known[0] == tuple(state):
                return known[1]
            votes = [vote for vote, _ in self._votes(connection, round)]
            scored = connection.execute(
                sa.select(items.c.id, items.c.scores).where(_in(round), items.c.scores.is_not(None))
            ).all()
        found = measure(votes, {row.id: json.loads(row.scores) for row in scored})
        self._measured[round] = (tuple(state), found)
        return found

    def consensus(self, round: int) -> list[Consensus]:
        with self._database.read() as connection:
            votes = self._votes(connection, round)
        by_prompt: dict[str, list[Vote]] = defaultdict(list)
        for vote, prompt_id in votes:
            if not vote.repeat:
                by_prompt[prompt_id].append(vote)
        return [self._agreed(prompt_id, round, found) for prompt_id, found in by_prompt.items()]

    def items(self, round: int | None, offset: int, limit: int) -> list[Item]:
        return self._items(_in(round), offset, limit)

    def item(self, prompt_id: str, round: int) -> Item:
        found = self._items(sa.and_(items.c.prompt_id == prompt_id, items.c.round == round), 0, 1)
        if not found:
            raise NotThere(f"There is no group of prompt {prompt_id!r} in round {round} on the desk.")
        return found[0]

    def submissions(
        self, prompt_id: str | None, round: int | None, person: str | None, every_row: bool, withdrawn: bool
    ) -> list[Submission]:
        conditions = [_in(round)]
        if prompt_id is not None:
            conditions.append(items.c.prompt_id == prompt_id)
        if person is not None:
            conditions.append(persons.c.name == person)
        if not withdrawn:
            conditions.append(sa.not_(persons.c.withdrawn))
        query = (every() if every_row else newest()).where(*conditions)
        with self._database.read() as connection:
            return [submission_of(row) for row in connection.execute(query)]

    def set_scores(self, scores: Mapping[str, Sequence[float]], round: int) -> None:
        with self._database.write() as connection:
            for prompt_id, numbers in scores.items():
                place = sa.and_(items.c.prompt_id == prompt_id, items.c.round == round)
                answers = connection.scalar(sa.select(items.c.answers).where(place))
                if answers is None:
                    raise NotThere(f"There is no group of prompt {prompt_id!r} in round {round} on the desk.")
                assert len(numbers) == len(json.loads(answers)), f"{len(numbers)} scores of {prompt_id}"
                text = json.dumps([float(number) for number in numbers], allow_nan=False)
                connection.execute(items.update().where(place).values(scores=text))

    def _agreed(self, prompt_id: str, round: int, votes: Sequence[Vote]) -> Consensus:
        rankings: list[Tiers] = [vote.tiers for vote in votes]
        agreement = mean_tau(rankings)
        return Consensus(
            prompt_id,
            round,
            mean_rank(rankings),
            tuple(vote.person for vote in votes),
            agreement,
            agreement is None or agreement >= self._config.min_agreement,
        )

    def _votes(self, connection: sa.Connection, round: int | None) -> list[tuple[Vote, str]]:
        """What counts now, each with its prompt's id, in the order of the groups and then of the people."""
        query = newest(tasks.c.state == "ranked").where(_in(round), sa.not_(persons.c.withdrawn)).order_by(None)
        found: list[tuple[Vote, str]] = []
        for row in connection.execute(query.order_by(items.c.id, persons.c.id, tasks.c.id)):
            said = verdict_from_plain(json.loads(row.said))
            found.append((Vote(row.item_id, row.name, said.tiers, said.grades, row.repeat), row.prompt_id))
        return found

    def _items(self, condition: sa.ColumnElement[bool], offset: int, limit: int) -> list[Item]:
        with self._database.read() as connection:
            rows = connection.execute(
                sa.select(items).where(condition).order_by(items.c.id).offset(offset).limit(limit)
            ).all()
            states = connection.execute(
                sa.select(tasks.c.item_id, tasks.c.state, sa.func.count().label("num"))
                .join(persons, persons.c.id == tasks.c.person_id)
                .where(
                    tasks.c.item_id.in_([row.id for row in rows]),
                    sa.not_(tasks.c.repeat),
                    sa.not_(persons.c.withdrawn),
                )
                .group_by(tasks.c.item_id, tasks.c.state)
            ).all()
        num = {(state.item_id, state.state): state.num for state in states}
        return [
            Item(
                prompt_id=row.prompt_id,
                round=row.round,
                messages=messages_of(row.messages),
                answers=tuple(json.loads(row.answers)),
                scores=None if row.scores is None else tuple(json.loads(row.scores)),
                num_rankings=num.get((row.id, "ranked"), 0),
                num_skips=num.get((row.id, "skipped"), 0),
                imported=row.imported,
                closed=not row.imported
                and num.get((row.id, "ranked"), 0) < self._config.quota
                and num.get((row.id, "skipped"), 0) >= self._config.max_skips,
            )
            for row in rows
        ]

    def _times(self, connection: sa.Connection, round: int | None) -> dict[int, list[int]]:
        """Milliseconds of each task that was handed in, by person."""
        query = (
            sa.select(tasks.c.person_id, sa.func.max(submissions.c.time_ms).label("time_ms"))
            .join(tasks, tasks.c.id == submissions.c.task_id)
            .join(items, items.c.id == tasks.c.item_id)
            .where(_in(round))
            .group_by(tasks.c.id, tasks.c.person_id)
        )
        found: dict[int, list[int]] = defaultdict(list)
        for row in connection.execute(query):
            found[row.person_id].append(row.time_ms)
        return found


def _in(round: int | None) -> sa.ColumnElement[bool]:
    return sa.true() if round is None else items.c.round == round


def _last_seen(connection: sa.Connection) -> dict[int, str]:
    found: dict[int, str] = {}
    for table, when in ((drafts, drafts.c.saved), (submissions, submissions.c.created)):
        query = (
            sa.select(tasks.c.person_id, sa.func.max(when).label("seen"))
            .join(tasks, tasks.c.id == table.c.task_id)
            .group_by(tasks.c.person_id)
        )
        for row in connection.execute(query):
            found[row.person_id] = max(found.get(row.person_id, ""), row.seen)
    return found


def _person(
    person: Person, given: Sequence[sa.Row[Any]], times: Mapping[int, list[int]], seen: Mapping[int, str]
) -> PersonProgress:
    mine = Counter((task.state, task.repeat) for task in given if task.person_id == person.id)
    spent = times.get(person.id, [])
    return PersonProgress(
        person=person,
        num_ranked=mine["ranked", False],
        num_skipped=mine["skipped", False] + mine["skipped", True],
        num_repeats=mine["ranked", True],
        time_ms=sum(spent),
        median_time_ms=round(statistics.median(spent)) if spent else 0,
        last_seen=seen.get(person.id),
    )
