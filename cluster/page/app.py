"""The application: addresses for those who rank and for the lead, over a desk."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from cluster.page.door import STATIC, cookie_name, make_door
from cluster.page.guards import AsciiJSON, SafeHeaders, SignedIn, SmallRequests, add_headers
from cluster.page.inert import rendered
from cluster.page.routes_of_all import everybody
from cluster.page.routes_of_annotators import annotators
from cluster.page.routes_of_leads import leads
from cluster.page.shapes import Problem
from rlhf.desk.desk import Desk
from rlhf.desk.errors import BadVerdict, NotAllowed, NotThere
from rlhf.errors import StoreError, TenfoldError

log = logging.getLogger(__name__)
STATUS: tuple[tuple[type[TenfoldError], int], ...] = (
    (NotThere, 404),
    (BadVerdict, 422),
    (NotAllowed, 403),
    (StoreError, 503),
)
WHY: Mapping[int | str, dict[str, Any]] = {
    400: {"model": Problem, "description": "The request is not to be read"},
    401: {"model": Problem, "description": "No token, or one that is not valid"},
    403: {"model": Problem, "description": "Another role's address, or asked for by another page"},
    413: {"model": Problem, "description": "The request is too large"},
    422: {"model": Problem, "description": "The request does not fit"},
    503: {"model": Problem, "description": "The database cannot be reached"},
}


def make_app(
    desk: Desk, *, run: str, guidelines: str = "", language: str | None = None, secure: bool = False
) -> FastAPI:
    """The application of one run.

    Args:
        desk: stays the caller's to close.
        run: its name, which is shown.
        guidelines: Markdown.
        language: that the page starts with; None: the browser's.
        secure: whether browsers reach it by TLS, so that its cookie goes no other way.
    """
    app = FastAPI(
        title="Tenfold: people rank",
        version="1",
        summary="Groups of answers are given out, sorted, ordered and handed in.",
        docs_url=None,
        redoc_url=None,
        openapi_url="/api/openapi.json",
        default_response_class=AsciiJSON,
        responses=dict(WHY),
    )
    app.state.desk, app.state.run, app.state.language, app.state.secure = desk, run, language, secure
    app.state.guidelines = rendered(guidelines)
    app.state.cookie = cookie_name(run, secure)
    app.include_router(everybody)
    app.include_router(annotators)
    app.include_router(leads)
    app.add_api_route("/", _page, include_in_schema=False)
    app.mount("/static", StaticFiles(directory=STATIC))
    # The last one added is the first to be asked.
    app.add_middleware(SignedIn, who=desk.sign_in, cookie=app.state.cookie, door=make_door(language))
    app.add_middleware(SmallRequests)
    app.add_middleware(SafeHeaders)
    app.add_exception_handler(RequestValidationError, _does_not_fit)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(TenfoldError, _told)
    app.add_exception_handler(Exception, _ours)
    return app


def _page(request: Request) -> Response:
    """The page of the role."""
    return FileResponse(STATIC / ("lead.html" if request.state.person.role == "lead" else "rank.html"))


def _does_not_fit(request: Request, error: Exception) -> Response:
    """Names the places that do not fit. What stands there is not sent back: it may be anything."""
    assert isinstance(error, RequestValidationError)
    found = [f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()[:5]]
    return AsciiJSON({"detail": "; ".join(found)}, 422)


def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return AsciiJSON({"detail": error.detail}, error.status_code, dict(error.headers or {}))


def _told(request: Request, error: Exception) -> Response:
    status = next((status for kind, status in STATUS if isinstance(error, kind)), 409)
    if status == 503:
        log.error("%s", error)
        return AsciiJSON({"detail": "The rankings cannot be read or written now; what you did is kept here."}, 503)
    return AsciiJSON({"detail": str(error)}, status)


def _ours(request: Request, error: Exception) -> Response:
    """A mistake of ours: the log has the traceback, the client a line."""
    answer = AsciiJSON({"detail": "This is a mistake of the server's; its log says more."}, 500)
    add_headers(answer.headers, request.url.path)
    return answer
