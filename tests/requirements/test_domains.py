"""The data of the domain adapters: shared out without overlap, made once, and read by what trains on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from configs.load import load_recipe
from requirements import domains
from requirements.domains import ROOT, arithmetic_rows, shared_out, style_rows
from rlhf.conversations import Source, load_conversations
from rlhf.gym import score
from rlhf.records import Answer, Message, Prompt
from rlhf.sources import read_items

NUM_FILES = {"test": 100, "prompts": 320, "pairs": 3_200}


def entry(number: int) -> dict[str, Any]:
    metadata = {"source_dataset": "chain_sum", "difficulty": {"num_terms": (2, 2)}}
    return {"question": f"{number} + 1 =", "answer": str(number + 1), "metadata": metadata}


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder of its own, and sums that need no package."""
    data = tmp_path / "data"
    for name, value in {"ROOT": tmp_path, "DATA": data, "STAMP": data / "made.stamp", "MADE_OF": ("of",)}.items():
        monkeypatch.setattr(domains, name, value)
    monkeypatch.setattr(domains, "sums", lambda: [entry(number) for number in range(3_700)])
    (tmp_path / "of").write_text("1")
    return data


def test_no_key_is_shared_out_twice_and_order_and_repeats_do_not_count() -> None:
    items = [f"{number}" for number in range(20)]
    shared = shared_out([*items, *items], str, {"a": 5, "b": 10})
    assert [len(those) for those in shared.values()] == [5, 10]
    assert len({*shared["a"], *shared["b"]}) == 15
    assert shared_out(items[::-1], str, {"a": 5, "b": 10}) == shared
    with pytest.raises(AssertionError, match="20 different ones, 21 are asked for"):
        shared_out(items, str, {"a": 21})


def test_a_pair_is_question_and_answer_and_a_prompt_brings_its_entry() -> None:
    rows = arithmetic_rows([entry(number) for number in range(3)], {"test": 1, "pairs": 2})
    (asked,) = rows["test"]
    number = int(asked["prompt"].split()[0])
    assert asked == {"prompt": f"{number} + 1 =", "entry": entry(number)}
    assert [row["prompt"] for row in rows["pairs"]] != []
    assert all(int(row["completion"]) == int(row["prompt"].split()[0]) + 1 for row in rows["pairs"])
    assert asked["prompt"] not in {row["prompt"] for row in rows["pairs"]}


def test_real_sums_are_enough_and_their_answers_right_by_their_own_task() -> None:
    rows = arithmetic_rows(domains.sums())
    assert {use: len(those) for use, those in rows.items()} == NUM_FILES
    assert len({row["prompt"] for those in rows.values() for row in those}) == sum(NUM_FILES.values())
    asked = rows["test"][0]
    prompt = Prompt("p", (Message("user", asked["prompt"]),), (1,), {"entry": json.dumps(asked["entry"])})
    assert score(prompt, Answer((1,), (0.0,), "eos", 0, asked["entry"]["answer"])) == 1.0
    assert arithmetic_rows(domains.sums()) == rows


def test_the_style_has_pairs_enough_and_no_place_of_a_test_is_learned() -> None:
    rows = style_rows()
    assert {use: len(those) for use, those in rows.items()} == domains.NOTES
    prompts = {json.dumps(row["prompt"][1]) for those in rows.values() for row in those}
    assert len(prompts) == sum(domains.NOTES.values())


def test_pairs_that_the_recipes_rules_find_fault_with_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from requirements import notes

    good = list(notes.make_cases(0))[:2]
    bad = notes.Case("the Ash mill", good[0].passage, good[0].question, "It is so.", good[0].fact)
    monkeypatch.setattr(notes, "make_cases", lambda seed: [bad, *good])
    answers = {row["completion"] for row in style_rows({"pairs": 2})["pairs"]}
    assert answers == {case.answer for case in good}


def test_the_files_are_made_once_and_again_after_a_change(house: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert domains.main() == 0
    assert "arithmetic_pairs.jsonl: 3200 rows" in capsys.readouterr().out
    made = {path.name: path.read_bytes() for path in house.iterdir()}
    assert domains.main() == 0
    assert capsys.readouterr().out == ""
    (house.parent / "of").write_text("2")
    (house / "style_test.jsonl").unlink()
    assert domains.main() == 0
    again = {path.name: path.read_bytes() for path in house.iterdir()}
    assert again.pop("made.stamp") != made.pop("made.stamp")
    assert again == made


def test_a_missing_package_is_told_with_its_remedy(
    house: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing() -> list[dict[str, Any]]:
        raise ImportError("No module named 'reasoning_gym'")

    monkeypatch.setattr(domains, "sums", missing)
    assert domains.main() == 1
    told = capsys.readouterr().out
    assert "reasoning_gym" in told and "make setup" in told
    assert not (house / "made.stamp").exists()


def test_what_is_written_is_what_the_recipes_read(house: Path) -> None:
    assert domains.main() == 0
    for name in ("arithmetic", "style"):
        recipe = load_recipe(ROOT / "configs" / "recipes" / f"domain_{name}.yaml")
        (source,) = recipe.sft.sources
        assert (source.path, recipe.data.prompts) == (
            f"data/domains/{name}_pairs.jsonl",
            f"data/domains/{name}_prompts.jsonl",
        )
        pairs = load_conversations([Source(str(house / Path(source.path).name))], recipe.sft.held_out)
        assert pairs.num_duplicates == 0
        items = list(read_items((str(house / f"{name}_prompts.jsonl"), str(house / f"{name}_test.jsonl"))))
        learned = {pair.prompt[-1].content for pair in (*pairs.train, *pairs.held_out)}
        asked = [i.prompt if isinstance(i.prompt, str) else i.prompt[-1]["content"] for i in items]  # type: ignore[index]
        assert not learned & set(asked)
        assert all(("entry" if name == "arithmetic" else "fact") in item.extra for item in items)
    entries = [json.loads(item.extra["entry"]) for item in read_items(str(house / "arithmetic_test.jsonl"))]
    assert all(found["metadata"]["source_dataset"] == "chain_sum" for found in entries)
