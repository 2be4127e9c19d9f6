"""Who may come where: every address of the application, for nobody, annotators and leads."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.routing import Mount, Route
from starlette.testclient import TestClient

from cluster.page import guards
from cluster.page.app import make_app
from cluster.page.door import STATIC
from cluster.page.guards import MOST_BYTES
from rlhf.desk.desk import Desk
from tests.cluster.page.conftest import SignIn

FOR_ALL = {"/", "/api/me", "/api/guidelines", "/api/session", "/api/openapi.json"}


def addresses(app: FastAPI) -> Iterator[tuple[str, str]]:
    """(method, path) of each route there is, and of each file."""
    schema = app.openapi()
    for path, methods in schema["paths"].items():
        for method in methods:
            yield method.upper(), path.replace("{task_id}", "1")
    yield from (("GET", "/"), ("GET", "/api/openapi.json"))
    yield from (("GET", f"/static/{file.name}") for file in STATIC.iterdir())
    yield from (
        ("GET", path) for path in ("/nowhere", "/api", "/docs", "/redoc", "/static/", "/api/lead", "/api/tasks")
    )


def test_the_schema_names_every_address(app: FastAPI) -> None:
    named = {path for _, path in addresses(app)}
    for route in app.routes:
        if isinstance(route, APIRoute):
            assert route.path.replace("{task_id}", "1") in named
        else:
            assert isinstance(route, Mount | Route) and route.path in ("/static", "/api/openapi.json")
    assert len([path for path in named if path.startswith("/api/")]) >= 16


def test_without_a_token_every_address_answers_401(app: FastAPI) -> None:
    client = TestClient(app)
    for method, path in addresses(app):
        if (method, path) != ("POST", "/api/session"):
            assert client.request(method, path).status_code == 401, (method, path)
    for method in ("HEAD", "OPTIONS", "PATCH", "TRACE", "PUT"):
        assert client.request(method, "/api/me").status_code == 401


@pytest.mark.parametrize("token", ["", "x", "a" * 200, "ä", "'; DROP TABLE persons; --", "\x00"])
def test_a_token_of_nobody_is_no_token(app: FastAPI, token: str) -> None:
    client = TestClient(app)
    assert client.post("/api/session", json={"token": token}).status_code in (401, 422)
    cookie = f"{app.state.cookie}={token}".encode()
    assert client.get("/api/me", headers={b"cookie": cookie}).status_code == 401


def test_an_address_of_the_other_role_answers_403(app: FastAPI, annotator: TestClient, lead: TestClient) -> None:
    for method, path in addresses(app):
        for client, area in ((annotator, "/api/lead"), (lead, "/api/tasks")):
            if path.startswith(area):
                assert client.request(method, path).status_code == 403, (method, path)
                assert client.request(method, path, content=b"{").status_code == 403


def test_what_is_for_both_is_there_for_both(annotator: TestClient, lead: TestClient) -> None:
    for client in (annotator, lead):
        for path in FOR_ALL - {"/api/session"}:
            assert client.get(path).status_code == 200
        assert client.get("/static/base.css").status_code == 200
    assert "rank.js" in annotator.get("/").text and "lead.js" in lead.get("/").text


def test_a_token_that_was_renewed_is_no_longer_valid(desk: Desk, annotator: TestClient, sign_in: SignIn) -> None:
    assert annotator.get("/api/me").json()["name"] == "ann"
    token = desk.renew_token("ann")
    assert annotator.get("/api/me").status_code == 401
    assert sign_in(token).get("/api/me").json()["name"] == "ann"


def test_a_token_that_was_renewed_is_valid_nowhere_after_two_seconds(
    desk: Desk, annotator: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert annotator.post("/api/tasks/next").status_code == 200
    desk.renew_token("ann")
    monkeypatch.setattr(guards, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + guards.KNOWN_S + 0.1))
    assert annotator.post("/api/tasks/next").status_code == 401


def test_who_signs_out_is_out(annotator: TestClient) -> None:
    assert annotator.delete("/api/session").status_code == 204
    assert annotator.get("/api/me").status_code == 401


def test_the_cookie_is_hidden_from_scripts_and_other_pages(desk: Desk) -> None:
    for secure, prefix in ((False, "tenfold-"), (True, "__Host-tenfold-")):
        app = make_app(desk, run="demo", secure=secure)
        token = desk.invite(f"ann {secure}")
        cookie = TestClient(app).post("/api/session", json={"token": token}).headers["set-cookie"]
        assert cookie.startswith(prefix) and "HttpOnly" in cookie and "SameSite=strict" in cookie and "Path=/" in cookie
        assert ("; Secure" in cookie) is secure


def test_two_runs_on_one_machine_have_two_cookies(desk: Desk) -> None:
    names = {make_app(desk, run=run).state.cookie for run in ("one", "two")}
    assert len(names) == 2


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://testserver:81"},
        {"origin": "http://["},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
def test_another_page_may_not_ask_for_a_change(annotator: TestClient, headers: dict[str, str]) -> None:
    assert annotator.post("/api/tasks/next", headers=headers).status_code == 403
    assert annotator.get("/api/me", headers=headers).status_code == 200


def test_the_page_itself_may_ask(annotator: TestClient) -> None:
    headers = {"origin": "http://testserver", "sec-fetch-site": "same-origin"}
    assert annotator.post("/api/tasks/next", headers=headers).status_code == 200


def test_a_form_of_another_page_cannot_be_taken_for_json(annotator: TestClient) -> None:
    task = annotator.post("/api/tasks/next").json()["task"]["id"]
    body = b'{"reason": "x", "time_ms": 1}'
    answer = annotator.post(f"/api/tasks/{task}/skip", content=body, headers={"content-type": "text/plain"})
    assert answer.status_code == 422


def test_every_answer_has_the_headers_of_safety(app: FastAPI, annotator: TestClient) -> None:
    for client in (annotator, TestClient(app)):
        for path in ("/", "/static/rank.js", "/api/me", "/nowhere"):
            headers = client.get(path).headers
            policy = headers["content-security-policy"]
            assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
            assert "unsafe" not in policy and "http" not in policy and "*" not in policy
            assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
            assert headers["cache-control"] in ("no-store", "no-cache")


def test_a_request_that_is_too_large_is_refused(annotator: TestClient) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(MOST_BYTES // 1000 + 2):
            yield b"x" * 1000

    assert annotator.put("/api/tasks/1/draft", content=b"x" * (MOST_BYTES + 1)).status_code == 413
    assert annotator.put("/api/tasks/1/draft", content=pieces()).status_code == 413


def test_a_mistake_of_ours_shows_no_traceback(
    desk: Desk, annotator: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(desk, "next_task", fail)
    answer = annotator.post("/api/tasks/next")
    assert answer.status_code == 500
    assert "secret" not in answer.text and "Traceback" not in answer.text
    assert answer.headers["x-content-type-options"] == "nosniff"
