"""The section `desk`: how people's rankings are gathered. No key of it changes what was already said."""

from __future__ import annotations

import re
from typing import Annotated, Self

from pydantic import Field, model_validator

from configs.section import Positive, Section

MOST_RANKED = 26  # answers that people rank at once: each has a letter


class DeskConfig(Section):
    """Who ranks how often, and what becomes of it (`rank.judge: people`)."""

    quota: Positive = 1  # people per group
    lease_minutes: Positive = 30  # for which a task is kept for who has it open; each save begins it again
    repeats: Annotated[float, Field(ge=0, le=0.5)] = 0.05  # of a person's rankings, given again without being told
    max_skips: Positive = 3  # people who may skip a group before it is given out no more
    min_agreement: Annotated[float, Field(ge=-1, le=1)] = 0.0  # mean Kendall's tau-b of a group's pairs of people
    guidelines: str | None = None  # a Markdown file
    database: str | None = None  # None: rankings.db in the run folder; else PostgreSQL's URL, without a password

    @model_validator(mode="after")
    def _is_usable(self) -> Self:
        if self.database is None:
            return self
        # None of these says what stands there: it may be a password.
        if not re.match(r"postgresql(\+pg8000)?://", self.database):
            raise ValueError(
                "database is no URL of PostgreSQL; write postgresql://USER@HOST:PORT/DATABASE, or leave it out for "
                "SQLite in the run folder"
            )
        if re.search(r"://[^/@]*:[^/]*@|[?&]password=", self.database):
            raise ValueError(
                "database holds a password, and a recipe is kept in the run folder; give it in the environment "
                "(PGPASSWORD) and leave it out of the URL"
            )
        return self
