"""How the poems are cleaned, told apart and shared out, on poems made for it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from requirements import verse
from requirements.verse import Poem, balanced, choose, clean_poem, clean_poems, clean_title, corpus_row, pair_row
from rlhf.poems import FORMS, Form

FIVE, SEVEN, FIVE_LONG, SEVEN_LONG = FORMS
NIGHT = ["牀前明月光，疑是地上霜。", "舉頭望明月，低頭思故鄉。"]
RHYMES = "光霜鄉長"  # 江陽
NO_RHYMES = "光人花天"


def rows(*bodies: list[str], title: str = "題") -> list[dict[str, object]]:
    return [{"title": title, "paragraphs": body} for body in bodies]


def made(form: Form, number: int, ends: str = RHYMES, title: str = "") -> Poem:
    """A poem of that form, each of whose clauses begins with characters that no other number has."""
    codes = (chr(0x4E00 + number * 8 + place) for place in itertools.count())
    lines: list[str] = []
    for pair in range(form.num_clauses // 2):
        odd = next(codes) + "春" * (form.length - 1)
        even = next(codes) + "春" * (form.length - 2) + ends[pair]
        lines.append(f"{odd}，{even}。")
    poem = clean_poem(title or f"詠{chr(0x4E00 + number)}{chr(0x7000 + number)}", lines)
    assert poem is not None and poem.form == form
    return poem


def many(num: int, ends: str = RHYMES) -> Iterator[Poem]:
    for number in range(num):
        yield made(FORMS[number % 4], number, ends)


def test_a_clean_poem_keeps_its_title_lines_and_form() -> None:
    poem = clean_poem("靜夜思", NIGHT)
    assert poem is not None
    assert poem.lines == tuple(NIGHT)
    assert poem.clauses == ("牀前明月光", "疑是地上霜", "舉頭望明月", "低頭思故鄉")
    assert poem.form == FIVE
    assert corpus_row(poem) == {"text": "《靜夜思》\n" + "\n".join(NIGHT)}
    assert pair_row(poem) == {"prompt": "写一首五言绝句，题为《靜夜思》", "completion": "\n".join(NIGHT)}


def test_notes_go_with_the_marks_that_end_them_and_so_do_spaces() -> None:
    noted = [
        "牀前明月光，疑是地上霜。（一作白（又作水〖三〗",
        "霜）） ",
        "（樂府）舉頭望明月， 低頭思故鄉。（見卷一）。",
        "（略）。",
    ]
    poem = clean_poem("靜夜思（李白）", noted)
    assert poem is not None
    assert poem.title == "靜夜思"
    assert poem.lines == tuple(NIGHT)


def test_a_poem_of_a_form_is_printed_by_twos_and_others_as_they_come() -> None:
    assert clean_poem("靜夜思", ["牀前明月光，疑是地上霜？舉頭望明月，", "低頭思故鄉。"]).lines == (  # type: ignore[union-attr]
        "牀前明月光，疑是地上霜？",
        "舉頭望明月，低頭思故鄉。",
    )
    three = ("疑是地上霜？", "舉頭望明月，低頭思故鄉。")
    assert clean_poem("題", three).lines == three  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "body",
    [
        ["牀前□月光，疑是地上霜。"],
        ["牀前？？光，疑是地上霜。"],
        ["《易》前明月光，疑是地上霜。"],
        ["牀前[明]月光，疑是地上霜。"],
        ["牀前{日月}月光，疑是地上霜。"],
        ["牀前1月光，疑是地上霜。"],
        ["牀前a月光，疑是地上霜。"],
        ["牀前⿰月光，疑是地上霜。"],
        ["牀前明月光，疑是地上霜。（下缺）"],
        ["牀前明月光，（闕二字）地上霜。"],
        ["牀前明月光，疑是地上霜。（一作"],
        ["（佚）"],
        [""],
        [],
    ],
)
def test_a_poem_with_a_gap_a_placeholder_or_nothing_in_it_is_left_out(body: list[str]) -> None:
    assert clean_poem("題", body) is None


def test_a_title_loses_its_number_in_a_series_and_its_notes() -> None:
    assert clean_title("帝京篇十首 一") == "帝京篇十首"
    assert clean_title("雜曲歌辭 其十二") == "雜曲歌辭"
    assert clean_title("郊廟歌辭 豫和") == "郊廟歌辭豫和"
    assert clean_title("詩（幷序） 一○五") == "詩"
    assert clean_title("一") == "一"
    assert clean_title("詠《詩》（一作雪）") == "詠詩"
    assert clean_title("贈□") == clean_title("（失題）") == clean_title("") == ""


def test_a_poem_comes_once_whatever_its_marks_and_title() -> None:
    other = ["牀前明月光！疑是地上霜？", "舉頭望明月；低頭思故鄉。"]
    first, second = clean_poems([*rows(NIGHT, title="甲"), *rows(other, title="乙"), *rows(["白日依山盡。"])])
    assert (first.title, second.lines) == ("甲", ("白日依山盡。",))


def test_the_form_is_told_by_number_and_length_of_clauses() -> None:
    for form in FORMS:
        assert made(form, 1).form == form
    assert clean_poem("題", [*NIGHT, *NIGHT[:1]]).form is None  # type: ignore[union-attr]
    assert clean_poem("題", ["牀前明月光，疑是霜。", NIGHT[1]]).form is None  # type: ignore[union-attr]


def test_held_out_poems_share_neither_title_nor_clause_with_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verse, "NUM_TITLES", 100)
    alone, one, two = made(FIVE, 1), made(FIVE, 20, title="同名"), made(SEVEN, 30, title="同名")
    shared = clean_poem("借句", [alone.lines[0], "白日依山盡，黃河入海流。"])
    assert shared is not None
    free = made(SEVEN, 40)
    assert choose([alone, one, two, shared, free]).held_out == [free]


def test_pairs_are_well_formed_and_none_is_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verse, "NUM_TITLES", 8)
    chosen = choose([*many(40), *(made(FIVE, number, NO_RHYMES) for number in range(100, 140))])
    assert len(chosen.held_out) == 8
    assert all(poem.clauses[1][-1] + poem.clauses[3][-1] == "光霜" for poem in chosen.pairs)
    assert not {poem.title for poem in chosen.pairs} & {poem.title for poem in chosen.held_out}


def test_held_out_poems_are_well_formed_or_not_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    # Chosen by rhyme, the real poems' share would be 1 by that choice.
    monkeypatch.setattr(verse, "NUM_TITLES", 8)
    chosen = choose(list(many(40, NO_RHYMES)))
    assert len(chosen.held_out) == 8
    assert chosen.pairs == []


def test_titles_that_are_asked_for_are_short_and_of_characters_alone() -> None:
    poems = [made(FIVE, 1, title="月"), made(FIVE, 9, title="詠" * 11), made(FIVE, 17, title="早春，山行")]
    poems.append(made(FIVE, 25, title="四五"))
    chosen = choose(poems)
    assert chosen.held_out == chosen.pairs == []


def test_each_form_has_the_same_number_until_one_runs_out() -> None:
    poems = [made(FIVE, 0), *(made(form, 8 * place + i) for place, form in enumerate(FORMS[1:], 1) for i in range(6))]
    kept = balanced(poems, 13, "use")
    assert sorted(FORMS.index(poem.form) for poem in kept if poem.form) == [0, *([1] * 4), *([2] * 4), *([3] * 4)]
    assert balanced(poems, 100, "use") == balanced(poems[::-1], 100, "use")
    assert len(balanced(poems, 100, "use")) == len(poems)


def test_the_choice_does_not_depend_on_the_order_of_the_poems() -> None:
    poems = list(many(40))
    assert choose(poems) == choose(poems[::-1])
