"""The desk as its users see it: the page, the command line and the stages of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import sqlalchemy as sa

from configs.desk import DeskConfig
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
        raise NotImplementedError

    # People

    def invite(self, name: str, role: PersonRole = "annotator") -> str:
        """The token of a new person, which is shown this once: only its hash is kept.

        Raises DeskError for a name that is taken, empty, longer than 100 characters or with control characters.
        """
        raise NotImplementedError

    def renew_token(self, name: str) -> str:
        """A new token for a person who lost theirs; the old one is no longer valid. Raises NotThere."""
        raise NotImplementedError

    def sign_in(self, token: str) -> Person | None:
        """Whose token this is; None if nobody's."""
        raise NotImplementedError

    def people(self) -> list[Person]:
        """All, in the order of their invitation."""
        raise NotImplementedError

    def withdraw(self, name: str, by: str, reason: str = "") -> None:
        """Sets all that a person said aside: it is kept, and counts no longer, so that groups are given out again.

        `by` is who does it. The person is given no more tasks. Raises NotThere.
        """
        raise NotImplementedError

    def reinstate(self, name: str, by: str, reason: str = "") -> None:
        """Takes a withdrawal back. Raises NotThere."""
        raise NotImplementedError

    # Tasks

    def add_groups(self, groups: Sequence[AnswerGroup], round: int = 0) -> int:
        """How many of the groups are new on the desk. Those that are there already stay as they are.

        Raises DeskError for a group that is there with other answers, or with more than 26.
        """
        raise NotImplementedError

    def next_task(self, person_id: int) -> Task | None:
        """What the person is to rank now; None if there is nothing for them at the moment.

        It is the task that they have open, if they have one; else a new one, leased for `lease_minutes`. A group is
        given to as many people as the quota says and no more, however many ask at once, and never twice to one person,
        but for hidden repeats, which do not count.
        """
        raise NotImplementedError

    def task(self, person_id: int, task_id: int) -> Task:
        """A task that this person was given, handed in or not: to go back to it. Raises NotThere."""
        raise NotImplementedError

    def save_draft(self, person_id: int, task_id: int, state: Mapping[str, Any], time_ms: int) -> Draft:
        """The draft as it was kept; the lease begins again. Also of a task that was handed in, while it is corrected.

        Raises NotThere; BadVerdict for a state that is no JSON or longer than 200,000 characters.
        """
        raise NotImplementedError

    def submit(self, person_id: int, task_id: int, verdict: Verdict, time_ms: int) -> Submission:
        """The row that now counts: the first of the task, or a correction.

        The same verdict once more (a page that had no answer sends it again) gives the row that is there. A lease that
        has run out does no harm: what was ranked is kept and counts. Raises NotThere, BadVerdict.
        """
        raise NotImplementedError

    def skip(self, person_id: int, task_id: int, reason: str, time_ms: int) -> Submission:
        """The row that now counts. The group goes to somebody else. Raises NotThere, BadVerdict (empty reason)."""
        raise NotImplementedError

    def history(self, person_id: int, limit: int = 50) -> list[Submission]:
        """The newest row of each task that this person handed in, newest first: what can be gone back to."""
        raise NotImplementedError

    def own_progress(self, person_id: int) -> OwnProgress:
        """How far this person is."""
        raise NotImplementedError

    # The lead's view, and the run's

    def progress(self, round: int | None = None) -> Progress:
        """How far a round is, or all of them."""
        raise NotImplementedError

    def agreement(self, round: int | None = None) -> Agreement:
        """How far people agree, over what counts now; quick to ask for again while nothing is handed in."""
        raise NotImplementedError

    def items(self, round: int | None = None, offset: int = 0, limit: int = 100) -> list[Item]:
        """The groups with their state, in the order in which they came."""
        raise NotImplementedError

    def item(self, prompt_id: str, round: int = 0) -> Item:
        """One group. Raises NotThere."""
        raise NotImplementedError

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
        raise NotImplementedError

    def set_scores(self, scores: Mapping[str, Sequence[float]], round: int = 0) -> None:
        """Keeps the reward model's scores [n] of each group, by prompt id, for `agreement`. Raises NotThere."""
        raise NotImplementedError

    def consensus(self, round: int) -> list[Consensus]:
        """One ranking per group that anybody ranked: by mean rank, not accepted where people agree too little."""
        raise NotImplementedError

    # In and out

    def export_rows(self, round: int | None = None) -> Iterator[dict[str, Any]]:
        """JSONL rows, one per group, with its answers and all that people said of it (rlhf/desk/exchange.py)."""
        raise NotImplementedError

    def export_pairs(self, round: int | None = None) -> Iterator[dict[str, Any]]:
        """Rows `prompt`, `chosen`, `rejected` in TRL's conversational form: all pairs that the consensus orders."""
        raise NotImplementedError

    def import_rows(self, rows: Iterable[Mapping[str, Any]], by: str, round: int = 0) -> int:
        """How many rankings were taken in: rows of `export_rows`, or of TRL's kind, as those of the person `by`."""
        raise NotImplementedError

    def close(self) -> None:
        """Lets go of the file or server."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_desk(folder: Path) -> Desk:
    """The desk of the run in this folder: its recipe says where, in rankings.db of the folder unless `desk.database`.

    The run's lock is not taken: the run may go on beside it. Raises StoreError, ConfigError.
    """
    raise NotImplementedError


def guidelines(folder: Path) -> str:
    """The Markdown file that the run's recipe names in `desk.guidelines`; empty if it names none. Raises DataError."""
    raise NotImplementedError
