"""What stands before every address: headers of safety, a limit on what comes in, and who may come."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import urlsplit

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rlhf.desk.records import Person
from rlhf.errors import StoreError

SIGN_IN = "/api/session"
MOST_BYTES = 1_000_000  # of a request; a draft has at most 200,000 characters, of up to four bytes
KNOWN_S = 2.0
AREAS = {"/api/tasks": "annotator", "/api/lead": "lead"}  # others are for both roles

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types answers"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=(), browsing-topics=()",
}


class AsciiJSON(JSONResponse):
    """JSON in ASCII: a draft may hold half of a surrogate pair, which no encoding of text can carry."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


class SafeHeaders:
    """Tells browsers to run and load nothing but the page's own files, and to keep no answer of the API."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                add_headers(MutableHeaders(scope=message), scope.get("path", ""))
            await send(message)

        await self._app(scope, receive, send_safely if scope["type"] == "http" else send)


def add_headers(headers: MutableHeaders, path: str) -> None:
    """Puts the headers of safety among those of an answer, where it has none of its own."""
    for name, value in HEADERS.items():
        headers.setdefault(name, value)
    headers.setdefault("Cache-Control", "no-cache" if path.startswith("/static/") else "no-store")


class SmallRequests:
    """Refuses a request that is too large, whether it says so or only turns out to be."""

    def __init__(self, app: ASGIApp, most_bytes: int = MOST_BYTES) -> None:
        self._app, self._most_bytes = app, most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        said = Headers(scope=scope).get("content-length", "0")
        if not said.isdigit() or int(said) > self._most_bytes:
            return await self._refuse(scope, receive, send)
        # It is read before anything is answered, so that no application sees half a request.
        parts: list[bytes] = []
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return None
            parts.append(message.get("body", b""))
            size, more = size + len(parts[-1]), message.get("more_body", False)
            if size > self._most_bytes:
                return await self._refuse(scope, receive, send)
        whole: Message | None = {"type": "http.request", "body": b"".join(parts), "more_body": False}

        async def receive_whole() -> Message:
            nonlocal whole
            first, whole = whole, None
            return first or await receive()

        await self._app(scope, receive_whole, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        problem = AsciiJSON({"detail": f"A request has at most {self._most_bytes} bytes."}, 413)
        await problem(scope, receive, send)


class SignedIn:
    """Lets nobody in without a token, and nobody where their role has nothing to do.

    Args:
        app: the application.
        who: whose token it is; None if nobody's.
        cookie: the name of the cookie that holds it.
        door: what is shown at "/" in the place of the page, for signing in.
    """

    def __init__(
        self, app: ASGIApp, who: Callable[[str], Person | None], cookie: str, door: Callable[[], Response]
    ) -> None:
        self._app, self._who, self._cookie, self._door = app, who, cookie, door
        self._known: dict[str, tuple[float, Person]] = {}  # of valid tokens: until when they are not looked up again

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":  # there are no web sockets here
            return None
        problem = from_elsewhere(scope) or await self._turned_away(scope)
        await (problem or self._app)(scope, receive, send)

    async def _turned_away(self, scope: Scope) -> Response | None:
        if scope["path"] == SIGN_IN and scope["method"] == "POST":
            return None
        token = token_in(Headers(scope=scope).get("cookie", ""), self._cookie)
        try:
            person = await self._person(token, scope["path"]) if token else None
        except StoreError as error:
            return AsciiJSON({"detail": str(error)}, 503)
        if person is None:
            return self._door() if scope["path"] == "/" else unauthorized()
        area = area_of(scope["path"])
        if area is not None and person.role != AREAS[area]:
            return AsciiJSON({"detail": f"This is for the role {AREAS[area]}; {person.name} is {person.role}."}, 403)
        scope.setdefault("state", {})["person"] = person
        return None

    async def _person(self, token: str, path: str) -> Person | None:
        """Whose token it is. Where drafts come every second, it is looked up every other second only."""
        until, person = self._known.get(token, (0.0, None))
        if person is not None and time.monotonic() < until and area_of(path):
            return person
        person = await run_in_threadpool(self._who, token)
        if person is None:
            self._known.pop(token, None)
        else:
            self._known[token] = (time.monotonic() + KNOWN_S, person)
        return person


def area_of(path: str) -> str | None:
    """The part of the application that one role has for itself, and that the path is in."""
    return next((area for area in AREAS if (path + "/").startswith(area + "/")), None)


def unauthorized() -> Response:
    """The answer to who has no token, or one that is not valid (any more)."""
    text = "Nobody is signed in here. Open the link of an invitation."
    return AsciiJSON({"detail": text}, 401, {"WWW-Authenticate": 'Token realm="tenfold"'})


def from_elsewhere(scope: Scope) -> Response | None:
    """The refusal, if a page of another origin asks for a change."""
    if scope["method"] in ("GET", "HEAD", "OPTIONS"):
        return None
    headers = Headers(scope=scope)
    origin, site = headers.get("origin"), headers.get("sec-fetch-site")
    if (origin is None or _host(origin) == headers.get("host")) and site in (None, "same-origin", "none"):
        return None
    return AsciiJSON({"detail": "Another page may not ask for this."}, 403)


def token_in(cookies: str, name: str) -> str:
    """The value of the cookie of that name; empty if there is none."""
    for part in cookies.split(";"):
        try:
            found = SimpleCookie(part.strip()).get(name)
        except CookieError:
            continue
        if found is not None:
            return found.value
    return ""


def _host(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None
