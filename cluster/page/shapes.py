"""What the page's addresses take and give. Answers are named by their label alone: who wrote one is told to nobody."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from cluster.page.inert import rendered, visible
from rlhf.desk.errors import BadVerdict
from rlhf.desk.records import Flag, Grade, Item, PersonRole, Submission, Task, Verdict
from rlhf.desk.taking import LONGEST_MS, LONGEST_REASON
from rlhf.records import Message

MOST_LABELS = 26
BIGGEST_INT = 2**31 - 1  # of the databases' integers

Label = Annotated[str, Field(pattern="^[A-Z]$")]
Milliseconds = Annotated[int, Field(ge=0, le=LONGEST_MS)]
Text = Annotated[str, Field(max_length=LONGEST_REASON, pattern=r"^[^\x00]*$")]  # PostgreSQL's text knows no NUL


class Shape(BaseModel):
    """Base of what comes in: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid")


class Problem(BaseModel):
    """Why a request was refused."""

    detail: str


class Token(Shape):
    """What an invitation's link holds."""

    token: Annotated[str, Field(min_length=1, max_length=200)]


class Me(BaseModel):
    """Who is signed in, and to what."""

    name: str
    role: PersonRole
    run: str
    language: str | None  # that the page is to start with; None: the browser's
    withdrawn: bool  # whether this person is given no tasks any more


class Guidelines(BaseModel):
    """How to rank, as HTML; empty if the recipe names no file."""

    html: str


class Turn(BaseModel):
    """One message of a prompt."""

    role: str
    html: str


class ShownCard(BaseModel):
    """One answer, as HTML and as plain text."""

    label: str
    html: str
    text: str


class Said(Shape):
    """A verdict, by labels. Tiers are best first; who stands in none is not ranked."""

    tiers: Annotated[list[Annotated[list[Label], Field(max_length=MOST_LABELS)]], Field(max_length=MOST_LABELS)]
    grades: Annotated[dict[Label, Grade], Field(max_length=MOST_LABELS)] = {}
    flags: Annotated[dict[Label, Annotated[list[Flag], Field(max_length=4)]], Field(max_length=MOST_LABELS)] = {}
    all_wrong: bool = False


class HandIn(Said):
    """A verdict with the time that was spent on the task."""

    time_ms: Milliseconds


class Skip(Shape):
    """Why a task is not ranked."""

    reason: Annotated[Text, Field(min_length=1)]
    time_ms: Milliseconds


class DraftIn(Shape):
    """What the page wants kept of work that is under way."""

    state: dict[str, Any]
    time_ms: Milliseconds


class ShownDraft(BaseModel):
    """What was kept."""

    state: dict[str, Any]
    time_ms: int
    saved: str  # ISO 8601, UTC


class ShownTask(BaseModel):
    """A group to rank."""

    id: int
    turns: list[Turn]
    cards: list[ShownCard]
    expires: str  # ISO 8601, UTC
    draft: ShownDraft | None
    said: Said | None  # what counts now, if it was handed in
    reason: str | None  # of the skip that counts now
    created: str | None  # ISO 8601, UTC: of what counts now; None: not handed in yet
    time_ms: int  # spent so far


class OwnProgress(BaseModel):
    """How far this person is."""

    num_ranked: int
    num_skipped: int
    num_left: int
    time_ms: int


class Given(BaseModel):
    """What is to be ranked now; None: nothing at the moment."""

    task: ShownTask | None
    progress: OwnProgress


class HandedIn(BaseModel):
    """What was taken."""

    task_id: int
    created: str  # ISO 8601, UTC
    progress: OwnProgress


class Past(BaseModel):
    """A task that was handed in, for going back to it."""

    task_id: int
    question: str  # its beginning
    skipped: bool
    created: str  # ISO 8601, UTC


class GroupRow(BaseModel):
    """A group in the lead's list."""

    prompt_id: str
    round: int
    question: str  # its beginning
    num_rankings: int
    num_skips: int
    closed: bool
    imported: bool  # came with its rankings, and is not given out


class ScoredAnswer(BaseModel):
    """An answer as the lead sees it, under its number in the group."""

    index: int
    html: str
    text: str
    score: float | None  # the reward model's


