"""Rankings in a database. Append-only: a correction is a new row, and the newest row counts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime

import sqlalchemy as sa

from rlhf.database import Database
from rlhf.rankings_schema import METADATA, MIGRATIONS, SCHEMA_VERSION
from rlhf.rankings_schema import rankings as _rankings
from rlhf.records import Ranking


class RankingsDB:
    """The rankings behind an SQLAlchemy URL: those that training uses."""

    def __init__(self, url: str | sa.URL) -> None:
        """Opens the database and makes its tables where there are none. Raises StoreError, also for a newer schema."""
        self._database = Database(url, METADATA, SCHEMA_VERSION, MIGRATIONS)

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
        with self._database.write() as connection:
            connection.execute(_rankings.insert(), rows)

    def rankings(self, round: int | None = None) -> list[Ranking]:
        """The newest ranking of each prompt by each judge in each round, in the order of their first rows."""
        query = sa.select(_rankings).order_by(_rankings.c.id)
        if round is not None:
            query = query.where(_rankings.c.round == round)
        with self._database.read() as connection:
            rows = connection.execute(query).all()
        newest: dict[tuple[str, int, str], Ranking] = {}
        for row in rows:
            tiers = tuple(tuple(tier) for tier in json.loads(row.tiers))
            newest[row.prompt_id, row.round, row.by] = Ranking(row.prompt_id, tiers, row.by, row.round)
        return list(newest.values())

    def close(self) -> None:
        """Lets go of the file or server."""
        self._database.close()
