"""A desk with groups and people, the page's application over it, and clients that are signed in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from cluster.page.app import make_app
from configs.desk import DeskConfig
from rlhf.desk.desk import Desk
from tests.rlhf.desk.groups import groups

SignIn = Callable[[str], TestClient]


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    """Four prompts with three answers each, two people wanted for each."""
    with Desk(f"sqlite:///{tmp_path}/rankings.db", DeskConfig(quota=2, repeats=0), seed=1) as opened:
        opened.add_groups(groups(4))
        yield opened


@pytest.fixture
def app(desk: Desk) -> FastAPI:
    return make_app(desk, run="demo", guidelines="# Be just\n\n<b>no HTML</b>")


@pytest.fixture
def sign_in(app: FastAPI) -> SignIn:
    """A client that has given the token for a cookie."""

    def signed_in(token: str) -> TestClient:
        client = TestClient(app, raise_server_exceptions=False)
        assert client.post("/api/session", json={"token": token}).status_code == 200
        return client

    return signed_in


@pytest.fixture
def annotator(desk: Desk, sign_in: SignIn) -> TestClient:
    return sign_in(desk.invite("ann"))


@pytest.fixture
def lead(desk: Desk, sign_in: SignIn) -> TestClient:
    return sign_in(desk.invite("lea", "lead"))
