"""A database behind an SQLAlchemy URL: opened, checked, migrated, and asked in transactions that tell their errors."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import SQLAlchemyError

from rlhf.errors import StoreError

PASSWORD = "PGPASSWORD"  # the variable of PostgreSQL's own tools
BUSY_S = 30  # that a writer waits for another, on SQLite
ANSWER_S = 120  # that PostgreSQL may take for anything; a writer may wait for another meanwhile
_LOCK = 0x7E4F01D  # PostgreSQL's advisory locks are numbers: this one is held by whoever writes

Migrations = Mapping[int, Callable[[sa.Connection], None]]


class Database:
    """Tables of one schema version, for any number of threads and processes.

    Args:
        url: SQLite or PostgreSQL; its password comes from the environment (PGPASSWORD).
        metadata: the tables as they are now, a table `schema_version` with a column `version` among them.
        version: of these tables.
        migrations: what makes version n + 1 of version n, by n.
        shared: whether other processes write while this one does (SQLite then keeps a write-ahead log).

    Raises StoreError: cannot be opened, or of a version that is newer or from before the first that migrates.
    """

    def __init__(
        self,
        url: str | sa.URL,
        metadata: sa.MetaData,
        version: int,
        migrations: Migrations,
        *,
        shared: bool = False,
    ) -> None:
        made = complete(url)
        self._name = made.set(query={}).render_as_string(hide_password=True)
        self.is_sqlite = made.get_backend_name() == "sqlite"
        # Writers of one process queue here, in turn; SQLite would let them try again and again, out of turn.
        self._turn = threading.Lock() if self.is_sqlite else nullcontext()
        try:
            options: dict[str, Any] = (
                {}
                if self.is_sqlite
                else {"pool_pre_ping": True, "pool_size": 10, "connect_args": {"timeout": ANSWER_S}}
            )
            self._engine = sa.create_engine(made, **options)
        except ModuleNotFoundError as error:
            raise StoreError(
                f"{self._name}: {error.name} is not installed.",
                remedy="Install the driver: pip install 'tenfold[people]'.",
            ) from error
        if self.is_sqlite:
            _teach_sqlite(self._engine, shared)
        with self.write() as connection:
            self._bring_up(connection, metadata, version, migrations)

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """A transaction that only reads."""
        with self._told(), self._engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """A transaction: all of the block lasts, or nothing.

        No other one that writes, of whichever process, runs at the same time, so that what is decided on what was read
        stays right: SQLite has one writer at a time, on PostgreSQL an advisory lock sees to it.
        """
        with self._told(), self._turn, self._engine.connect() as connection:
            connection = connection.execution_options(writes=True)
            with connection.begin():
                if not self.is_sqlite:
                    connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
                yield connection

    def close(self) -> None:
        """Lets go of the file or server."""
        self._engine.dispose()

    def _bring_up(self, connection: sa.Connection, metadata: sa.MetaData, version: int, migrations: Migrations) -> None:
        known = metadata.tables["schema_version"]
        if not sa.inspect(connection).has_table(known.name):
            metadata.create_all(connection)
            connection.execute(known.insert().values(version=version))
            return
        found = connection.scalar(sa.select(sa.func.max(known.c.version)))
        if found is None or found > version or (found < version and found not in migrations):
            raise StoreError(
                f"{self._name} has schema version {found}.",
                limit=f"This Tenfold reads versions {min(migrations, default=version)} up to {version}.",
                remedy="Update Tenfold.",
            )
        for before in range(found, version):
            migrations[before](connection)
            connection.execute(known.insert().values(version=before + 1))

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except SQLAlchemyError as error:
            reason: Any = getattr(error, "orig", None) or error
            if reason.args and isinstance(reason.args[0], dict):  # pg8000's are PostgreSQL's fields; M is the message
                reason = cast(dict[str, str], reason.args[0]).get("M", reason)
            raise StoreError(
                f"The rankings in {self._name} cannot be read or written: {reason}.",
                remedy="Restore the database from a copy, or see that it can be reached and written to.",
            ) from error


def complete(url: str | sa.URL) -> sa.URL:
    """The URL with the driver that we use and the password that the environment has."""
    try:
        made = sa.make_url(url)
    except SQLAlchemyError as error:
        raise StoreError(
            "desk.database is no database URL.", remedy="Write postgresql://USER@HOST:PORT/DATABASE."
        ) from error
    if made.get_backend_name() not in ("sqlite", "postgresql"):
        raise StoreError(
            f"desk.database: {made.get_backend_name()} is not supported.",
            remedy="Use PostgreSQL, or leave it out for SQLite in the run folder.",
        )
    if made.get_backend_name() == "postgresql":
        made = made.set(drivername="postgresql+pg8000", password=made.password or os.environ.get(PASSWORD))
    return made


def _teach_sqlite(engine: sa.Engine, shared: bool) -> None:
    """Makes SQLite wait for other writers, and begin a transaction that writes as one, so that none fails half-way."""

    def connect(connection: Any, record: object) -> None:
        connection.isolation_level = None  # else the driver begins transactions of its own
        connection.execute(f"PRAGMA busy_timeout = {1000 * BUSY_S}")
        connection.execute("PRAGMA foreign_keys = ON")
        if shared:
            connection.execute("PRAGMA journal_mode = WAL")

    def begin(connection: sa.Connection) -> None:
        writes = connection.get_execution_options().get("writes")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    event.listen(engine, "connect", connect)
    event.listen(engine, "begin", begin)
