"""The key in front of an endpoint: who gets in, and what a key may be."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from cluster.api_key import KeyRequired, digest_of, read_key
from rlhf.errors import ServeError

KEY = "0123456789abcdef"


def through(headers: list[tuple[bytes, bytes]], kind: str = "http") -> tuple[bool, list[dict[str, Any]]]:
    """(whether the application behind the key was called, what was sent in its place)."""
    called: list[str] = []
    sent: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        called.append(scope["type"])

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": kind, "path": "/anything", "headers": headers}
    asyncio.run(KeyRequired(app, digest=digest_of(KEY))(scope, None, send))  # type: ignore[arg-type]
    return bool(called), sent


@pytest.mark.parametrize(
    "value", [f"Bearer {KEY}", f"bearer {KEY}", f"BEARER  {KEY} "], ids=["as usual", "small", "spaces"]
)
def test_the_key_lets_in(value: str) -> None:
    assert through([(b"host", b"x"), (b"authorization", value.encode())]) == (True, [])


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"authorization", b"")],
        [(b"authorization", KEY.encode())],
        [(b"authorization", f"Basic {KEY}".encode())],
        [(b"authorization", f"Bearer {KEY}x".encode())],
        [(b"authorization", f"Bearer {KEY[:-1]}".encode())],
        [(b"authorization", b"Bearer \xff\xfe")],
        [(b"authorization", f"Bearer {digest_of(KEY)}".encode())],
        [(b"authorization", b"Bearer wrong"), (b"authorization", f"Bearer {KEY}".encode())],
        [(b"api-key", KEY.encode())],
    ],
)
def test_without_the_key_every_path_is_401(headers: list[tuple[bytes, bytes]]) -> None:
    called, sent = through(headers)
    assert not called
    assert sent[0]["status"] == 401
    assert (b"www-authenticate", b"Bearer") in sent[0]["headers"]
    assert b"invalid_api_key" in sent[1]["body"]


def test_a_web_socket_without_the_key_is_closed_and_the_start_of_the_application_is_none_of_its_business() -> None:
    assert through([], "websocket") == (False, [{"type": "websocket.close", "code": 1008}])
    assert through([], "lifespan")[0]


def test_a_key_is_read_from_its_file_and_an_open_file_is_told(tmp_path: Path) -> None:
    file, warned = tmp_path / "key", list[str]()
    file.write_text(f"{KEY}\n")
    file.chmod(0o600)
    assert read_key(file, "0.0.0.0", warned.append) == KEY
    assert read_key(file, "127.0.0.1", warned.append) == KEY
    assert warned == []
    file.chmod(0o644)
    assert read_key(file, "0.0.0.0", warned.append) == KEY
    assert "mode 644" in warned[0] and KEY not in warned[0]


def test_beyond_loopback_there_is_no_endpoint_without_a_key(tmp_path: Path) -> None:
    assert read_key(None, "127.0.0.1", print) is None
    with pytest.raises(ServeError, match=r"--host 0\.0\.0\.0 .*no API key.*--api-key-file"):
        read_key(None, "0.0.0.0", print)


@pytest.mark.parametrize("content", ["", "\n", "short", "two words of a key 123", "schlüssel-schlüssel", "a\x00" * 20])
def test_what_is_no_key_is_refused_and_not_printed(tmp_path: Path, content: str) -> None:
    file = tmp_path / "key"
    file.write_text(content)
    os.chmod(file, 0o600)
    with pytest.raises(ServeError, match="at least 16 ASCII characters") as error:
        read_key(file, "127.0.0.1", print)
    assert len(content) < 3 or content.strip() not in str(error.value)


def test_a_file_that_is_not_there_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ServeError, match=r"cannot be read.*urandom"):
        read_key(tmp_path / "none", "0.0.0.0", print)
