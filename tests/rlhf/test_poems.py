"""Rules of verse: poems that everyone knows, what each rule sees in them, and what a broken one loses."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import RuleConfig
from rlhf.poems import (
    FORMS,
    TELLING,
    ask,
    asked_form,
    asked_title,
    clauses,
    form,
    is_well_formed,
    no_repeat,
    on_title,
    rhyme,
    well_formed,
)
from rlhf.records import Answer, AnswerGroup, Ended, Message, Prompt
from rlhf.rhymes import CLASS_OF, CLASSES, num_rhyming, rhyme_classes
from rlhf.rhymes import rhyme as rhyme_of
from rlhf.rules import RuleScorer

FIVE, SEVEN, FIVE_LONG, SEVEN_LONG = FORMS
NIGHT = "牀前明月光，疑是地上霜。\n舉頭望明月，低頭思故鄉。"  # 李白《靜夜思》
NIGHT_SIMPLIFIED = "床前明月光，疑是地上霜。\n举头望明月，低头思故乡。"
MAPLE = "月落烏啼霜滿天，江楓漁火對愁眠。\n姑蘇城外寒山寺，夜半鐘聲到客船。"  # 張繼《楓橋夜泊》
LUTE = (  # 李商隱《錦瑟》
    "錦瑟無端五十絃，一絃一柱思華年。\n莊生曉夢迷蝴蝶，望帝春心託杜鵑。\n"
    "滄海月明珠有淚，藍田日暖玉生煙。\n此情可待成追憶，只是當時已惘然。"
)
HEIGHT = (  # 杜甫《登高》: rhymed in the language of the Tang
    "風急天高猿嘯哀，渚清沙白鳥飛迴。\n無邊落木蕭蕭下，不盡長江滾滾來。\n"
    "萬里悲秋常作客，百年多病獨登臺。\n艱難苦恨繁霜鬢，潦倒新停濁酒杯。"
)


def wish(form=FIVE, title: str = "靜夜思") -> Prompt:
    return Prompt("p", (Message("user", ask(form, title)),), (1,))


def say(text: str, ended: Ended = "eos") -> Answer:
    return Answer((1,), (0.0,), ended, 0, text)


def test_a_prompt_gives_back_the_form_and_title_that_it_was_made_of():
    for wanted in FORMS:
        assert asked_form(ask(wanted, "春曉")) == wanted
        assert asked_title(ask(wanted, "春曉")) == "春曉"
    assert asked_form("請作七言絕句一首") == SEVEN
    assert asked_form("Write a poem.") is None
    assert asked_title("Write a poem.") == ""


def test_clauses_end_at_marks_and_at_line_ends():
    assert clauses(NIGHT) == ["牀前明月光", "疑是地上霜", "舉頭望明月", "低頭思故鄉"]
    assert clauses("君問歸期未有期？\n\n 「巴山夜雨」漲秋池") == ["君問歸期未有期", "巴山夜雨漲秋池"]
    assert clauses("甲，，乙。") == ["甲", "", "乙"]
    assert clauses(" \n") == []


@pytest.mark.parametrize(
    ("wanted", "title", "text"),
    [
        (FIVE, "靜夜思", NIGHT),
        (FIVE, "静夜思", NIGHT_SIMPLIFIED),
        (SEVEN, "楓橋夜泊", MAPLE),
        (SEVEN_LONG, "錦瑟", LUTE),
    ],
)
def test_poems_that_everyone_knows_are_well_formed(wanted, title: str, text: str):
    prompt, answer = wish(wanted, title), say(text)
    assert is_well_formed(prompt.text, text)
    assert (
        well_formed(prompt, answer) == form(prompt, answer) == rhyme(prompt, answer) == no_repeat(prompt, answer) == 1
    )
    assert all(form(wish(other), answer) < 1 for other in FORMS if other != wanted)


def test_a_cut_poem_is_not_well_formed():
    assert well_formed(wish(), say(NIGHT, "length")) == 0
    assert not is_well_formed(wish().text, NIGHT, ended=False)


@pytest.mark.parametrize(
    "text",
    [
        NIGHT.replace("疑是地上霜", "疑是地霜"),
        NIGHT.replace("疑是地上霜", "疑是 a上霜"),
        NIGHT.replace("低頭思故鄉", "低頭思故人"),
        NIGHT.replace("低頭思故鄉", "疑是地上霜"),
        NIGHT.replace("，", "，，"),
        NIGHT + "\n舉頭望明月，低頭思故鄉。",
        NIGHT.split("\n")[0],
        "",
        "Moonlight before my bed.",
    ],
)
def test_one_fault_is_enough_to_be_not_well_formed(text: str):
    assert not is_well_formed(wish().text, text)


def test_a_prompt_without_a_form_has_no_well_formed_answer():
    prompt = Prompt("p", (Message("user", "《靜夜思》"),), (1,))
    assert form(prompt, say(NIGHT)) == rhyme(prompt, say(NIGHT)) == well_formed(prompt, say(NIGHT)) == 0


def test_form_is_the_share_of_right_lengths_times_the_nearness_of_their_number():
    two = NIGHT.split("\n")[0]
    assert form(wish(), say(two)) == 2 / 4
    assert form(wish(FIVE_LONG), say(NIGHT)) == 4 / 8
    assert form(wish(), say(f"{NIGHT}\n{two}")) == 4 / 6
    assert form(wish(), say(NIGHT.replace("疑是地上霜", "疑地上霜"))) == 3 / 4
    assert form(wish(), say(NIGHT.replace("疑是地上霜", "疑是地x霜"))) == 3 / 4
    assert form(wish(SEVEN), say(NIGHT)) == 0


def test_rhyme_counts_the_even_clauses_that_rhyme_with_another():
    # 迴 uei and 杯 ei are one class, 來 and 臺 ai another: one of three others rhymes.
    assert rhyme(wish(SEVEN_LONG), say(HEIGHT)) == 1 / 3
    assert rhyme(wish(SEVEN_LONG), say(LUTE)) == 1
    # 光 and 霜 rhyme, but only even clauses are asked.
    assert rhyme(wish(), say("牀前明月光，疑是地上人。\n舉頭望明霜，低頭思故鄉。")) == 0


def test_clauses_that_are_missing_do_not_rhyme_and_more_than_enough_must():
    assert rhyme(wish(FIVE_LONG), say(NIGHT)) == 1 / 3
    assert rhyme(wish(), say("疑是地上霜")) == 0
    assert rhyme(wish(), say(f"{NIGHT}\n白日依山盡，黃河入海流。")) == 1 / 2


def test_a_rhyme_word_that_comes_again_is_no_rhyme():
    assert rhyme(wish(), say(NIGHT.replace("故鄉", "故霜"))) == 0
    assert num_rhyming(["霜", "霜", "鄉"]) == 2


def test_every_final_is_in_one_class_and_readings_add_up():
    assert len(CLASS_OF) == sum(len(finals.split()) for finals in CLASSES.values())
    assert rhyme_classes("流") == rhyme_classes("秋") == rhyme_classes("舟") == {"油求"}
    assert rhyme_classes("知") == rhyme_classes("詞") == rhyme_classes("期") == rhyme_classes("雨") == {"一七"}
    assert rhyme_classes("心") == rhyme_classes("春") == {"人辰"}
    assert rhyme_classes("風") == rhyme_classes("庭") == {"中東"}
    assert rhyme_classes("斜") >= {"乜斜", "發花"}  # xié, and xiá beside 家 and 花
    assert rhyme_classes("a") == rhyme_classes("。") == rhyme_classes("") == frozenset()


def test_no_repeat_counts_clauses_and_characters():
    # 明, 月 and 頭 come twice: 17 of 20 characters are different.
    assert no_repeat(wish(), say(NIGHT), enough=1) == 17 / 20
    # 2 of 4 clauses, 10 of 20 characters.
    assert no_repeat(wish(), say("牀前明月光，疑是地上霜。\n" * 2)) == 0.5
    assert no_repeat(wish(), say("光光光光光，霜霜霜霜霜。")) == pytest.approx(2 / 10 / 0.8)
    assert no_repeat(wish(), say("...")) == 0


def test_on_title_takes_the_character_itself_or_one_that_tells_its_topic():
    assert on_title(wish(title="明月"), say(NIGHT), enough=1) == 1
    # 夜 is told by 月; neither 靜 nor 明 of the second answer is in the title's other characters.
    assert on_title(wish(title="靜夜"), say("明月"), enough=1) == 1 / 2
    assert on_title(wish(title="靜夜"), say("明月")) == 1
    assert on_title(wish(title="春"), say("楊柳")) == on_title(wish(title="春"), say("芳草")) == 1
    assert on_title(wish(title="松"), say("楊柳")) == 0


def test_what_a_title_says_of_the_kind_of_poem_does_not_count():
    assert on_title(wish(title="松詩二首"), say("松"), enough=1) == 1
    assert on_title(wish(title="松詩二首"), say("詩二首")) == 0
    assert on_title(wish(title="絕句"), say("絕句"), enough=1) == 1  # there is nothing else
    assert on_title(Prompt("p", (Message("user", "?"),), (1,)), say("松")) == 0


def test_topics_are_told_alike_in_both_scripts():
    assert "鶯" in TELLING["春"] and "莺" in TELLING["春"]
    assert TELLING["別"] == TELLING["别"]


@settings(deadline=None)
@given(
    asked=st.one_of(st.text(max_size=40), st.builds(ask, st.sampled_from(FORMS), st.text(max_size=8))),
    text=st.one_of(st.text(max_size=120), st.text("月花，。\n天\u3007a ", max_size=80)),
    ended=st.sampled_from(["eos", "length"]),
)
def test_every_rule_takes_every_text_and_stays_in_bounds(asked: str, text: str, ended: Ended):
    prompt, answer = Prompt("p", (Message("user", asked),), (1,)), say(text, ended)
    values = [rule(prompt, answer) for rule in (form, rhyme, no_repeat, on_title, well_formed)]
    assert all(0 <= value <= 1 for value in values)
    if values[-1]:
        assert values[0] == values[1] == ended.count("eos") == 1


def test_a_recipe_names_them_by_path():
    rules = [
        RuleConfig(name=f"rlhf.poems.{name}") for name in ("form", "rhyme", "no_repeat", "on_title", "well_formed")
    ]
    whole, cut = RuleScorer(rules).scores([AnswerGroup(wish(), (say(NIGHT), say("牀前明月光", "length")))]).tolist()
    assert whole == 1
    assert 0 < cut < 0.6


def test_a_rhyme_is_the_class_that_two_different_characters_share_at_least():
    assert rhyme_of(["霜", "鄉"]) == "江陽"
    assert rhyme_of(["霜", "人", "春", "天"]) == "人辰"
    assert rhyme_of(["霜", "霜"]) is None and rhyme_of(["霜", "人"]) is None and rhyme_of([]) is None
