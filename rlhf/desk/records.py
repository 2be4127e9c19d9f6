"""What goes over the desk. Answers are named by their index in the group, not by the place where they were shown."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from configs.desk import MOST_RANKED
from rlhf.records import Message

PersonRole = Literal["annotator", "lead"]
Grade = Literal["good", "fair", "bad", "unusable"]
Flag = Literal["unsafe", "untrue", "off_question", "broken"]
Tiers = tuple[tuple[int, ...], ...]

GRADES: tuple[Grade, ...] = ("good", "fair", "bad", "unusable")  # best first
FLAGS: tuple[Flag, ...] = ("unsafe", "untrue", "off_question", "broken")
LABELS = string.ascii_uppercase[:MOST_RANKED]  # of the places, in the order shown


@dataclass(frozen=True, slots=True)
class Person:
    """Somebody who was invited."""

    id: int
    name: str
    role: PersonRole
    invited: str  # ISO 8601, UTC; empty: only taken in from elsewhere, and nobody has the token
    withdrawn: bool  # whether the rankings are kept but no longer used, and no tasks are given out


@dataclass(frozen=True, slots=True)
class Card:
    """One answer as it is shown: blind, under the label of its place."""

    label: str  # "A" is shown first
    index: int  # of the answer in its group; what verdicts name
    text: str


@dataclass(frozen=True, slots=True)
class Draft:
    """What a page saved of work that is not handed in."""

    state: Mapping[str, Any]  # JSON of the page's own making
    time_ms: int  # spent on the task so far
    saved: str  # ISO 8601, UTC


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a person says of one group.

    `tiers` holds answer indices, best tier first, as in `rlhf.records.Ranking`; answers in none were not ranked.
    There may be none at all where all are wrong.
    """

    tiers: Tiers
    grades: Mapping[int, Grade] = field(default_factory=dict[int, Grade])  # by answer index, of those that were sorted
    flags: Mapping[int, frozenset[Flag]] = field(default_factory=dict[int, frozenset[Flag]])  # by answer index
    all_wrong: bool = False


@dataclass(frozen=True, slots=True)
class Submission:
    """A verdict, or a skip, as it was handed in: a row that is never changed."""

    id: int
    task_id: int
    person: str  # name
    prompt_id: str
    round: int
    question: str  # the prompt's last user message
    verdict: Verdict | None  # None: skipped
    reason: str  # of a skip; else empty
    time_ms: int
    order: tuple[int, ...]  # answer index at each place, as it was shown
    repeat: bool  # whether the person had ranked the same group before, without being told
    created: str  # ISO 8601, UTC


@dataclass(frozen=True, slots=True)
class Task:
    """A group that was given to a person to rank."""

    id: int
    prompt_id: str
    round: int
    messages: tuple[Message, ...]  # the prompt, all its turns
    cards: tuple[Card, ...]  # in the order shown
    seed: int  # that this order hangs on
    expires: str  # ISO 8601, UTC: until then nobody else is given the place; each save renews it
    draft: Draft | None  # the newest
    submission: Submission | None  # the newest; None: not handed in yet

    @property
    def order(self) -> tuple[int, ...]:
        """The answer index at each place."""
        return tuple(card.index for card in self.cards)


@dataclass(frozen=True, slots=True)
class Item:
    """A group with its state, as the lead sees it."""

    prompt_id: str
    round: int
    messages: tuple[Message, ...]
    answers: tuple[str, ...]  # by answer index
    scores: tuple[float, ...] | None  # the reward model's, by answer index
    num_rankings: int  # that count
    num_skips: int
    closed: bool  # skipped so often that it is given out no more
    imported: bool = False  # it came with its rankings, and is not given out


@dataclass(frozen=True, slots=True)
class PersonProgress:
    """How far one person is."""

    person: Person
    num_ranked: int  # groups, repeats apart
    num_skipped: int
    num_repeats: int
    time_ms: int  # of what was handed in
    median_time_ms: int  # per group; 0 where there is none
    last_seen: str | None  # ISO 8601, UTC: of the newest draft or row


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a round, or all rounds, are."""

    quota: int  # people per group
    num_groups: int
    num_done: int  # groups that have all their rankings
    num_closed: int  # groups that were skipped too often
    num_rankings: int  # that count, of those wanted: no more than the quota per group
    num_wanted: int  # quota times groups that are not closed
    num_open: int  # tasks that are given out and not handed in, their lease running
    num_short: int  # groups that not enough of the people invited can rank: they had them, or there are too few
    people: tuple[PersonProgress, ...]

    @property
    def complete(self) -> bool:
        """Whether nothing is waited for."""
        return self.num_done + self.num_closed == self.num_groups


@dataclass(frozen=True, slots=True)
class OwnProgress:
    """What a person is told of their own work: nothing that gives a repeat away."""

    num_ranked: int  # repeats among them
    num_skipped: int
    num_left: int  # groups that can be given to this person now
    time_ms: int


@dataclass(frozen=True, slots=True)
class PairAgreement:
    """Two people on the groups that both ranked."""

    one: str
    other: str
    tau: float  # mean Kendall's tau-b over the groups
    num_groups: int


@dataclass(frozen=True, slots=True)
class PersonAgreement:
    """One person against the others, themselves and the reward model. None: there is nothing to compare yet."""

    person: str
    with_others: float | None  # mean tau-b over the pairs with others
    with_self: float | None  # mean tau-b over the hidden repeats
    num_repeats: int
    with_reward: float | None  # mean tau-b with the reward model's scores


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far people agree, over what counts now. None: there is nothing to compare yet."""

    tau: float | None  # mean tau-b over all pairs of rankings of one group
    alpha: float | None  # Krippendorff's, ordinal, of ranks
    alpha_grades: float | None  # the same of good / fair / bad / unusable
    with_reward: float | None
    with_self: float | None
    num_groups: int  # ranked by at least two
    pairs: tuple[PairAgreement, ...]
    people: tuple[PersonAgreement, ...]


@dataclass(frozen=True, slots=True)
class Consensus:
    """What several people's rankings of one group come to."""

    prompt_id: str
    round: int
    tiers: Tiers
    people: tuple[str, ...]
    agreement: float | None  # mean tau-b of their pairs; None: one person, or nothing to compare
    accepted: bool  # whether the agreement is not below the recipe's minimum
