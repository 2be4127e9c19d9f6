"""Signing in: the page without a token, and the cookie that holds one."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from pathlib import Path

from starlette.responses import HTMLResponse, Response

STATIC = Path(__file__).parent / "static"
KEPT_S = 30 * 24 * 3600  # a cookie, unless it is signed out; whose token is renewed or unknown stays outside anyway


def cookie_name(run: str, secure: bool) -> str:
    """One for each run: browsers do not tell the ports of a machine apart. The prefix ties it to this host and TLS."""
    of_run = hashlib.sha256(run.encode()).hexdigest()[:8]
    return f"{'__Host-' if secure else ''}tenfold-{of_run}"


def put_cookie(response: Response, name: str, token: str, secure: bool) -> None:
    """Keeps the token in the browser, where no script reads it and no other page makes use of it."""
    response.set_cookie(
        name, token, max_age=KEPT_S if token else 0, path="/", httponly=True, samesite="strict", secure=secure
    )


def make_door(language: str | None) -> Callable[[], Response]:
    """What gives the page for signing in: one file, since no other may be had without a token.

    Its script and its styles are in it, and its policy names them by their hashes.
    """
    script, style = (STATIC / "signin.js").read_text("utf-8"), (STATIC / "signin.css").read_text("utf-8")
    page = (STATIC / "signin.html").read_text("utf-8")
    page = page.replace("{{style}}", style).replace("{{script}}", script).replace("{{language}}", language or "")
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
        "trusted-types 'none'"
    )
    headers = {"Content-Security-Policy": policy, "WWW-Authenticate": 'Token realm="tenfold"'}
    return lambda: HTMLResponse(page, 401, headers)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
