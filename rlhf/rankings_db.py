"""Rankings in a database. Append-only: a correction is a new row, and the newest row counts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from rlhf.errors import StoreError
from rlhf.records import Ranking

SCHEMA_VERSION = 1
_metadata = sa.MetaData()
_schema_version = sa.Table("schema_version", _metadata, sa.Column("version", sa.Integer, nullable=False))
_rankings = sa.Table(
    "rankings",
    _metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("prompt_id", sa.String(64), nullable=False, index=True),
    sa.Column("round", sa.Integer, nullable=False, index=True),
    sa.Column("by", sa.String(200), nullable=False),
    sa.Column("tiers", sa.Text, nullable=False),  # JSON: answer indices, best tier first
    sa.Column("created", sa.String(40), nullable=False),  # ISO 8601, UTC
)


class RankingsDB:
    """The rankings behind an SQLAlchemy URL."""

    def __init__(self, url: str | sa.URL) -> None:
        """Opens the database and makes its tables where there are none. Raises StoreError, also for a newer schema."""
        self._name = sa.make_url(url).render_as_string(hide_password=True)
        self._engine = sa.create_engine(url)
        try:
            with self._engine.begin() as connection:
                _metadata.create_all(connection)
                version = connection.scalar(sa.select(sa.func.max(_schema_version.c.version)))
                if version is None:
                    connection.execute(_schema_version.insert().values(version=SCHEMA_VERSION))
        except SQLAlchemyError as error:
            raise self._error(error) from error
        if version is not None and version > SCHEMA_VERSION:
            raise StoreError(
                f"{self._name} has schema version {version}.",
                limit=f"This Tenfold reads versions up to {SCHEMA_VERSION}.",
                remedy="Update Tenfold.",
            )

    def add(self, rankings: Sequence[Ranking]) -> None:
        """Adds all of the rankings or, when it fails, none."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        rows = [
            {
                "prompt_id": ranking.prompt_id,
                "round": ranking.round,
                "by": ranking.by,
                "tiers": json.dumps(ranking.tiers),
                "created": now,
            }
            for ranking in rankings
        ]
        if not rows:
            return
        try:
            with self._engine.begin() as connection:
                connection.execute(_rankings.insert(), rows)
        except SQLAlchemyError as error:
            raise self._error(error) from error

    def rankings(self, round: int | None = None) -> list[Ranking]:
        """The newest ranking of each prompt by each judge in each round, in the order of their first rows."""
        query = sa.select(_rankings).order_by(_rankings.c.id)
        if round is not None:
            query = query.where(_rankings.c.round == round)
        try:
            with self._engine.connect() as connection:
                rows = connection.execute(query).all()
        except SQLAlchemyError as error:
            raise self._error(error) from error
        newest: dict[tuple[str, int, str], Ranking] = {}
        for row in rows:
            tiers = tuple(tuple(tier) for tier in json.loads(row.tiers))
            newest[row.prompt_id, row.round, row.by] = Ranking(row.prompt_id, tiers, row.by, row.round)
        return list(newest.values())

    def close(self) -> None:
        """Lets go of the file or server."""
        self._engine.dispose()

    def _error(self, error: SQLAlchemyError) -> StoreError:
        reason = getattr(error, "orig", None) or error
        return StoreError(
            f"The rankings in {self._name} cannot be read or written: {reason}.",
            remedy="Restore the database from a copy, or see that it can be reached and written to.",
        )
