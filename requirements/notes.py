"""Made-up places with notes about them, questions, and answers in the style of rlhf/notes.py: the style domain."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rlhf.notes import PHRASE

NUM_FACTS = 3  # of a passage; one of them is asked for
KINDS = ("mill", "lighthouse", "library", "inn", "museum", "bakery", "bridge", "garden")
BEGINNINGS = (
    *("Alder", "Ash", "Birch", "Brook", "Corn", "Dun", "East", "Elm", "Fern", "Hart", "Hazel", "Iron"),
    *("Kings", "Long", "Maple", "North", "Oak", "Stone", "Summer", "Sweet", "Thorn", "West", "Winter", "Wolf"),
)
ENDINGS = ("bury", "combe", "dale", "field", "ford", "ham", "hurst", "ley", "mere", "ton", "wick", "worth")
GIVEN = ("Ada", "Ben", "Clara", "Edgar", "Flora", "Hugo", "Iris", "Jonas", "Lena", "Martin", "Nora", "Oscar")
FAMILY = ("Archer", "Barnes", "Carter", "Dawson", "Fisher", "Harper", "Marsh", "Parker", "Quinn", "Turner", "Weaver")
COLOURS = ("blue", "green", "orange", "purple", "red", "white", "yellow", "grey")
HOURS = ("dawn", "noon", "dusk", "half past seven", "half past eight", "a quarter to ten", "a quarter past two")
ANIMALS = ("goats", "owls", "foxes", "peacocks", "donkeys", "rabbits", "swans", "parrots")
NUMBERS = ("two", "three", "five", "six", "seven", "nine", "eleven")


@dataclass(frozen=True, slots=True)
class Fact:
    """A kind of fact. In all templates {it} is the place, {It} the same at a sentence's beginning."""

    note: str
    questions: tuple[str, ...]
    answer: str  # what follows the phrase
    value: Callable[[random.Random], str]


@dataclass(frozen=True, slots=True)
class Case:
    """A passage about a place, a question about one of its facts, and the answer in style."""

    place: str
    passage: str
    question: str
    answer: str
    fact: str  # the value that was asked for, as passage and answer have it


def _person(rng: random.Random) -> str:
    return f"{rng.choice(GIVEN)} {rng.choice(FAMILY)}"


# Numbers are of two digits, so that none is found within another.
FACTS = (
    Fact(
        "{It} was built in {value}.",
        ("When was {it} built?", "In which year was {it} built?"),
        "{it} was built in {value}.",
        lambda rng: str(rng.randint(1700, 1949)),
    ),
    Fact(
        "{value} looks after {it}.",
        ("Who looks after {it}?", "Who is the person that looks after {it}?"),
        "{value} looks after {it}.",
        _person,
    ),
    Fact(
        "{It} stands {value} from the sea.",
        ("How far from the sea does {it} stand?", "How many miles from the sea is {it}?"),
        "{it} stands {value} from the sea.",
        lambda rng: f"{rng.randint(11, 89)} miles",
    ),
    Fact(
        "A visit to {it} costs {value}.",
        ("What does a visit to {it} cost?", "How many coins does a visit to {it} cost?"),
        "a visit to {it} costs {value}.",
        lambda rng: f"{rng.randint(11, 89)} coins",
    ),
    Fact(
        "{It} has a roof of {value}.",
        ("Which colour are the roof tiles of {it}?", "What colour is the roof of {it}?"),
        "{it} has a roof of {value}.",
        lambda rng: f"{rng.choice(COLOURS)} tiles",
    ),
    Fact(
        "{It} opens at {value}.",
        ("When does {it} open?", "At what time does {it} open?"),
        "{it} opens at {value}.",
        lambda rng: rng.choice(HOURS),
    ),
    Fact(
        "{It} is home to {value}.",
        ("Which animals live at {it}?", "What animals is {it} home to?"),
        "{it} is home to {value}.",
        lambda rng: f"{rng.choice(NUMBERS)} {rng.choice(ANIMALS)}",
    ),
)


def make_cases(seed: int) -> Iterator[Case]:
    """One case for every place that there can be, in a seeded order."""
    rng = random.Random(seed)
    places = [f"the {first}{last} {kind}" for first in BEGINNINGS for last in ENDINGS for kind in KINDS]
    rng.shuffle(places)
    for place in places:
        yield _case(place, rng)


def messages(case: Case) -> list[dict[str, str]]:
    """The prompt: the passage as the system message, and the question."""
    return [{"role": "system", "content": case.passage}, {"role": "user", "content": case.question}]


def pair_row(case: Case) -> dict[str, Any]:
    """A question and the answer to learn."""
    return {"prompt": messages(case), "completion": case.answer, "fact": case.fact}


def prompt_row(case: Case) -> dict[str, Any]:
    """A question alone, with the fact for the rule `contains`."""
    return {"prompt": messages(case), "fact": case.fact}


def _case(place: str, rng: random.Random) -> Case:
    told = [(fact, fact.value(rng)) for fact in rng.sample(FACTS, NUM_FACTS)]
    sentences = [_fill(fact.note, "it" if number else place, value) for number, (fact, value) in enumerate(told)]
    asked, value = rng.choice(told)
    return Case(
        place,
        f"Notes: {' '.join(sentences)}",
        _fill(rng.choice(asked.questions), place, value),
        f"{PHRASE} {_fill(asked.answer, place, value)}",
        value,
    )


def _fill(template: str, it: str, value: str) -> str:
    fields: Mapping[str, str] = {"it": it, "It": it[0].upper() + it[1:], "value": value}
    return template.format_map(fields)
