"""Who may sit down at the desk: people with tokens and roles."""

from __future__ import annotations

import hashlib
import json
import secrets
import unicodedata
from collections.abc import Callable

import sqlalchemy as sa

from rlhf.database import Database
from rlhf.desk.errors import DeskError, NotThere
from rlhf.desk.records import Person, PersonRole
from rlhf.rankings_schema import persons, withdrawals

LONGEST_NAME = 100


class People:
    """The people of a desk. What the methods do is said at those of `Desk`."""

    def __init__(self, database: Database, now: Callable[[], str]) -> None:
        self._database, self._now = database, now

    def invite(self, name: str, role: PersonRole) -> str:
        check_name(name)
        token = secrets.token_urlsafe(24)
        with self._database.write() as connection:
            row = {"role": role, "token_hash": _hash(token), "invited": self._now()}
            known = connection.execute(sa.select(persons).where(persons.c.name == name)).one_or_none()
            if known is None:
                connection.execute(persons.insert().values(row | {"name": name, "withdrawn": False}))
            elif not known.invited:  # whose rankings were taken in from elsewhere
                connection.execute(persons.update().where(persons.c.id == known.id).values(row))
            else:
                raise DeskError(
                    f"{name!r} was invited before.",
                    remedy="Choose another name, or --renew the link of a person who lost theirs.",
                )
        return token

    def renew_token(self, name: str) -> str:
        token = secrets.token_urlsafe(24)
        with self._database.write() as connection:
            found = named(connection, name)
            values = {"token_hash": _hash(token), "invited": found.invited or self._now()}
            connection.execute(persons.update().where(persons.c.id == found.id).values(values))
        return token

    def sign_in(self, token: str) -> Person | None:
        with self._database.read() as connection:
            row = connection.execute(sa.select(persons).where(persons.c.token_hash == _hash(token))).one_or_none()
        return None if row is None else person_of(row)

    def people(self) -> list[Person]:
        with self._database.read() as connection:
            return [person_of(row) for row in connection.execute(sa.select(persons).order_by(persons.c.id))]

    def set_aside(self, name: str, withdrawn: bool, by: str, reason: str) -> None:
        """Withdraws a person or takes it back; either is a row of its own, so that it is known who did it and why."""
        with self._database.write() as connection:
            found = named(connection, name)
            connection.execute(persons.update().where(persons.c.id == found.id).values(withdrawn=withdrawn))
            about = json.dumps({"by": by, "reason": reason})
            row = {"person_id": found.id, "withdrawn": withdrawn, "about": about, "created": self._now()}
            connection.execute(withdrawals.insert().values(row))


def named(connection: sa.Connection, name: str) -> Person:
    """The person of that name. Raises NotThere."""
    row = connection.execute(sa.select(persons).where(persons.c.name == name)).one_or_none()
    if row is None:
        known = list(connection.scalars(sa.select(persons.c.name).order_by(persons.c.id)))
        there = f"There are {', '.join(known)}." if known else "Nobody was invited yet."
        raise NotThere(f"There is no {name!r} at this desk.", remedy=there)
    return person_of(row)


def person_of(row: sa.Row[tuple[object, ...]]) -> Person:
    """The person whom a row of `persons` describes."""
    return Person(row.id, row.name, row.role, row.invited, row.withdrawn)


def check_name(name: str) -> None:
    """Nothing, if somebody can be called so. Raises DeskError."""
    if not name.strip() or name != name.strip() or len(name) > LONGEST_NAME:
        raise DeskError(
            f"{name[:LONGEST_NAME]!r} cannot be a person's name.",
            limit=f"It has 1 to {LONGEST_NAME} characters, no space at its ends among them.",
        )
    if any(unicodedata.category(character)[0] == "C" for character in name):
        raise DeskError(f"{name!r} cannot be a person's name.", limit="It has no control characters.")


def _hash(token: str) -> str:
    # A plain hash does: a token is 192 random bits, and cannot be guessed as a password can.
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()
