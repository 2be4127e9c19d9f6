"""Addresses for the lead: how far it is, how far people agree, any ranking, and setting a person's aside."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query

from cluster.page.routes_of_all import SIGNED_IN, AtDesk, Someone
from cluster.page.shapes import BIGGEST_INT, Group, GroupRow, Problem, SetAside, beginning, shown_group
from rlhf.desk.desk import Desk
from rlhf.desk.records import Agreement, Progress

leads = APIRouter(prefix="/api/lead", tags=["leads"], dependencies=SIGNED_IN)

Round = Annotated[int | None, Query(ge=0, le=BIGGEST_INT, description="None: all rounds")]
NOT_THERE: dict[int | str, dict[str, Any]] = {404: {"model": Problem, "description": "No such group or person"}}


@leads.get("/progress")
def progress(desk: AtDesk, round: Round = None) -> Progress:
    """How far it is, in all and person by person."""
    return desk.progress(round)


@leads.get("/rounds")
def rounds(desk: AtDesk) -> list[int]:
    """The rounds that have groups."""
    return list(desk.rounds())


@leads.get("/agreement")
def agreement(desk: AtDesk, round: Round = None) -> Agreement:
    """How far people agree: with each other, with themselves, with the reward model."""
    return desk.agreement(round)


@leads.get("/groups")
def groups(
    desk: AtDesk,
    round: Round = None,
    offset: Annotated[int, Query(ge=0, le=BIGGEST_INT)] = 0,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
) -> list[GroupRow]:
    """The groups with their state, in the order in which they came."""
    return [
        GroupRow(
            prompt_id=item.prompt_id,
            round=item.round,
            question=beginning(item.messages[-1].content),
            num_rankings=item.num_rankings,
            num_skips=item.num_skips,
            closed=item.closed,
            imported=item.imported,
        )
        for item in desk.items(round, offset, limit)
    ]


@leads.get("/group", responses=NOT_THERE)
def group(
    desk: AtDesk,
    prompt_id: Annotated[str, Query(max_length=64, pattern=r"^[^\x00]*$")],
    round: Annotated[int, Query(ge=0, le=BIGGEST_INT)] = 0,
) -> Group:
    """A group with its answers and all that was said of it, corrections among it."""
    item = desk.item(prompt_id, round)
    return shown_group(item, desk.submissions(prompt_id=prompt_id, round=round, every_row=True), _set_aside(desk))


@leads.post("/withdraw", responses=NOT_THERE)
def withdraw(desk: AtDesk, lead: Someone, whom: SetAside) -> Progress:
    """Sets all that a person said aside: it is kept, and counts no longer."""
    desk.withdraw(whom.name, lead.name, whom.reason)
    return desk.progress()


@leads.post("/reinstate", responses=NOT_THERE)
def reinstate(desk: AtDesk, lead: Someone, whom: SetAside) -> Progress:
    """Takes a withdrawal back."""
    desk.reinstate(whom.name, lead.name, whom.reason)
    return desk.progress()


def _set_aside(desk: Desk) -> frozenset[str]:
    return frozenset(person.name for person in desk.people() if person.withdrawn)
