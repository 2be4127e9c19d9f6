"""The API key of an endpoint: read from a file, and asked for in front of everything that the endpoint does."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Iterable
from pathlib import Path

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from rlhf.errors import ServeError
from rlhf.loopback import is_loopback

SHORTEST = 16  # characters of a key: what is shorter can be guessed
MAKE_ONE = "`(umask 077; head -c 32 /dev/urandom | base64 > key.txt)` makes one; then give --api-key-file key.txt"


class KeyRequired:
    """Lets through what brings the key (`Authorization: Bearer KEY`); answers 401 to all else, whatever the path.

    It knows the key's digest only: what Ray keeps of a deployment holds no secret.
    """

    def __init__(self, app: ASGIApp, *, digest: str) -> None:
        self._app, self._digest = app, digest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self._knows(scope["headers"]):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await JSONResponse(_UNKNOWN, 401, {"WWW-Authenticate": "Bearer"})(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _knows(self, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        given = [value for name, value in headers if name.lower() == b"authorization"]
        if len(given) != 1:
            return False
        scheme, _, key = given[0].partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(_digest(key.strip()), self._digest)


_UNKNOWN = {
    "error": {
        "message": "No API key, or a wrong one. Send the header 'Authorization: Bearer KEY'.",
        "type": "invalid_request_error",
        "param": None,
        "code": "invalid_api_key",
    }
}


def digest_of(key: str) -> str:
    """SHA-256 of a key, in hex."""
    return _digest(key.encode())


def read_key(file: Path | None, host: str, warn: Callable[[str], None]) -> str | None:
    """The key in a file; None where none is given, which is allowed on loopback only.

    Raises ServeError: no key beyond loopback, a file that cannot be read, a key that is short or that no header holds.
    """
    if file is None:
        if is_loopback(host):
            return None
        raise ServeError(
            f"--host {host} can be reached from other machines, and there is no API key.",
            limit="Without a key an endpoint stays on loopback (127.0.0.1, ::1, localhost).",
            remedy=f"{MAKE_ONE}.",
        )
    try:
        key = file.read_text(encoding="utf-8").strip()
        mode = file.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        raise ServeError(f"The API key's file {file} cannot be read: {error}.", remedy=f"{MAKE_ONE}.") from error
    if mode & 0o077:
        warn(f"{file} can be read by others on this machine (mode {mode & 0o777:03o}); chmod 600 {file} ends that")
    if len(key) < SHORTEST or not (key.isascii() and key.isprintable()) or " " in key:
        raise ServeError(
            f"The API key in {file} is of {len(key)} characters, or holds more than one word.",
            limit=f"A key is one word of at least {SHORTEST} ASCII characters.",
            remedy=f"{MAKE_ONE}.",
        )
    return key


def _digest(key: bytes) -> str:
    return hashlib.sha256(key).hexdigest()
