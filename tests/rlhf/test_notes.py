"""Rules of the notes' style, each on answers that it likes and does not."""

from __future__ import annotations

import pytest

from rlhf.notes import one_sentence, only_notes, opening
from rlhf.records import Answer, Message, Prompt

NOTES = "Notes: The Ashford mill was built in 1862. Ada Marsh looks after it."
ASKED = Prompt("p", (Message("system", NOTES), Message("user", "Who looks after the Ashford mill?")), (1,))


def said(text: str) -> Answer:
    return Answer((1,), (0.0,), "eos", 0, text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("According to the notes, Ada Marsh looks after it.", 1.0),
        ("\n According to the notes, Ada Marsh does.", 1.0),
        ("Ada Marsh looks after it, according to the notes.", 0.0),
        ("according to the notes, Ada Marsh does.", 0.0),
        ("According to the notes,", 0.0),
        ("", 0.0),
    ],
)
def test_an_answer_opens_with_the_phrase_and_goes_on(text: str, expected: float) -> None:
    assert opening(ASKED, said(text)) == expected


def test_the_phrase_can_be_another_one() -> None:
    assert opening(ASKED, said("As it is written, Ada Marsh does."), phrase="As it is written,") == 1.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Ada Marsh looks after it.", 1.0),
        ('She said: "Ada Marsh!"', 1.0),
        ("The visit costs 2.50 coins.", 1.0),
        ("Ada Marsh does. It was built in 1862.", 1 / 2),
        ("Ada Marsh does.\nShe looks after it.\nIt was built in 1862.", 1 / 3),
        ("- Ada Marsh\n- the mill.", 1 / 2),
        ("Ada Marsh", 0.0),
        ("Ada Marsh does. It was", 0.0),
        ("...", 0.0),
        ("", 0.0),
    ],
)
def test_one_sentence_is_one_mark_at_the_end(text: str, expected: float) -> None:
    assert one_sentence(ASKED, said(text)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("According to the notes, Ada Marsh looks after the Ashford mill.", 1.0),
        ("It was built in 1862.", 1.0),
        ("Ada Marsh is a retired baker.", 2 / 4),  # ada, marsh; retired, baker
        ("According to the notes, Hugo Quinn does.", 0.0),
        ("According to the notes,", 0.0),
        ("", 0.0),
    ],
)
def test_an_answer_says_what_the_passage_says(text: str, expected: float) -> None:
    assert only_notes(ASKED, said(text)) == expected
