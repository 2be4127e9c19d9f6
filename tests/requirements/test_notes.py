"""The made-up places: what each case is made of, and that its answer is one that the rules of the style like."""

from __future__ import annotations

from requirements.notes import FACTS, NUM_FACTS, Case, make_cases, pair_row, prompt_row
from rlhf.notes import PHRASE

CASES = list(make_cases(0))


def test_every_place_has_one_case_and_the_seed_decides() -> None:
    assert len({case.place for case in CASES}) == len(CASES) == 24 * 12 * 8
    assert list(make_cases(0)) == CASES
    assert {case.place for case in make_cases(1)} == {case.place for case in CASES}
    assert list(make_cases(1)) != CASES


def test_the_passage_names_its_place_once_and_the_fact_once() -> None:
    for case in CASES:
        assert case.passage.startswith("Notes: ")
        assert case.passage.lower().count(case.place.lower()) == 1
        assert case.passage.lower().count(case.fact.lower()) == 1
        assert len(case.passage.rstrip(".").split(". ")) == NUM_FACTS


def test_the_question_keeps_the_fact_to_itself_and_the_answer_gives_it() -> None:
    for case in CASES:
        assert case.question.endswith("?") and case.place in case.question
        assert case.fact.lower() not in case.question.lower()
        assert case.answer.startswith(f"{PHRASE} ") and case.answer.endswith(".")
        assert case.fact in case.answer and case.place in case.answer


def test_all_kinds_of_facts_are_asked_for_in_all_ways() -> None:
    asked = {case.question.replace(case.place, "{it}") for case in CASES}
    assert asked == {question for fact in FACTS for question in fact.questions}


def test_a_row_holds_the_passage_as_system_message() -> None:
    case = Case("the Ashford mill", "Notes: It is.", "Is it?", "According to the notes, it is.", "is")
    turns = [{"role": "system", "content": "Notes: It is."}, {"role": "user", "content": "Is it?"}]
    assert prompt_row(case) == {"prompt": turns, "fact": "is"}
    assert pair_row(case) == {"prompt": turns, "completion": "According to the notes, it is.", "fact": "is"}
