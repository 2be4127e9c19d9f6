"""The Tang poems, cleaned, told apart, and shared out: what is learned from, what is asked, what is held out."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.poems import FORMS, IDEOGRAPHS, Form, ask, clauses, is_well_formed

NUM_PAIRS = 6_000  # for SFT, whose time is limited
NUM_TITLES = 1_280  # some 600 to train PPO on, and more than 400 to judge it by
TITLE_LENGTHS = range(2, 11)  # of titles that are asked for, in characters

_NOTE = re.compile("[（〖][^（）〖〗]*[）〗]")
_WAS_NOTE = "\x00"
_LOST = re.compile("[缺闕]")  # in a note: says what is not there any more
_MARKS = "，。！？；：、"
_AFTER_NOTE = re.compile(f"(^|[{_MARKS}])\x00+[{_MARKS}]", re.MULTILINE)
_NUMBER = re.compile("(?:其|第)?[一二三四五六七八九十百〇○]+$")
_CLEAN = re.compile(rf"[{IDEOGRAPHS}{_MARKS}]+")
_CLAUSE = re.compile(f"[^{_MARKS}]+[{_MARKS}]?")
_IN_TITLE = re.compile(r"[\s「」『』《》〈〉]+")
_NOT_IDEOGRAPHS = re.compile(f"[^{IDEOGRAPHS}]")


@dataclass(frozen=True, slots=True)
class Poem:
    """A poem without notes and gaps."""

    title: str
    lines: tuple[str, ...]  # as printed, two clauses on most
    clauses: tuple[str, ...]
    form: Form | None  # by number and length of clauses alone

    @property
    def body(self) -> str:
        """The characters without marks: what tells a poem from others."""
        return "".join(self.clauses)

    @property
    def text(self) -> str:
        """The poem as it is printed."""
        return "\n".join(self.lines)


@dataclass(frozen=True, slots=True)
class Chosen:
    """Poems of the four forms, of each the same number where there are so many."""

    pairs: list[Poem]  # each well-formed; to learn from
    held_out: list[Poem]  # well-formed or not, as the real ones are; no title and no clause of them is elsewhere


def clean_poems(rows: Iterable[Mapping[str, Any]]) -> Iterator[Poem]:
    """The poems that are whole, each once, in order of the rows ({title, paragraphs})."""
    seen: set[str] = set()
    for row in rows:
        poem = clean_poem(row["title"], row["paragraphs"])
        if poem is not None and poem.body not in seen:
            seen.add(poem.body)
            yield poem


def clean_poem(title: str, paragraphs: Sequence[str]) -> Poem | None:
    """The poem without editors' notes; None for one with a gap, or with anything but characters and marks.

    So an editor's own words go with it, which quote books, and so do additions in square brackets, characters that are
    described in braces, and brackets that do not close. A question mark is a mark at the end of a clause.
    """
    text, is_whole = _without_notes("\n".join(paragraphs))  # a note may go over lines
    lines = [bare for line in text.split("\n") if (bare := "".join(line.split()))]
    name = clean_title(title)
    if not is_whole or not lines or not name or not all(_CLEAN.fullmatch(line) for line in lines):
        return None
    parts = clauses("\n".join(lines))
    if not all(parts):  # two marks with nothing between: something was there
        return None
    form = form_of(parts)
    return Poem(name, tuple(_by_two(lines) if form else lines), tuple(parts), form)


def clean_title(title: str) -> str:
    """The title without notes, quotes, and its number in a series; empty for one with a placeholder."""
    parts = _without_notes(title)[0].split()
    if len(parts) > 1 and _NUMBER.fullmatch(parts[-1]):
        parts = parts[:-1]
    bare = _IN_TITLE.sub("", "".join(parts))
    return bare if _CLEAN.fullmatch(bare) and _NOT_IDEOGRAPHS.sub("", bare) else ""


def form_of(parts: Sequence[str]) -> Form | None:
    """The form that has this number and length of clauses, if one has."""
    lengths = {len(part) for part in parts}
    return next((form for form in FORMS if len(parts) == form.num_clauses and lengths == {form.length}), None)


def choose(poems: Sequence[Poem]) -> Chosen:
    """Pairs to learn from and poems to hold out, by hash: they do not depend on the order of the poems."""
    num_titled = Counter(poem.title for poem in poems)
    num_with = Counter(clause for poem in poems for clause in set(poem.clauses))
    usable = [poem for poem in poems if poem.form and is_asked(poem.title)]
    alone = [p for p in usable if num_titled[p.title] == 1 and all(num_with[clause] == 1 for clause in p.clauses)]
    held_out = balanced(alone, NUM_TITLES, "held out")
    apart = {poem.body for poem in held_out}
    rest = [p for p in usable if p.body not in apart and p.form and is_well_formed(ask(p.form, p.title), p.text)]
    return Chosen(balanced(rest, NUM_PAIRS, "pairs"), held_out)


def is_asked(title: str) -> bool:
    """Whether a prompt may name this title: short, of characters alone, and no number."""
    return len(title) in TITLE_LENGTHS and not _NOT_IDEOGRAPHS.search(title) and not _NUMBER.fullmatch(title)


def balanced(poems: Sequence[Poem], num: int, use: str) -> list[Poem]:
    """`num` of the poems, the same number of each form as far as they go, in an order by hash."""
    ordered = sorted(poems, key=lambda poem: hashlib.sha256(f"{use}|{poem.title}|{poem.body}".encode()).digest())
    kept: list[Poem] = []
    by_form = sorted(([p for p in ordered if p.form == form] for form in FORMS), key=len)
    for place, those in enumerate(by_form):
        kept += those[: (num - len(kept)) // (len(by_form) - place)]
    chosen = {poem.body for poem in kept}
    return [poem for poem in ordered if poem.body in chosen]


def corpus_row(poem: Poem) -> dict[str, str]:
    """A document: the title in its marks, and the poem under it."""
    return {"text": f"《{poem.title}》\n{poem.text}"}


def pair_row(poem: Poem) -> dict[str, str]:
    """A question and the poem that answers it."""
    assert poem.form is not None
    return {"prompt": ask(poem.form, poem.title), "completion": poem.text}


def title_row(poem: Poem) -> dict[str, str]:
    """A question alone."""
    assert poem.form is not None
    return {"prompt": ask(poem.form, poem.title), "form": poem.form.name, "title": poem.title}


def _without_notes(text: str) -> tuple[str, bool]:
    """The text without notes, and whether none of them says that something is lost."""
    is_whole = True
    while notes := _NOTE.findall(text):  # again, for a note in a note
        is_whole &= not any(_LOST.search(note) for note in notes)
        text = _NOTE.sub(_WAS_NOTE, text)
    # The mark that ended the note's sentence, not the poem's.
    return _AFTER_NOTE.sub(r"\1", text).replace(_WAS_NOTE, ""), is_whole


def _by_two(lines: Sequence[str]) -> list[str]:
    """The lines again, two clauses on each."""
    parts = _CLAUSE.findall("".join(lines))
    return ["".join(parts[at : at + 2]) for at in range(0, len(parts), 2)]
