"""Rankings that were made elsewhere are put on the desk as if they had been made at it."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from types import SimpleNamespace

import sqlalchemy as sa

from rlhf.desk.exchange import Taken, check_answers
from rlhf.desk.giving import inserted, item_row, order_seed, put
from rlhf.desk.rows import verdict_to_plain
from rlhf.desk.taking import hand_in, was_said
from rlhf.rankings_schema import items, persons, tasks


def take_in(connection: sa.Connection, taken: Sequence[Taken], round: int, seed: int, now: str) -> int:
    """How many rankings are new. What is there already, also of an earlier call or corrected since, stays as it is.

    A group that is new and comes with rankings is not given out: nobody is asked for more. Whoever is not known is put
    among the annotators, with a token that nobody has seen.
    """
    rows = [
        item_row(one.prompt_id, round, one.messages, one.answers) | {"imported": bool(one.verdicts)} for one in taken
    ]
    new = set(put(connection, rows, now))
    num = 0
    for one in taken:
        found = sa.select(items.c.id).where(items.c.prompt_id == one.prompt_id, items.c.round == round)
        item = SimpleNamespace(item_id=connection.scalar(found), prompt_id=one.prompt_id, round=round)
        if one.prompt_id in new:
            check_answers(one)
        for name, verdict, time_ms in one.verdicts:
            person = _person(connection, name)
            mine = tasks.select().where(
                tasks.c.item_id == item.item_id, tasks.c.person_id == person, sa.not_(tasks.c.repeat)
            )
            task = connection.scalar(mine)
            if task is None:
                row = {"item_id": item.item_id, "person_id": person, "repeat": False, "state": "open"}
                row |= {"seed": order_seed(seed, item, name, False), "given": now, "expires": now}
                task = inserted(connection.execute(tasks.insert().values(row)))
            said = verdict_to_plain(verdict)
            if not was_said(connection, task, said):
                num += hand_in(connection, task, "ranked", said, time_ms, now)
    return num


def _person(connection: sa.Connection, name: str) -> int:
    found = connection.scalar(sa.select(persons.c.id).where(persons.c.name == name))
    if found is not None:
        return found
    nobody_has = hashlib.sha256(secrets.token_bytes(32)).hexdigest()
    row = {"name": name, "role": "annotator", "token_hash": nobody_has, "withdrawn": False, "invited": ""}
    return inserted(connection.execute(persons.insert().values(row)))
