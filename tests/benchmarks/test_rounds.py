"""The tales, their rule, the scripted people, and what the benchmark of rounds concludes."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import uvicorn

from benchmarks import at_the_page
from benchmarks.at_the_page import check_code, looks, started, tail
from benchmarks.rankers import GRADES, Noise, Ranker, in_order, plain, ranked
from benchmarks.rounds import ANSWERS_EACH, DIFFERENCES, WRITERS, estimate, is_shown, table
from benchmarks.tales import NOUNS, TOPIC_OF, question, questions, rule, tale, write_data
from cluster.page.app import make_app
from cluster.serve import free_port
from configs.desk import DeskConfig
from requirements.steps import StepFailed
from rlhf.desk.desk import Desk
from rlhf.records import Answer, AnswerGroup, Message, Prompt

SEA = question("sea", "Ann", "Monday")
EXACT = Noise(std=0.0, margin=0.0, swaps=0.0)
GOOD = "the old whale finds the wide harbour . the red sailor sees the small wave . the shy anchor likes the gull ."


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (GOOD, 1.0),
        ("the old whale finds the wide harbour .", 1 / 3),  # one sentence: 1 - 2/3
        ("the old whale finds the wide cow . the hen sees the barn .", 1 / 4 * 2 / 3),
        ("the whale finds the whale . " * 3, 1 / 6),  # one noun, six times
        (GOOD.removesuffix(" ."), 6 / 6 * 2 / 3 / 2),  # two whole sentences, and no end
        (GOOD + " the net sees the tide . " * 3, 0.0),  # six sentences
        ("whale .", 1 / 2 * 1 / 3),  # a sentence has two nouns
        ("", 0.0),
        ("the old .", 0.0),
        ("whale harbour sailor", 0.0),
    ],
)
def test_the_rule_counts_fitting_nouns_and_sentences(told: str, expected: float) -> None:
    assert rule(SEA, told) == pytest.approx(expected)


def test_the_rule_knows_no_topic_where_none_is_asked_for() -> None:
    assert rule("Tell me of the seaside.", GOOD) == 0.0


def test_a_pure_tale_of_three_sentences_is_nearly_faultless_and_a_mixed_one_is_not() -> None:
    draw = random.Random(0)
    pure = [rule(SEA, tale("sea", 1.0, 3, draw)) for _ in range(100)]
    mixed = [rule(SEA, tale("sea", 0.35, 3, draw)) for _ in range(100)]
    assert sum(pure) / 100 > 0.7 > 0.4 > sum(mixed) / 100 > 0.2


def test_no_noun_is_of_two_topics_and_no_prompt_is_there_twice() -> None:
    assert len(TOPIC_OF) == sum(len(nouns.split()) for nouns in NOUNS.values())
    assert len(set(questions())) == len(questions())


def test_data_is_the_same_each_time(tmp_path: Path) -> None:
    write_data(tmp_path / "one", 20, 1)
    write_data(tmp_path / "two", 20, 1)
    for name in ("corpus", "pairs", "prompts"):
        first, second = ((tmp_path / folder / f"{name}.jsonl").read_bytes() for folder in ("one", "two"))
        assert first == second and first


def test_a_person_without_noise_ranks_by_the_rule() -> None:
    scores = {"A": 0.3, "B": 0.9, "C": 0.3, "D": 0.0, "E": 0.6}
    found = ranked(scores, EXACT, random.Random(0))
    assert found == {"good": [["B"], ["E"]], "fair": [["A"], ["C"]], "bad": [], "unusable": [["D"]]}
    assert in_order(found) == [["B"], ["E"], ["A"], ["C"], ["D"]]


def test_answers_that_seem_alike_are_tied() -> None:
    noise = Noise(std=0.0, margin=0.1, swaps=0.0)
    scores = {"A": 0.75, "B": 0.70, "C": 0.66, "D": 0.60}
    assert ranked(scores, noise, random.Random(0))["good"] == [
        ["A", "B", "C"],
        ["D"],
    ]  # of the tier's best, not its last


def test_who_always_swaps_puts_each_tier_behind_the_next() -> None:
    scores = {"A": 0.9, "B": 0.8, "C": 0.7}
    assert ranked(scores, Noise(0.0, 0.0, 1.0), random.Random(0))["good"] == [["B"], ["C"], ["A"]]


def test_noise_hangs_on_the_person_and_is_as_large_as_it_says() -> None:
    scores = {label: 0.05 * place for place, label in enumerate("ABCDEFGHIJ")}
    one, again, other = (in_order(ranked(scores, Noise(), random.Random(seed))) for seed in (1, 1, 2))
    assert one == again != other
    draw = random.Random(0)
    wrong = sum(
        [label for tier in in_order(ranked({"A": 0.4, "B": 0.3}, Noise(0.1, 0.0, 0.0), draw)) for label in tier]
        == ["B", "A"]
        for _ in range(2000)
    )
    assert wrong / 2000 == pytest.approx(0.24, abs=0.03)  # P(N(0, 2 · 0.1²) > 0.1)


def test_every_answer_is_ranked_once() -> None:
    draw = random.Random(3)
    for _ in range(50):
        found = ranked({label: draw.random() for label in "ABCDEFGHIJ"}, Noise(swaps=0.5), draw)
        assert sorted(label for tier in in_order(found) for label in tier) == list("ABCDEFGHIJ")
        assert tuple(found) == GRADES


def test_what_the_page_shows_is_read_as_it_was_written() -> None:
    assert plain('<p dir="auto">Tell Ann &amp; Ben of the sea.</p>\n') == "Tell Ann & Ben of the sea."


def row(low: float) -> dict[str, object]:
    """A seed's figures, with this lower end."""
    one = {"mean": 0.1, "low": low, "high": 0.2}
    people = {"num_rankings": 160, "agreement_tau": 0.7}
    return {
        "seed": 3,
        "num_prompts": 100,
        "answers_each": ANSWERS_EACH,
        "scores": {name: one for name in WRITERS},
        "differences": {f"{a} - {b}": one for a, b in DIFFERENCES},
        "people": {"rank": people, "rank-1": people},
        "reward": {"reward": {"accuracy": 0.8}, "reward-1": {"accuracy": 0.85}},
        "seconds": {"rounds": 300.0, "judging": 10.0},
    }


