"""What the benchmark of the poem demo says of a poem, and of those who write."""

from __future__ import annotations

import pytest

from benchmarks.poems import PARTS, Poem, row, table, variety
from rlhf.poems import FORMS, ask

FIVE, SEVEN = FORMS[:2]
NIGHT = "牀前明月光，疑是地上霜。\n舉頭望明月，低頭思故鄉。"  # 李白《靜夜思》
ASKED = ask(FIVE, "靜夜思")


@pytest.mark.parametrize(
    ("prompt", "text", "ended", "wrong"),
    [
        (ASKED, NIGHT, True, set()),
        (ASKED, NIGHT, False, {"ended"}),
        (ASKED, NIGHT.replace("故鄉", "故人"), True, {"rhyme"}),
        (ASKED, NIGHT.replace("思故鄉", "思故故鄉"), True, {"form"}),
        (ask(SEVEN, "靜夜思"), NIGHT, True, {"form"}),
        (ASKED, NIGHT.replace("舉頭望明月", "牀前明月光"), True, {"different"}),
        (ASKED, "", True, {"form", "rhyme"}),
    ],
)
def test_a_poem_is_well_formed_where_each_part_of_it_is_right(prompt: str, text: str, ended: bool, wrong: set[str]):
    poem = Poem(prompt, text, ended)
    assert tuple(poem.parts) == PARTS
    assert {part for part, is_right in poem.parts.items() if not is_right} == wrong
    assert poem.is_well_formed == all(poem.parts.values())


def test_the_share_is_that_of_all_poems_and_the_table_says_what_fails_and_which_form():
    other = ask(SEVEN, "楓橋夜泊")
    poems = [Poem(ASKED, NIGHT, True), Poem(ASKED, NIGHT, False), Poem(other, NIGHT, True), Poem(other, NIGHT, True)]
    found = row("somebody", poems, seed=0)
    assert found["share"] == 0.25 and found["low"] <= 0.25 <= found["high"]
    assert found["parts"] == {"form": 0.5, "rhyme": 1, "different": 1, "ended": 0.75}
    assert found["forms"] == {"五言绝句": 0.5, "七言绝句": 0, "五言律诗": None, "七言律诗": None}
    assert found["poems"] == [[ASKED, NIGHT], [other, NIGHT]]
    lines = [line for line in table([found]) if line.startswith("somebody")]
    assert [line.split() for line in lines] == [
        ["somebody", "25.0%", "0.0%", "-", "50.0%"],
        ["somebody", "50.0%", "100.0%", "100.0%", "75.0%"],
        ["somebody", "50.0%", "0.0%", "-", "-"],
        ["somebody", "85.0%", "100.0%"],
    ]


def test_the_commonest_rhyme_is_counted_among_poems_that_rhyme():
    other = NIGHT.replace("霜", "天").replace("故鄉", "少年")
    none = NIGHT.replace("故鄉", "故人")
    poems = [Poem(ASKED, text, True) for text in (NIGHT, NIGHT, other, none, "")]
    assert variety(poems)["one rhyme"] == pytest.approx(2 / 3)
    assert variety(poems[3:])["one rhyme"] is None
    assert variety(poems[4:]) == {"different": None, "one rhyme": None}
