"""A server of the page, and people who come to it in Chromium."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser

from configs.desk import DeskConfig
from rlhf.desk.desk import Desk
from rlhf.records import AnswerGroup
from tests.cluster.page.browser.browsing import Come, Server, Visit, chromium, ten_answers


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as opened:
        yield opened


@pytest.fixture
def groups() -> list[AnswerGroup]:
    """What is on the desk; a module may have its own."""
    return [ten_answers(f"p{i}") for i in range(3)]


@pytest.fixture
def desk(tmp_path: Path, groups: list[AnswerGroup]) -> Iterator[Desk]:
    """The test's own view of the desk that the server has."""
    with Desk(f"sqlite:///{tmp_path}/rankings.db", DeskConfig(quota=2, repeats=0), seed=1) as opened:
        opened.add_groups(groups)
        yield opened


@pytest.fixture
def server(desk: Desk, tmp_path: Path) -> Iterator[Server]:
    started = Server(f"sqlite:///{tmp_path}/rankings.db")
    yield started
    started.kill()


@pytest.fixture
def come(browser: Browser, server: Server, desk: Desk) -> Iterator[Come]:
    """Somebody new opens the link of their invitation."""
    visits: list[Visit] = []

    def visit(name: str = "ann", role: Any = "annotator", **context: Any) -> Visit:
        visits.append(Visit(browser, server.url, desk.invite(name, role), **context))
        visits[-1].page.wait_for_selector(".card" if role == "annotator" else "#people td")
        return visits[-1]

    yield visit
    for one in visits:
        one.context.close()
