"""The desk as its users see it: the page, the command line and the stages of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import sqlalchemy as sa

from configs.desk import DeskConfig
from configs.load import load_recipe
from configs.schema import Recipe
from rlhf.database import Database
from rlhf.desk import intake
from rlhf.desk.exchange import Taken, pairs_of, read_rows, row_of
from rlhf.desk.giving import Giving, stamp
from rlhf.desk.overview import Overview
from rlhf.desk.people import People
from rlhf.desk.records import (
    Agreement,
    Consensus,
    Draft,
    Item,
    OwnProgress,
    Person,
    PersonRole,
    Progress,
    Submission,
    Task,
    Verdict,
)
from rlhf.desk.taking import Taking
from rlhf.errors import DataError, StoreError
from rlhf.files import reason_of
from rlhf.manifest import RECIPE, read_manifest
from rlhf.rankings_schema import METADATA, MIGRATIONS, SCHEMA_VERSION, desk_run
from rlhf.records import AnswerGroup


class Desk:
    """Tasks, people and what they said, behind an SQLAlchemy URL.

    Any number of threads and processes may use one database at a time, each with its own `Desk`; one `Desk` may be
    shared by threads. Every method is one transaction: it did all of it or nothing. What was handed in is never
    changed: a correction is a new row, and the newest row of a task counts.
    """

    def __init__(
        self,
        url: str | sa.URL,
        config: DeskConfig | None = None,
        *,
        seed: int = 0,
        run: str = "",
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """Opens the database and makes its tables, or brings them to this version.

        Args:
            url: of SQLite or PostgreSQL.
            config: quota, leases, repeats; of the recipe.
            seed: of the run; the orders that answers are shown in hang on it.
            run: names the run. A database holds one run: another's is refused. Empty: whichever it holds.

        Raises StoreError: cannot be opened, has a newer schema, holds another run.
        """
        config = config or DeskConfig()
        self._seed, self._clock = seed, clock
        self._database = Database(url, METADATA, SCHEMA_VERSION, MIGRATIONS, shared=True)
        self._people = People(self._database, lambda: stamp(clock()))
        self._giving = Giving(self._database, config, seed, clock)
        self._taking = Taking(self._database, self._giving, clock)
        self._overview = Overview(self._database, config, clock)
        if run:
            self._take_place(run)

    # People

    def invite(self, name: str, role: PersonRole = "annotator") -> str:
        """The token of a new person, which is shown this once: only its hash is kept.

        Whose rankings were only taken in from elsewhere counts as new, and keeps them.

        Raises DeskError for a name that is taken, empty, longer than 100 characters or with control characters.
        """
        return self._people.invite(name, role)

    def renew_token(self, name: str) -> str:
        """A new token for a person who lost theirs; the old one is no longer valid. Raises NotThere."""
        return self._people.renew_token(name)

    def sign_in(self, token: str) -> Person | None:
        """Whose token this is; None if nobody's."""
        return self._people.sign_in(token)

    def people(self) -> list[Person]:
        """All, in the order of their invitation."""
        return self._people.people()

    def withdraw(self, name: str, by: str, reason: str = "") -> None:
        """Sets all that a person said aside: it is kept, and counts no longer, so that groups are given out again.

        `by` is who does it. The person is given no more tasks. Raises NotThere.
        """
        self._people.set_aside(name, True, by, reason)

    def reinstate(self, name: str, by: str, reason: str = "") -> None:
        """Takes a withdrawal back. Raises NotThere."""
        self._people.set_aside(name, False, by, reason)

    # Tasks

    def add_groups(self, groups: Sequence[AnswerGroup], round: int = 0) -> int:
        """How many of the groups are new on the desk. Those that are there already stay as they are.

        Raises DeskError for a group that is there with other answers, or with more than 26.
        """
        return self._giving.add_groups(groups, round)

    def next_task(self, person_id: int) -> Task | None:
        """What the person is to rank now; None if there is nothing for them at the moment.

        It is the task that they have open, if they have one; else a new one, leased for `lease_minutes`. A group is
        given to as many people as the quota says and no more, however many ask at once, and never twice to one person,
        but for hidden repeats, which do not count.
        """
        return self._giving.next_task(person_id)

    def task(self, person_id: int, task_id: int) -> Task:
        """A task that this person was given, handed in or not: to go back to it. Raises NotThere."""
        return self._taking.task(person_id, task_id)

    def save_draft(self, person_id: int, task_id: int, state: Mapping[str, Any], time_ms: int) -> Draft:
        """The draft as it was kept; the lease begins again. Also of a task that was handed in, while it is corrected.

        Raises NotThere; BadVerdict for a state that is no JSON or longer than 200,000 characters.
        """
        return self._taking.save_draft(person_id, task_id, state, time_ms)

    def submit(self, person_id: int, task_id: int, verdict: Verdict, time_ms: int) -> Submission:
        """The row that now counts: the first of the task, or a correction.

        The same verdict once more (a page that had no answer sends it again) gives the row that is there. A lease that
        has run out does no harm: what was ranked is kept and counts. Raises NotThere, BadVerdict.
        """
        return self._taking.submit(person_id, task_id, verdict, time_ms)

    def skip(self, person_id: int, task_id: int, reason: str, time_ms: int) -> Submission:
        """The row that now counts. The group goes to somebody else. Raises NotThere, BadVerdict (empty reason)."""
        return self._taking.skip(person_id, task_id, reason, time_ms)

    def history(self, person_id: int, limit: int = 50) -> list[Submission]:
        """The newest row of each task that this person handed in, newest first: what can be gone back to."""
        return self._taking.history(person_id, limit)

    def own_progress(self, person_id: int) -> OwnProgress:
        """How far this person is."""
        return self._giving.own_progress(person_id)

    # The lead's view, and the run's

    def rounds(self) -> tuple[int, ...]:
        """The rounds of which there are groups, in order."""
        return self._overview.rounds()

    def progress(self, round: int | None = None) -> Progress:
        """How far a round is, or all of them."""
        return self._overview.progress(round)

    def agreement(self, round: int | None = None) -> Agreement:
        """How far people agree, over what counts now; quick to ask for again while nothing is handed in."""
        return self._overview.agreement(round)

    def items(self, round: int | None = None, offset: int = 0, limit: int = 100) -> list[Item]:
        """The groups with their state, in the order in which they came."""
        return self._overview.items(round, offset, limit)

    def item(self, prompt_id: str, round: int = 0) -> Item:
        """One group. Raises NotThere."""
        return self._overview.item(prompt_id, round)

    def submissions(
        self,
        *,
        prompt_id: str | None = None,
        round: int | None = None,
        person: str | None = None,
        every_row: bool = False,
        withdrawn: bool = True,
    ) -> list[Submission]:
        """The newest row of each task, in the order in which they came; skips too.

        `every_row`: also those that were corrected since. `withdrawn`: also of people whose rankings are set aside.
        """
        return self._overview.submissions(prompt_id, round, person, every_row, withdrawn)

    def set_scores(self, scores: Mapping[str, Sequence[float]], round: int = 0) -> None:
        """Keeps the reward model's scores [n] of each group, by prompt id, for `agreement`. Raises NotThere."""
        self._overview.set_scores(scores, round)

    def consensus(self, round: int) -> list[Consensus]:
        """One ranking per group that anybody ranked: by mean rank, not accepted where people agree too little."""
        return self._overview.consensus(round)

    # In and out

    def export_rows(self, round: int | None = None) -> Iterator[dict[str, Any]]:
        """JSONL rows, one per group, with its answers and all that people said of it (rlhf/desk/exchange.py)."""
        withdrawn = {person.name for person in self.people() if person.withdrawn}
        for item, consensus in self._with_consensus(round):
            said = self.submissions(prompt_id=item.prompt_id, round=item.round)
            yield row_of(item, said, withdrawn, consensus)

    def export_pairs(self, round: int | None = None) -> Iterator[dict[str, Any]]:
        """Rows `prompt`, `chosen`, `rejected` in TRL's conversational form: all pairs that the consensus orders."""
        for item, consensus in self._with_consensus(round):
            if consensus is not None and consensus.accepted:
                yield from pairs_of(item, consensus)

    def import_rows(self, rows: Iterable[Mapping[str, Any]], by: str, round: int = 0) -> int:
        """How many rankings were taken in: rows of `export_rows`, or of TRL's kind, as those of the person `by`."""
        return self.take_in(read_rows(rows, by), round)

    def take_in(self, taken: Sequence[Taken], round: int = 0) -> int:
        """How many rankings of these groups are new. A group that comes with rankings is not given out to others."""
        with self._database.write() as connection:
            return intake.take_in(connection, taken, round, self._seed, stamp(self._clock()))

    def close(self) -> None:
        """Lets go of the file or server."""
        self._database.close()

    def _with_consensus(self, round: int | None) -> Iterator[tuple[Item, Consensus | None]]:
        agreed: dict[int, dict[str, Consensus]] = {}
        offset = 0
        while page := self.items(round, offset):
            for item in page:
                if item.round not in agreed:
                    agreed[item.round] = {one.prompt_id: one for one in self.consensus(item.round)}
                yield item, agreed[item.round].get(item.prompt_id)
            offset += len(page)

    def _take_place(self, run: str) -> None:
        try:
            with self._database.write() as connection:
                holder = connection.scalar(sa.select(desk_run.c.run))
                if holder is None:
                    connection.execute(desk_run.insert().values(run=run))
        except BaseException:
            self.close()
            raise
        if holder not in (None, run):
            self.close()
            raise StoreError(
                f"The database of the desk holds another run ({holder}; this one is {run}).",
                remedy="Use a database of its own for each run (desk.database).",
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_desk(folder: Path, recipe: Recipe | None = None) -> Desk:
    """The desk of the run in this folder: in its rankings.db, unless the recipe has `desk.database`.

    `recipe` is the one to go by; None: the run's own. The run's lock is not taken: the run may go on beside it. Raises
    StoreError, ConfigError.
    """
    recipe = recipe or load_recipe(folder / RECIPE)
    url = recipe.desk.database or sa.URL.create("sqlite", database=str(folder / "rankings.db"))
    return Desk(url, recipe.desk, seed=recipe.seed, run=read_manifest(folder)["created"])


def guidelines(folder: Path) -> str:
    """The Markdown file that the run's recipe names in `desk.guidelines`; empty if it names none. Raises DataError."""
    return read_guidelines(load_recipe(folder / RECIPE).desk.guidelines)


def read_guidelines(path: str | None) -> str:
    """The text of the file; empty of None. Raises DataError."""
    if path is None:
        return ""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"desk.guidelines={path} cannot be read: {reason_of(error)}.",
            remedy="Name a Markdown file in UTF-8, or leave it out.",
        ) from error