def test_only_an_interval_above_0_shows_it() -> None:
    assert is_shown(row(0.01)) and not is_shown(row(0.0)) and not is_shown(row(-0.01))
    assert "NOT SHOWN" in table([row(0.01), row(-0.01)])
    assert "+0.100 [+0.010, +0.200]" in table([row(0.01)]) and "160 (0.70)" in table([row(0.01)])


def test_an_interval_is_around_its_mean_and_the_same_each_time() -> None:
    numbers = torch.linspace(0, 1, 50)
    found = estimate(numbers, 1)
    assert found.low < found.mean < found.high and found == estimate(numbers, 1)


@contextmanager
def served(desk: Desk) -> Iterator[str]:
    """The page's address, served by a thread."""
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(make_app(desk, run="r"), port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server does not start"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


def group(prompt_id: str) -> AnswerGroup:
    """A question of the sea with three answers, the middle one best and the last one worst."""
    texts = ("the old whale sees the cow . the reef has the hen .", GOOD, "the")
    answers = tuple(Answer((i,), (-1.0,), "eos", 0, text) for i, text in enumerate(texts))
    return AnswerGroup(Prompt(prompt_id, (Message("user", SEA),), (1,)), answers)


def test_scripted_people_rank_at_the_page_until_the_quota_is_met(tmp_path: Path) -> None:
    with Desk(f"sqlite:///{tmp_path}/rankings.db", DeskConfig(quota=2, repeats=0)) as desk:
        desk.add_groups([group(name) for name in "abc"])
        tokens = [desk.invite(name) for name in ("Ada", "Bo", "Chen")]
        with served(desk) as url:
            people = [Ranker(url, token, rule, EXACT, token) for token in tokens]
            for person in people:
                person.start()
            while not desk.progress(0).complete:
                assert all(person.is_alive() for person in people), [person.problem for person in people]
                time.sleep(0.01)
            for person in people:
                person.stop()
                person.join()
        assert [person.problem for person in people] == [None] * 3
        assert sum(person.num_handed_in for person in people) == 6
        assert [one.tiers for one in desk.consensus(0)] == [((1,), (0,), (2,))] * 3
        said = desk.submissions()[0]
        assert said.verdict and said.verdict.grades == {0: "fair", 1: "good", 2: "unusable"} and said.time_ms == 9000


def test_who_has_no_token_is_refused_and_says_so(tmp_path: Path) -> None:
    with Desk(f"sqlite:///{tmp_path}/rankings.db") as desk, served(desk) as url:
        person = Ranker(url, "nobody's", rule, EXACT, "x")
        person.start()
        person.join()
    assert person.problem and "401" in person.problem


def test_a_command_that_fails_is_told_with_the_end_of_its_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with started(["annotate", tmp_path / "nothing"], log) as process:
        process.wait()
        with pytest.raises(StepFailed, match="There is no run"):
            check_code(process, log, "Opening the page")


def test_the_last_line_of_a_log_is_said_where_it_was_quiet_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log"
    log.write_text("one\ntwo\n\n")
    monkeypatch.setattr(at_the_page, "LOOK_S", 0.0)
    monkeypatch.setattr(at_the_page, "QUIET_S", -1.0)
    eyes = looks(log, time.monotonic() - 60)
    next(eyes)
    next(eyes)
    assert capsys.readouterr().out == "    60 s  two\n" and tail(log, 2) == "one\ntwo"
