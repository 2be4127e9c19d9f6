"""Rule rewards: what each prefers, that none is won by saying nothing, and what a broken one is told."""

import itertools
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import RuleConfig
from rlhf.errors import RecipeError, ScoreError
from rlhf.records import Answer, AnswerGroup, Ended, Message, Prompt
from rlhf.rules import (
    REGISTRY,
    RuleScorer,
    bind_rule,
    complete,
    contains,
    max_words,
    not_repetitive,
    on_question,
    short,
)
from rlhf.words import content_words, stem, words

QUESTION = "What is the capital of France?"


def ask(text: str = QUESTION, **extra: str) -> Prompt:
    return Prompt("0123456789abcdef", (Message("user", text),), (1, 2), extra)


def say(text: str, ended: Ended = "eos") -> Answer:
    return Answer((1,), (0.0,), ended, 0, text)


def config(name: str, weight: float = 1.0, **params: object) -> RuleConfig:
    return RuleConfig(name=name, weight=weight, params=params)


DEMO = [config("complete"), config("short"), config("on_question"), config("not_repetitive")]


def scores(rules: list[RuleConfig], *answers: Answer, prompt: Prompt | None = None, bad: str = "stop") -> list[float]:
    scorer = RuleScorer(rules, bad)  # type: ignore[arg-type]
    return scorer.scores([AnswerGroup(prompt or ask(), answers)]).tolist()


def test_complete_is_whether_the_answer_ended_by_itself():
    assert complete(ask(), say("Paris.")) == 1
    assert complete(ask(), say("Paris", "length")) == 0


def test_short_is_a_half_at_its_target_and_falls_with_every_word():
    values = [short(ask(), say("word " * num), target=10) for num in range(1, 200)]
    assert values[9] == 0.5
    assert values[19] == pytest.approx(1 / 5)
    assert all(a > b for a, b in itertools.pairwise(values))


def test_on_question_wants_the_questions_words_and_new_ones():
    answered = on_question(ask(), say("The capital of France is Paris."))
    copied = on_question(ask(), say(QUESTION))
    off = on_question(ask(), say("Bananas grow in warm places."))
    # {capital, france, paris}: both words taken up, one of three is new.
    assert answered == pytest.approx(2 / 3)
    assert copied == 0
    assert off == 0


def test_on_question_sees_through_endings():
    prompt = ask("Which countries produced movies?")
    assert on_question(prompt, say("A country producing a movie: India, Nigeria, Egypt.")) == 1


def test_on_question_without_content_words_asks_for_newness_only():
    assert on_question(ask("What is it?"), say("A lamp.")) == 1


def test_not_repetitive_counts_ngrams_and_lines():
    assert not_repetitive(ask(), say("a b c d e")) == 1
    # a b c a b c a b c: 7 trigrams, 3 of them different.
    assert not_repetitive(ask(), say("a b c a b c a b c")) == pytest.approx(3 / 7)
    assert not_repetitive(ask(), say("Yes.\nNo.\nYes.\nYes.")) == 0.5
    assert not_repetitive(ask(), say("Paris")) == 1


def test_contains_looks_for_a_text_or_for_a_field_of_the_row():
    assert contains(ask(), say("It is PARIS."), text="paris") == 1
    assert contains(ask(answer="Paris"), say("It is paris."), field="answer") == 1
    assert contains(ask(answer="Rome"), say("It is paris."), field="answer") == 0


def test_max_words_is_flat_up_to_the_limit():
    assert max_words(ask(), say("a b c"), limit=3) == 1
    assert max_words(ask(), say("a b c d e f"), limit=3) == 0.5


def test_matches_takes_a_regular_expression():
    assert scores([config("matches", pattern=r"^\d+$")], say("42"), say("42 or so")) == [1, 0]


def test_the_demos_preference_orders_answers_as_a_person_would():
    good, long_, cut, looping, copy, empty = scores(
        DEMO,
        say("The capital of France is Paris."),
        say("The capital of France is Paris. " + " ".join(f"Fact{i} about it." for i in range(40))),
        say("The capital of France is", "length"),
        say("The capital of France is Paris. " * 8),
        say(QUESTION),
        say(""),
    )
    assert good > max(long_, cut, looping, copy)
    assert min(long_, cut, looping, copy) > empty == 0


@pytest.mark.parametrize("empty", ["", " \n", "...", "!?", "\N{GRINNING FACE}"])
def test_an_answer_without_words_never_wins_whatever_the_weights(empty: str):
    avoid = [config("contains", weight=-1, text="sorry"), config("short", weight=0.5), config("matches", pattern=".*")]
    nothing, worst = scores(avoid, say(empty), say("sorry " * 400))
    assert nothing <= worst
    assert nothing == pytest.approx(-1 / 2.5)


