"""The shapes of rows that hold rankings: what other programs may write, field by field."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from rlhf.desk.records import Flag, Grade
from rlhf.desk.taking import LONGEST_MS

LONGEST_ID = 64  # characters, as the tables have it


def _number(key: Any) -> Any:
    """JSON's keys are texts; an answer's index is a number."""
    return int(key) if isinstance(key, str) and key.isdecimal() else key


Index = Annotated[int, BeforeValidator(_number)]
Tiers = list[list[int]]
PromptId = Annotated[str, Field(min_length=1, max_length=LONGEST_ID, pattern=r"^[^\x00]*$")]


class Shape(BaseModel):
    """Base: nothing is converted, so that no null becomes the text "None"; other keys are left alone."""

    model_config = ConfigDict(strict=True)


class Turn(Shape):
    """One message."""

    role: Literal["system", "user", "assistant"]
    content: str


Turns = Annotated[list[Turn], Field(min_length=1)]


class Opinion(Shape):
    """What one person thinks of a group."""

    by: str | None = None
    tiers: Tiers | None = None
    grades: dict[Index, Grade] = {}
    flags: dict[Index, list[Flag]] = {}
    all_wrong: bool = False
    time_ms: Annotated[int, Field(ge=0, le=LONGEST_MS)] = 0


class Said(Opinion):
    """The same in a list of several people's."""

    skipped: str | None = None
    repeat: bool = False
    withdrawn: bool = False

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.tiers is None and self.skipped is None:
            raise ValueError("'tiers' is missing")
        return self

    @property
    def counts(self) -> bool:
        """Whether it is a ranking that is to be used."""
        return self.skipped is None and not self.repeat and not self.withdrawn


class Group(Opinion):
    """A prompt with answers: a row of ours (`rankings`), or of one person alone (`tiers`)."""

    prompt: str | Turns | None = None
    messages: str | Turns | None = None
    prompt_id: PromptId | None = None
    answers: list[str]
    rankings: list[Said] | None = None

    @model_validator(mode="after")
    def _is_ranked(self) -> Self:
        if self.rankings is None and self.tiers is None:
            raise ValueError("'tiers' is missing")
        return self


class Best(Shape):
    """A prompt with its answers, best first; where some are equal, `ranks` says which."""

    prompt: str | Turns | None = None
    messages: str | Turns | None = None
    prompt_id: PromptId | None = None
    ranked_answers: list[str]
    ranks: list[float] | None = None
    by: str | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.ranks is not None and len(self.ranks) != len(self.ranked_answers):
            raise ValueError(f"{len(self.ranks)} ranks of {len(self.ranked_answers)} ranked_answers")
        return self


class Pair(Shape):
    """TRL's: which of two answers is better, as texts or as messages."""

    prompt: str | Turns | None = None
    chosen: str | Turns
    rejected: str | Turns


def problem_of(error: ValidationError) -> str:
    """The first thing that is wrong with a row, and where in it."""
    first = max(reversed(error.errors()), key=lambda one: len(one["loc"]))  # of a choice, what came furthest
    if first["type"] == "value_error":
        return first["msg"].removeprefix("Value error, ")
    place = ".".join(str(part) for part in first["loc"] if part != "str" and not str(part).startswith("list["))
    return f"{place!r} is missing" if first["type"] == "missing" else f"{place}: {first['msg']}"
