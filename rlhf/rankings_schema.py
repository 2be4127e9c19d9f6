"""The tables of rankings: those that training uses, and the desk's. One schema, one version, for both."""

from __future__ import annotations

import sqlalchemy as sa

SCHEMA_VERSION = 3
METADATA = sa.MetaData()


def _table(name: str, *columns: sa.schema.SchemaItem) -> sa.Table:
    return sa.Table(name, METADATA, *columns)


def _id() -> sa.Column[int]:
    return sa.Column("id", sa.Integer, primary_key=True, autoincrement=True)


def _of(table: str, *, index: bool = False) -> sa.Column[int]:
    return sa.Column(f"{table}_id", sa.Integer, sa.ForeignKey(f"{table}s.id"), nullable=False, index=index)


def _when(name: str) -> sa.Column[str]:
    """ISO 8601, UTC, to the millisecond: texts of one length, which compare as the times do."""
    return sa.Column(name, sa.String(40), nullable=False)


def _json(name: str) -> sa.Column[str]:
    """JSON as ASCII text: PostgreSQL's text knows neither NUL nor half of a surrogate pair, and answers hold both."""
    return sa.Column(name, sa.Text, nullable=False)


# Since version 1
schema_version = _table("schema_version", sa.Column("version", sa.Integer, nullable=False))
rankings = _table(
    "rankings",
    _id(),
    sa.Column("prompt_id", sa.String(64), nullable=False, index=True),
    sa.Column("round", sa.Integer, nullable=False, index=True),
    sa.Column("by", sa.String(200), nullable=False),
    _json("tiers"),  # answer indices, best tier first
    _when("created"),
)

# Since version 2: the desk
desk_run = _table("desk_run", sa.Column("run", sa.String(200), nullable=False))  # whose desk it is
persons = _table(
    "persons",
    _id(),
    sa.Column("name", sa.String(200), nullable=False, unique=True),
    sa.Column("role", sa.String(20), nullable=False),
    sa.Column("token_hash", sa.String(64), nullable=False, unique=True),
    sa.Column("withdrawn", sa.Boolean, nullable=False),  # what the newest row of `withdrawals` says
    _when("invited"),  # empty: only taken in, with a token that nobody has
)
withdrawals = _table(
    "withdrawals",
    _id(),
    _of("person", index=True),
    sa.Column("withdrawn", sa.Boolean, nullable=False),
    _json("about"),  # by whom and why
    _when("created"),
)
items = _table(
    "items",
    _id(),
    sa.Column("round", sa.Integer, nullable=False),
    sa.Column("prompt_id", sa.String(64), nullable=False),
    _json("messages"),  # [role, content] of each turn
    _json("answers"),  # texts
    sa.Column("scores", sa.Text),  # JSON: the reward model's, if it has given any
    _when("created"),
    # Since version 3: whether it came with its rankings, so that nobody is asked for more.
    sa.Column("imported", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.UniqueConstraint("round", "prompt_id"),
)
tasks = _table(
    "tasks",
    _id(),
    _of("item"),
    _of("person", index=True),
    sa.Column("repeat", sa.Boolean, nullable=False),
    sa.Column("seed", sa.BigInteger, nullable=False),  # of the order shown
    sa.Column("state", sa.String(20), nullable=False),  # open, or what its newest submission is: ranked, skipped
    _when("given"),
    _when("expires"),
    sa.UniqueConstraint("item_id", "person_id", "repeat"),
)
drafts = _table(
    "drafts",
    sa.Column("task_id", sa.Integer, sa.ForeignKey("tasks.id"), primary_key=True),
    _json("state"),
    sa.Column("time_ms", sa.BigInteger, nullable=False),
    _when("saved"),
)
submissions = _table(
    "submissions",
    _id(),
    _of("task", index=True),
    _json("said"),  # a verdict, or why it was skipped
    sa.Column("time_ms", sa.BigInteger, nullable=False),
    _when("created"),
)

SINCE_2 = (desk_run, persons, withdrawals, items, tasks, drafts, submissions)


def _to_2(connection: sa.Connection) -> None:
    METADATA.create_all(connection, tables=SINCE_2)


def _to_3(connection: sa.Connection) -> None:
    # What comes from version 1 has made its tables just now, as they are today.
    if "imported" not in {column["name"] for column in sa.inspect(connection).get_columns("items")}:
        connection.execute(sa.text("ALTER TABLE items ADD COLUMN imported BOOLEAN NOT NULL DEFAULT FALSE"))


MIGRATIONS = {1: _to_2, 2: _to_3}
