"""What the benchmark of the domain adapters concludes from scores, answers and hashes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.domains import (
    ANSWER_TOKENS,
    DOMAINS,
    WRITERS,
    differences,
    first_hashes,
    hashes,
    is_shown,
    names_value,
    shares,
    table,
    write_all,
)
from rlhf.chat import ChatTokenizer
from rlhf.records import Answer, AnswerGroup, Message, Prompt


def scores(**means: tuple[float, float]) -> dict[str, dict[str, torch.Tensor]]:
    """40 prompts; of each writer its scores in both domains, a little up and down."""
    wobble = torch.linspace(-0.01, 0.01, 40)
    of = {name.replace("_", " "): pair for name, pair in means.items()}
    arithmetic, style = DOMAINS
    return {
        w: {arithmetic: of[w][0] + wobble, style: of[w][1] + wobble.roll(number)} for number, w in enumerate(WRITERS)
    }


def group(text: str, **extra: str) -> AnswerGroup:
    prompt = Prompt("p", (Message("user", "12 + 30 ="),), (1,), extra)
    return AnswerGroup(prompt, (Answer((1,), (0.0,), "eos", 0, text),))


GOOD = {
    "base": (0.1, 0.5),
    "arithmetic_after_SFT": (0.7, 0.3),
    "arithmetic": (0.8, 0.3),
    "style": (0.0, 0.9),
}


def test_each_adapter_must_be_better_at_home_than_the_base_and_the_other() -> None:
    found = differences(scores(**GOOD))
    assert is_shown(found)
    assert found["arithmetic", "base", "arithmetic"].mean == pytest.approx(0.7, abs=1e-6)
    assert found["style", "arithmetic", "style"].mean == pytest.approx(0.6, abs=1e-6)
    assert found["arithmetic", "arithmetic after SFT", "arithmetic"].mean == pytest.approx(0.1, abs=1e-6)


@pytest.mark.parametrize(
    ("writer", "means"),
    [("base", (0.8, 0.5)), ("base", (0.1, 0.9)), ("style", (0.8, 0.9)), ("arithmetic", (0.8, 0.95))],
)
def test_an_adapter_that_is_not_surely_better_shows_nothing(writer: str, means: tuple[float, float]) -> None:
    assert not is_shown(differences(scores(**(GOOD | {writer: means}))))


def test_ppo_that_gains_nothing_over_sft_is_told_and_not_judged() -> None:
    assert is_shown(differences(scores(**(GOOD | {"arithmetic_after_SFT": (0.8, 0.3)}))))


@pytest.mark.parametrize(
    ("text", "wanted", "expected"),
    [
        ("12 + 30 = 42.", "42", True),
        ("42", "42", True),
        ("142", "42", False),
        ("42.5", "42", False),
        ("-42", "42", False),
        ("It is -42.", "-42", True),
    ],
)
def test_a_number_is_named_as_a_number_of_its_own(text: str, wanted: str, expected: bool) -> None:
    assert names_value(group(text, entry=json.dumps({"answer": wanted}))) is expected


def test_a_fact_is_named_whatever_the_case() -> None:
    assert names_value(group("Ada marsh does.", fact="Ada Marsh"))
    assert not names_value(group("Ada Marshall does.", fact="Ada Marsh"))


def test_the_table_has_a_line_for_each_writer_and_domain() -> None:
    answers = {writer: {name: [group("It is 42.", fact="42")] * 40 for name in DOMAINS} for writer in WRITERS}
    text = table(scores(**GOOD), answers)
    assert [text.count(f"\n{writer:24}") for writer in WRITERS] == [2, 2, 2, 2]
    assert " 0.800 " in text and "'It is 42.'" in text
    assert shares(torch.tensor([1.0, 0.5]), [group("42", fact="42"), group("41", fact="42")]) == {
        "faultless": 0.5,
        "named": 0.5,
        "ended": 1.0,
    }


def test_answers_that_are_written_side_by_side_are_those_of_each_alone(tiny_model: Path) -> None:
    chat = ChatTokenizer(tiny_model)
    prompts = [chat.prompt((Message("user", text),)) for text in ("sun", "What is a stone in a river?", "Say moon 3")]
    written = write_all("base", tiny_model, chat, None, {"style": prompts})["style"]
    alone = [write_all("base", tiny_model, chat, None, {"style": [prompt]})["style"][0] for prompt in prompts]
    assert [g.answers[0].token_ids for g in written] == [g.answers[0].token_ids for g in alone]
    assert [g.prompt for g in written] == prompts
    for one in written:
        ids, ended = one.answers[0].token_ids, one.answers[0].ended
        assert len(ids) == ANSWER_TOKENS if ended == "length" else ids[-1] in chat.eos_ids
        assert not chat.eos_ids & set(ids[:-1])


def test_the_first_hashes_are_kept_and_a_changed_byte_is_seen(tmp_path: Path) -> None:
    model, folder = tmp_path / "model", tmp_path / "runs"
    (model / "part").mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (model / "part" / "weights").write_bytes(b"1")
    before = first_hashes(model, folder)
    assert list(before) == ["config.json", "part/weights"]
    (model / "part" / "weights").write_bytes(b"2")
    assert first_hashes(model, folder) == before
    assert hashes(model)["part/weights"] != before["part/weights"]