@settings(deadline=None)
@given(
    text=st.text(max_size=200),
    ended=st.sampled_from(["eos", "length"]),
    weights=st.lists(st.floats(-5, 5), min_size=4, max_size=4).filter(lambda w: sum(map(abs, w)) > 1e-6),
)
def test_scores_are_bounded_and_the_same_each_time(text: str, ended: Ended, weights: list[float]):
    rules = [config(rule.name, weight) for rule, weight in zip(DEMO, weights, strict=True)]
    (first,) = scores(rules, say(text, ended))
    assert -1.000001 <= first <= 1.000001
    if min(weights) >= 0:
        assert first >= 0
    assert scores(rules, say(text, ended)) == [first]


def test_a_score_is_the_weighted_mean():
    assert scores([config("complete", 3), config("max_words", 1, limit=1)], say("a b c d")) == [(3 * 1 + 0.25) / 4]


def test_parts_tell_what_each_rule_gave():
    assert RuleScorer([config("complete"), config("max_words", limit=1)]).parts(ask(), say("a b")) == {
        "complete": 1.0,
        "max_words": 0.5,
    }


def test_an_unknown_rule_is_told_the_nearest():
    with pytest.raises(RecipeError, match=r"no rule 'shrot'. Did you mean 'short'\?.*There are complete, contains"):
        RuleScorer([config("shrot")])


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        (config("short", goal=3), r"'goal'.*It takes target"),
        (config("short", target="many"), r"target='many'.*integer"),
        (config("short", target=0), r"target=0.*greater than 0"),
        (config("matches"), "missing a required argument: 'pattern'"),
        (config("matches", pattern="("), r"pattern='\('.*regular expression"),
        (config("on_question", enough=2), "enough=2"),
    ],
)
def test_wrong_parameters_are_told_before_anything_runs(rule: RuleConfig, told: str):
    with pytest.raises(RecipeError, match=told):
        bind_rule(rule)


def test_weights_that_are_all_zero_are_refused():
    with pytest.raises(RecipeError, match="all their weights are 0"):
        RuleScorer([config("short", 0)])


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A module of the user's in the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "own_rules.py").write_text(
        "calls = []\n"
        "def shouting(prompt, answer, factor: float = 1.0):\n"
        "    return factor * answer.text.isupper()\n"
        "def breaks(prompt, answer):\n"
        "    raise KeyError('gold')\n"
        "def not_a_number(prompt, answer):\n"
        "    return float('nan')\n"
        "def words(prompt, answer):\n"
        "    return 'many'\n"
        "def picky(prompt, answer):\n"
        "    if 'bad' in answer.text:\n"
        "        raise ValueError('bad answer')\n"
        "    return 1.0\n"
        "def flaky(prompt, answer):\n"
        "    calls.append(1)\n"
        "    if len(calls) < 3:\n"
        "        raise TimeoutError('busy')\n"
        "    return 0.5\n"
        "constant = 3\n"
    )
    yield
    sys.modules.pop("own_rules", None)


@pytest.mark.parametrize("path", ["own_rules.shouting", "own_rules:shouting"])
def test_a_rule_of_ones_own_is_found_by_its_path(own, path: str):
    assert scores([config(path, factor=0.5)], say("PARIS"), say("Paris")) == [0.5, 0]


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("own_rules.absent", "cannot be imported: AttributeError"),
        ("no_such_module.rule", "cannot be imported: ModuleNotFoundError"),
        ("own_rules.constant", "is a int"),
    ],
)
def test_a_path_that_leads_to_no_rule_is_told(own, path: str, told: str):
    with pytest.raises(RecipeError, match=told):
        bind_rule(config(path))


@pytest.mark.parametrize(
    ("path", "told"), [("breaks", "KeyError: 'gold'"), ("not_a_number", "returned nan"), ("words", "ValueError")]
)
def test_a_rule_that_fails_stops_the_run_and_is_named_with_the_prompt(own, path: str, told: str):
    with pytest.raises(ScoreError, match=rf"own_rules\.{path}.*0123456789abcdef.*capital of France.*{told}"):
        scores([config(f"own_rules.{path}")], say("Paris"))


def test_drop_makes_the_score_of_the_failed_answer_nan_and_of_no_other(own):
    one, two = scores([config("own_rules.picky"), config("complete")], say("good"), say("bad"), bad="drop")
    assert one == 1
    assert two != two


def test_retry_tries_three_times(own):
    assert scores([config("own_rules.flaky")], say("Paris"), bad="retry") == [0.5]
    with pytest.raises(ScoreError, match="KeyError"):
        scores([config("own_rules.breaks")], say("Paris"), bad="retry")


def test_every_rule_of_the_house_is_documented():
    assert all(function.__doc__ for function in REGISTRY.values())


def test_words_count_ideographs_one_by_one():
    assert words("我喜欢 cats, don't you?") == ["我", "喜", "欢", "cats", "don't", "you"]
    assert words("...") == []


@pytest.mark.parametrize(
    "family",
    ["run runs running", "country countries", "movie movies", "try tries tried", "make makes making", "box boxes"],
)
def test_words_of_a_family_share_a_stem(family: str):
    assert len({stem(word) for word in family.split()}) == 1


def test_content_words_leave_common_ones_out():
    assert content_words("What is the capital of France's?") == {stem("capital"), stem("france")}
