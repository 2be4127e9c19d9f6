"""Conversations from files: what is read, how often an epoch sees it, and how it is split."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from configs.schema import DataConfig
from rlhf.chat import ChatTokenizer
from rlhf.conversations import Conversations, Source, load_conversations
from rlhf.data import load_prompts
from rlhf.errors import DataError
from rlhf.records import Message


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def pair(question: object, answer: str = "Because.") -> dict[str, object]:
    return {"prompt": question, "completion": answer}


def numbered(num: int) -> list[dict[str, object]]:
    return [pair(f"Question {number}?") for number in range(num)]


def load(*paths: Path, held_out: float = 0, **options: str) -> Conversations:
    return load_conversations([Source(str(path)) for path in paths], held_out, **options)


def questions(found: Conversations) -> list[str]:
    return [next(m.content for m in c.messages if m.role == "user") for c in (*found.train, *found.held_out)]


def test_every_kind_of_file_and_globs_are_read(tmp_path: Path):
    write(tmp_path / "a1.jsonl", pair("one"), "")
    write(tmp_path / "a2.jsonl", {"instruction": "two", "output": "2"})
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(json.dumps(pair("three")).encode()))
    (tmp_path / "c.json").write_text("\ufeff" + json.dumps([pair("four"), pair("five")], indent=2), encoding="utf-8")
    turns = [{"role": "user", "content": "six"}, {"role": "assistant", "content": "6"}]
    pyarrow.parquet.write_table(pyarrow.table({"messages": [turns], "level": [2]}), tmp_path / "d.parquet")
    found = load(tmp_path / "a*.jsonl", tmp_path / "b.jsonl.gz", tmp_path / "c.json", tmp_path / "d.parquet")
    assert sorted(questions(found)) == ["five", "four", "one", "six", "three", "two"]
    places = {c.where.removeprefix(f"{tmp_path}/"): c.extra for c in found.train}
    assert set(places) == {
        "a1.jsonl, line 1",
        "a2.jsonl, line 1",
        "b.jsonl.gz, line 1",
        "c.json, row 1",
        "c.json, row 2",
        "d.parquet, row 1",
    }
    assert places["d.parquet, row 1"] == {"level": "2"}


def test_duplicates_are_left_out_across_formats_and_counted(tmp_path: Path):
    a = write(tmp_path / "a.jsonl", pair("x"), pair("x"), pair("x", "Another answer."))
    b = write(tmp_path / "b.jsonl", {"instruction": "x", "output": "Because."})
    found = load(a, b)
    assert (len(found.train), found.num_duplicates) == (2, 2)


def test_the_system_message_stands_before_conversations_that_have_none(tmp_path: Path):
    own = [{"role": "system", "content": "Mine."}, {"role": "user", "content": "b"}]
    longer = [{"role": r, "content": c} for r, c in (("user", "c"), ("assistant", "d"), ("user", "e"))]
    found = load(write(tmp_path / "a.jsonl", pair("a"), pair(own), pair(longer)), system="Be brief.")
    assert {c.messages[1].content: (c.messages[0].content, c.num_given) for c in found.train} == {
        "a": ("Be brief.", 0),
        "b": ("Mine.", 0),
        "c": ("Be brief.", 4),
    }
    assert {c.messages[1].content: len(c.prompt) for c in found.train} == {"a": 2, "b": 2, "c": 4}


def test_the_split_depends_neither_on_order_nor_on_other_conversations(tmp_path: Path):
    rows = numbered(200)
    a, b = write(tmp_path / "a.jsonl", *rows[:120]), write(tmp_path / "b.jsonl", *rows[:119:-1])
    c = write(tmp_path / "c.jsonl", *rows[::-1])
    whole, turned, half = load(a, b, held_out=0.25), load(c, held_out=0.25), load(a, held_out=0.25)
    assert [x.messages for x in whole.train] == [x.messages for x in turned.train]
    assert [x.messages for x in whole.held_out] == [x.messages for x in turned.held_out]
    assert 30 <= len(whole.held_out) <= 70
    assert {x.id for x in half.train} <= {x.id for x in whole.train}
    assert {x.id for x in half.held_out} <= {x.id for x in whole.held_out}


def test_all_answers_to_one_prompt_lie_on_one_side(tmp_path: Path):
    rows = [pair(f"Question {number}?", f"Answer {other}") for number in range(40) for other in range(5)]
    found = load(write(tmp_path / "a.jsonl", *rows), held_out=0.3)
    train, held_out = ({c.prompt for c in side} for side in (found.train, found.held_out))
    assert not train & held_out
    assert (len(train) + len(held_out), len(found.train) + len(found.held_out)) == (40, 200)


def test_a_prompt_is_held_out_here_as_it_is_for_ppo(tiny_model: Path, tmp_path: Path):
    path = write(tmp_path / "a.jsonl", *numbered(60))
    prompts = load_prompts(DataConfig(prompts=str(path), held_out=0.3), ChatTokenizer(tiny_model))
    found = load(path, held_out=0.3)
    assert {c.prompt for c in found.held_out} == {prompt.messages for prompt in prompts.held_out}


@pytest.mark.parametrize(("num", "sizes"), [(1, (1, 0)), (2, (1, 1))])
@pytest.mark.parametrize("share", [0.001, 0.999, 1.0])
def test_small_data_still_has_both_sides(tmp_path: Path, num: int, sizes: tuple[int, int], share: float):
    found = load(write(tmp_path / "a.jsonl", *numbered(num)), held_out=share)
    assert (len(found.train), len(found.held_out)) == sizes


def test_a_weight_says_how_often_an_epoch_sees_a_source(tmp_path: Path):
    paths = [
        write(tmp_path / f"{name}.jsonl", *(pair(f"{name} {n}?") for n in range(400))) for name in ("half", "two", "x")
    ]
    sources = [Source(str(path), weight) for path, weight in zip(paths, (0.5, 2.0, 1.25), strict=True)]
    found = load_conversations(sources, 0.0)
    seen = Counter(questions(found))
    half = [n for question, n in seen.items() if question.startswith("half")]
    assert 160 <= len(half) <= 240 and set(half) == {1}
    assert Counter(n for q, n in seen.items() if q.startswith("two")) == {2: 400}
    more = Counter(n for q, n in seen.items() if q.startswith("x"))
    assert set(more) == {1, 2} and 70 <= more[2] <= 130
    assert found == load_conversations(sources[::-1], 0.0)


def test_held_out_conversations_are_seen_once_whatever_the_weight(tmp_path: Path):
    found = load_conversations([Source(str(write(tmp_path / "a.jsonl", *numbered(50))), 3.0)], 0.4)
    assert len(found.held_out) == len({c.id for c in found.held_out})
    assert len(found.train) == 3 * (50 - len(found.held_out))
    assert not {c.id for c in found.train} & {c.id for c in found.held_out}


def test_a_conversation_of_two_sources_has_the_greater_weight(tmp_path: Path):
    a, b = (str(write(tmp_path / f"{name}.jsonl", pair("x"))) for name in "ab")
    for sources in ([Source(a, 1.0), Source(b, 2.0)], [Source(b, 2.0), Source(a, 1.0)]):
        assert len(load_conversations(sources, 0.0).train) == 2


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_that_is_no_number_above_0_is_refused(tmp_path: Path, weight: float):
    with pytest.raises(DataError, match=f"has the weight {weight}.*above 0"):
        load_conversations([Source(str(write(tmp_path / "a.jsonl", pair("x"))), weight)], 0.0)


def test_weights_that_choose_nothing_are_told(tmp_path: Path):
    with pytest.raises(DataError, match=r"hold 1 conversations, and their weights choose none.*At least 1"):
        load_conversations([Source(str(write(tmp_path / "a.jsonl", pair("x"))), 1e-18)], 0.0)


def test_formats_that_are_mixed_in_a_file_are_both_named_with_their_lines(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", "", pair("x"), pair("y"), {"instruction": "z", "output": "z"})
    with pytest.raises(
        DataError, match=r"a\.jsonl mixes formats: prompt\+completion \(line 2\) and instruction/input/output \(line 4"
    ):
        load(path)


def test_a_bad_row_is_told_with_file_and_line(tmp_path: Path):
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: .*no assistant turn"):
        load(write(tmp_path / "a.jsonl", pair("x"), {"messages": [{"role": "user", "content": "y"}]}))


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.jsonl", b'{"prompt": "a", "completion": "b"}\n{"prompt"', "line 2: not valid JSON.*Mend or remove"),
        ("a.jsonl", b'{"prompt": "\xff"}', "line 1: not UTF-8"),
        ("a.jsonl", b"[" * 100_000, "line 1: .*deeper than.*Mend or remove"),
        ("a.json", b"[" * 100_000, "deeper than.*one list of rows"),
        ("a.json", b'[\n{"prompt": "a",\n}]', "line 3: not valid JSON.*one list of rows"),
        ("a.json", b'{"prompt": "a"}\n{"prompt": "b"}\n', r"line 2: not valid JSON.*Name it \.jsonl"),
        ("a.json", b'{"data": []}', "holds a dict with data.*one list of rows"),
        ("a.json", b"[\xff]", "cannot be read"),
        ("a.jsonl.gz", gzip.compress(b'{"prompt": "a", "completion": "b"}\n' * 50, mtime=0)[:30], "line 1"),
        ("a.jsonl.gz", gzip.compress(b'{"prompt"', mtime=0)[:10] + b"\xff" * 20, "line 1"),
        ("a.parquet", b"PAR1", "cannot be read"),
        ("a.csv", b"prompt", r"Known are \.jsonl, \.jsonl\.gz, \.json, \.parquet"),
    ],
)
def test_a_file_that_cannot_be_read_is_told_with_its_name(tmp_path: Path, name: str, content: bytes, told: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"(?s){name}.*{told}"):
        load(tmp_path / name)


@pytest.mark.parametrize(("name", "content"), [("a.jsonl", ""), ("a.jsonl", "\n\n"), ("a.json", "[]")])
def test_an_empty_data_set_is_refused(tmp_path: Path, name: str, content: str):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=r"hold no conversation.*At least 1.*messages, prompt\+completion"):
        load(tmp_path / name)


def test_a_source_that_matches_nothing_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"\*\.jsonl' matches no file"):
        load(tmp_path / "*.jsonl")


def test_messages_are_records(tmp_path: Path):
    assert load(write(tmp_path / "a.jsonl", pair("x"))).train[0].messages == (
        Message("user", "x"),
        Message("assistant", "Because."),
    )
