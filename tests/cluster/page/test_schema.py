"""What the API's own schema allows, and some that it does not: no 500, and no answer that the schema does not name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from rlhf.desk.desk import Desk
from rlhf.desk.records import PersonRole
from tests.cluster.page.conftest import SignIn
from tests.rlhf.desk.groups import person, rank_all

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
KEEPS_OUT = {("DELETE", "/api/session")}  # who is signed out sees nothing any more: test_who_may.py has it


@pytest.mark.timeout(600)
@pytest.mark.parametrize("role", ["annotator", "lead"])
def test_no_request_that_the_schema_allows_or_not_meets_a_mistake_of_ours(
    desk: Desk, app: FastAPI, sign_in: SignIn, role: PersonRole
) -> None:
    rank_all(desk, person(desk, "one"))
    client = sign_in(desk.invite("me", role))
    if role == "annotator":
        assert client.post("/api/tasks/next").json()["task"]  # so that there is one to be asked about
    headers = {"cookie": "; ".join(f"{name}={value}" for name, value in client.cookies.items())}
    schema = schemathesis.openapi.from_asgi("/api/openapi.json", app, headers=headers)
    other = {"annotator": "/api/lead", "lead": "/api/tasks"}[role]
    num = 0
    for found in schema.get_all_operations():
        operation = found.ok()  # pyright: ignore[reportAttributeAccessIssue] - the schema is our own
        if operation.path.startswith(other) or (operation.method.upper(), operation.path) in KEEPS_OUT:
            continue
        ask(operation, headers)
        num += 1
    assert num >= 9


def ask(operation: schemathesis.APIOperation, headers: dict[str, str]) -> None:
    """Makes requests that fit and some that do not, and checks the answers."""

    def check(case: schemathesis.Case) -> None:
        case.call_and_validate(headers=headers, checks=CHECKS)

    for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):
        run: Callable[[], None] = settings(
            max_examples=20,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
        )(given(case=operation.as_strategy(generation_mode=mode))(check))
        run()
