"""Addresses for whoever has a token: signing in and out, who one is, the guidelines."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response
from fastapi.security import APIKeyCookie

from cluster.page.door import put_cookie
from cluster.page.guards import unauthorized
from cluster.page.shapes import Guidelines, Me, Token
from rlhf.desk.desk import Desk
from rlhf.desk.records import Person

everybody = APIRouter(prefix="/api", tags=["everybody"])

# For the schema: the cookie is looked at before an address is.
in_cookie = APIKeyCookie(name="tenfold-RUN", description="Set by POST /api/session", auto_error=False)
SIGNED_IN = [Depends(in_cookie)]


def desk_of(request: Request) -> Desk:
    """The desk of the application."""
    return request.app.state.desk


def person_of(request: Request) -> Person:
    """Who is signed in."""
    return request.state.person


AtDesk = Annotated[Desk, Depends(desk_of)]
Someone = Annotated[Person, Depends(person_of)]


@everybody.post("/session", status_code=200)
def sign_in(token: Token, request: Request, response: Response, desk: AtDesk) -> Me:
    """Signs in: the token goes into a cookie."""
    person = desk.sign_in(token.token)
    if person is None:
        return unauthorized()  # pyright: ignore[reportReturnType] - FastAPI passes answers through
    put_cookie(response, request.app.state.cookie, token.token, request.app.state.secure)
    return _me(request, person)


@everybody.delete("/session", status_code=204, dependencies=SIGNED_IN)
def sign_out(request: Request) -> Response:
    """Signs out: the cookie goes."""
    response = Response(status_code=204)
    put_cookie(response, request.app.state.cookie, "", request.app.state.secure)
    return response


@everybody.get("/me", dependencies=SIGNED_IN)
def me(request: Request, person: Someone) -> Me:
    """Who is signed in."""
    return _me(request, person)


@everybody.get("/guidelines", dependencies=SIGNED_IN)
def guidelines(request: Request) -> Guidelines:
    """How to rank."""
    return Guidelines(html=request.app.state.guidelines)


def _me(request: Request, person: Person) -> Me:
    state = request.app.state
    return Me(name=person.name, role=person.role, run=state.run, language=state.language, withdrawn=person.withdrawn)