class LeadSubmission(BaseModel):
    """What one person said of a group, by answers' numbers."""

    person: str
    tiers: list[list[int]]
    grades: dict[int, Grade]
    flags: dict[int, list[Flag]]
    all_wrong: bool
    skipped: bool
    reason: str
    time_ms: int
    order: list[int]  # answer number at each place, as it was shown
    repeat: bool
    withdrawn: bool
    counts: bool  # False: corrected since, set aside, or a repeat
    created: str  # ISO 8601, UTC


class Group(BaseModel):
    """A group with all that people said of it."""

    prompt_id: str
    round: int
    turns: list[Turn]
    answers: list[ScoredAnswer]
    submissions: list[LeadSubmission]


class SetAside(Shape):
    """Whose rankings are to count no longer, or again, and why."""

    name: Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\x00]*$")]
    reason: Text = ""


def shown_task(task: Task) -> ShownTask:
    """A task as its annotator sees it."""
    label = {card.index: card.label for card in task.cards}
    newest = task.submission
    verdict = newest.verdict if newest else None
    return ShownTask(
        id=task.id,
        turns=turns(task.messages),
        cards=[ShownCard(label=c.label, html=rendered(c.text), text=visible(c.text)) for c in task.cards],
        expires=task.expires,
        draft=task.draft
        and ShownDraft(state=dict(task.draft.state), time_ms=task.draft.time_ms, saved=task.draft.saved),
        said=verdict
        and Said(
            tiers=[sorted(label[index] for index in tier) for tier in verdict.tiers],
            grades={label[index]: grade for index, grade in verdict.grades.items()},
            flags={label[index]: sorted(flags) for index, flags in verdict.flags.items()},
            all_wrong=verdict.all_wrong,
        ),
        reason=visible(newest.reason) if newest and verdict is None else None,
        created=newest and newest.created,
        time_ms=max(task.draft.time_ms if task.draft else 0, newest.time_ms if newest else 0),
    )


def verdict_of(said: Said, task: Task) -> Verdict:
    """The verdict with answers' indices in the place of labels. Raises BadVerdict for a label that was not shown."""
    index = {card.label: card.index for card in task.cards}
    named = [label for tier in said.tiers for label in tier] + [*said.grades, *said.flags]
    if strangers := sorted(set(named) - set(index)):
        raise BadVerdict(f"There is no answer {strangers[0]}.", limit=f"There are {', '.join(sorted(index))}.")
    return Verdict(
        tiers=tuple(tuple(index[label] for label in tier) for tier in said.tiers),
        grades={index[label]: grade for label, grade in said.grades.items()},
        flags={index[label]: frozenset(flags) for label, flags in said.flags.items() if flags},
        all_wrong=said.all_wrong,
    )


def shown_group(item: Item, submissions: Sequence[Submission], withdrawn: frozenset[str]) -> Group:
    """A group as the lead sees it; `submissions` are all rows, oldest first, the newest of a task counts."""
    newest = {one.task_id: one.id for one in submissions}
    return Group(
        prompt_id=item.prompt_id,
        round=item.round,
        turns=turns(item.messages),
        answers=[
            ScoredAnswer(
                index=i, html=rendered(text), text=visible(text), score=None if item.scores is None else item.scores[i]
            )
            for i, text in enumerate(item.answers)
        ],
        submissions=[_seen_by_lead(one, one.person in withdrawn, newest[one.task_id] == one.id) for one in submissions],
    )


def _seen_by_lead(one: Submission, withdrawn: bool, newest: bool) -> LeadSubmission:
    said = one.verdict or Verdict(())
    return LeadSubmission(
        person=one.person,
        tiers=[list(tier) for tier in said.tiers],
        grades=dict(said.grades),
        flags={index: sorted(flags) for index, flags in said.flags.items()},
        all_wrong=said.all_wrong,
        skipped=one.verdict is None,
        reason=visible(one.reason),
        time_ms=one.time_ms,
        order=list(one.order),
        repeat=one.repeat,
        withdrawn=withdrawn,
        counts=newest and not withdrawn and not one.repeat,
        created=one.created,
    )


def turns(messages: Sequence[Message]) -> list[Turn]:
    """A prompt as HTML, message by message."""
    return [Turn(role=message.role, html=rendered(message.content)) for message in messages]


def beginning(text: str, num_characters: int = 140) -> str:
    """How a text begins, in one line."""
    line = " ".join(text[: 4 * num_characters].split())
    return visible(line if len(line) <= num_characters else line[: num_characters - 1] + "…")
