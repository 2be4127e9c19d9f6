"""Where scores come from: the run's reward model, its rules, or a server elsewhere."""

from __future__ import annotations

import re
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

from configs.section import Positive, Section


def is_address(name: str) -> bool:
    """Whether a source of scores is a server's address, such as `http://scores.example:8000/score`."""
    return name.startswith(("http://", "https://"))


def _known(name: str) -> str:
    if name in ("reward", "rules"):
        return name
    if not is_address(name) or re.search(r"\s", name):
        raise ValueError(f"{name!r} should be 'reward', 'rules' or the address of a server (http://... or https://...)")
    parts = urlsplit(name)
    if "@" in parts.netloc:
        raise ValueError(
            "the address holds a user or password, and a recipe is kept in the run folder; leave it out, and name the "
            "environment variable of a token in score_server.token_env"
        )
    if not parts.hostname:
        raise ValueError(f"{name!r} names no host")
    return name


# `reward`: the model that the stage `reward` trains. `rules`: those of the recipe. Else an address: docs/serve.md.
ScoreSource = Annotated[str, AfterValidator(_known)]


class ScoreServerConfig(Section):
    """How servers are asked whose address stands in the place of a score. None of it changes a score."""

    prompts_per_request: Positive = 8  # each with all of its answers
    timeout_s: Annotated[float, Field(gt=0)] = 60.0  # for the whole answer to a request
    tries: Positive = 5  # of a request that gets no answer, or one that says "later"
    token_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = None  # its value is the bearer token
