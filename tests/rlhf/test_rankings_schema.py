"""Databases of earlier versions are brought to this one, and those of later ones are refused."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from rlhf.desk.desk import Desk
from rlhf.errors import StoreError
from rlhf.rankings_db import RankingsDB
from rlhf.records import Ranking
from tests.rlhf.desk.groups import groups, person, rank_all

VERSION_1 = """
CREATE TABLE schema_version (version INTEGER NOT NULL);
CREATE TABLE rankings (
    id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, prompt_id VARCHAR(64) NOT NULL, round INTEGER NOT NULL,
    "by" VARCHAR(200) NOT NULL, tiers TEXT NOT NULL, created VARCHAR(40) NOT NULL
);
CREATE INDEX ix_rankings_prompt_id ON rankings (prompt_id);
CREATE INDEX ix_rankings_round ON rankings (round);
INSERT INTO schema_version VALUES (1);
INSERT INTO rankings (prompt_id, round, "by", tiers, created) VALUES ('p1', 0, 'rules', '[[1], [0]]', '2026-01-01');
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A database of version 1, with a ranking."""
    path = tmp_path / "rankings.db"
    database = sqlite3.connect(path)
    database.executescript(VERSION_1)
    database.close()
    return path


def test_a_database_of_version_1_keeps_its_rankings_and_gets_a_desk(path: Path):
    desk = Desk(f"sqlite:///{path}")
    desk.add_groups(groups(2))
    assert len(rank_all(desk, person(desk, "ann"))) == 2
    desk.close()
    rankings = RankingsDB(f"sqlite:///{path}")
    assert rankings.rankings() == [Ranking("p1", ((1,), (0,)), "rules")]
    rankings.close()
    database = sqlite3.connect(path)
    assert database.execute("select version from schema_version order by version").fetchall() == [(1,), (2,), (3,)]
    database.close()


def test_a_desk_of_version_2_is_brought_to_this_one_with_all_that_was_said(tmp_path: Path):
    path = tmp_path / "rankings.db"
    desk = Desk(f"sqlite:///{path}")
    desk.add_groups(groups(2))
    rank_all(desk, person(desk, "ann"))
    desk.close()
    database = sqlite3.connect(path)  # as version 2 left it
    database.executescript("ALTER TABLE items DROP COLUMN imported; UPDATE schema_version SET version = 2;")
    database.close()
    desk = Desk(f"sqlite:///{path}")
    assert [one.people for one in desk.consensus(0)] == [("ann",), ("ann",)]
    assert [item.imported for item in desk.items()] == [False, False]
    desk.close()


def test_an_older_run_needs_no_desk_to_go_on(path: Path):
    rankings = RankingsDB(f"sqlite:///{path}")
    rankings.add([Ranking("p2", ((0,), (1,)), "rules")])
    assert [one.prompt_id for one in rankings.rankings()] == ["p1", "p2"]
    rankings.close()


@pytest.mark.parametrize("version", [0, 4])
def test_a_version_that_is_not_known_is_refused(path: Path, version: int):
    database = sqlite3.connect(path)
    database.execute("update schema_version set version = ?", (version,))
    database.commit()
    database.close()
    with pytest.raises(StoreError, match=rf"schema version {version}.*versions 1 up to 3"):
        Desk(f"sqlite:///{path}")
