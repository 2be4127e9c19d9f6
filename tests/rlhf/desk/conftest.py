"""Desks on both databases, with a clock that a test sets."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from configs.desk import DeskConfig
from rlhf.database import complete
from rlhf.desk.desk import Desk
from tests import postgresql

MakeDesk = Callable[..., Desk]


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = datetime(2026, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def pass_minutes(self, minutes: float) -> None:
        self.now += timedelta(minutes=minutes)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[str]:
    with postgresql.server() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty database."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/rankings.db"
        return
    home = complete(request.getfixturevalue("postgresql_server"))
    name = f"desk_{secrets.token_hex(6)}"
    engine = sa.create_engine(home, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    yield home.set(database=name).render_as_string()
    with engine.connect() as connection:
        connection.execute(sa.text(f"DROP DATABASE {name} WITH (FORCE)"))
    engine.dispose()


@pytest.fixture
def make_desk(url: str, clock: Clock) -> Iterator[MakeDesk]:
    """A desk on the test's database; each call opens one more on it."""
    opened: list[Desk] = []

    def make(run: str = "", seed: int = 0, real_time: bool = False, **config: Any) -> Desk:
        quiet: dict[str, Any] = {"repeats": 0.0} | config
        times: dict[str, Any] = {} if real_time else {"clock": clock}
        desk = Desk(url, DeskConfig(**quiet), seed=seed, run=run, **times)
        opened.append(desk)
        return desk

    yield make
    for desk in opened:
        desk.close()
