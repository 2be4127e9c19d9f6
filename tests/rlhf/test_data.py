"""Prompts from files: what is read, how it is split, in which order it comes, and what each bad row is told."""

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from configs.schema import DataConfig
from rlhf.chat import ChatTokenizer
from rlhf.conversations import Source, load_conversations
from rlhf.data import Prompts, PromptStream, load_prompts
from rlhf.errors import DataError, ModelError
from rlhf.records import Message
from tests.rlhf.test_chat import tokenizer_with


@pytest.fixture(scope="module")
def chat(tiny_model: Path) -> ChatTokenizer:
    return ChatTokenizer(tiny_model)


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def load(chat: ChatTokenizer, prompts: str | Path | tuple[str, ...], **config: object) -> Prompts:
    prompts = prompts if isinstance(prompts, tuple) else str(prompts)
    return load_prompts(DataConfig.model_validate({"prompts": prompts, "held_out": 0} | config), chat)


def texts(prompts: Prompts) -> set[str]:
    return {prompt.text for prompt in prompts.train + prompts.held_out}


def numbered(num: int) -> list[dict[str, str]]:
    return [{"prompt": f"Question {number}?"} for number in range(num)]


def test_jsonl_holds_texts_or_messages_and_keeps_other_fields(chat: ChatTokenizer, tmp_path: Path):
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Why?"},
    ]
    rows = [{"prompt": "One", "gold": 3, "tags": ["a"], "none": None, "note": "x"}, "", {"prompt": turns}]
    found = {prompt.text: prompt for prompt in load(chat, write(tmp_path / "p.jsonl", *rows)).train}
    assert found["One"].extra == {"gold": "3", "tags": '["a"]', "note": "x"}
    assert found["One"].messages == (Message("user", "One"),)
    assert [message.role for message in found["Why?"].messages] == ["system", "user", "assistant", "user"]


def test_gzip_parquet_globs_and_several_sources_are_read(chat: ChatTokenizer, tmp_path: Path):
    write(tmp_path / "a1.jsonl", {"prompt": "one"})
    write(tmp_path / "a2.jsonl", {"prompt": "two"})
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "three"}\n'))
    table = pyarrow.table({"prompt": [[{"role": "user", "content": "four"}]], "level": [2]})
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet")
    sources = (str(tmp_path / "a*.jsonl"), str(tmp_path / "b.jsonl.gz"), str(tmp_path / "c.parquet"))
    prompts = load(chat, sources)
    assert texts(prompts) == {"one", "two", "three", "four"}
    assert next(p for p in prompts.train if p.text == "four").extra == {"level": "2"}


def test_the_corpus_package_gives_about_390_different_questions(chat: ChatTokenizer):
    prompts = load(chat, "chatterbot:coding,trivia,science,computers", held_out=0.3)
    assert len(prompts.train) + len(prompts.held_out) == 390
    assert len(prompts.held_out) >= 100
    assert set(prompts.train[0].extra) == {"source", "answer"}


def test_an_unknown_part_of_the_corpus_is_told_the_nearest(chat: ChatTokenizer):
    with pytest.raises(DataError, match=r"no part 'trivea'.*Did you mean trivia\?"):
        load(chat, "chatterbot:coding,trivea")


def test_duplicates_are_left_out_and_counted(chat: ChatTokenizer, tmp_path: Path):
    prompts = load(chat, write(tmp_path / "p.jsonl", *numbered(3), *numbered(2)))
    assert len(prompts.train) == 3
    assert prompts.num_duplicates == 2


def test_the_system_message_of_the_recipe_stands_before_prompts_that_have_none(chat: ChatTokenizer, tmp_path: Path):
    own = [{"role": "system", "content": "Mine."}, {"role": "user", "content": "b"}]
    prompts = load(chat, write(tmp_path / "p.jsonl", {"prompt": "a"}, {"prompt": own}), system="Be brief.")
    assert {p.text: p.messages[0].content for p in prompts.train} == {"a": "Be brief.", "b": "Mine."}


def test_the_split_depends_neither_on_order_nor_on_other_prompts(chat: ChatTokenizer, tmp_path: Path):
    rows = numbered(200)
    whole = load(chat, write(tmp_path / "a.jsonl", *rows), held_out=0.25)
    turned = load(chat, write(tmp_path / "b.jsonl", *rows[::-1]), held_out=0.25)
    half = load(chat, write(tmp_path / "c.jsonl", *rows[:100]), held_out=0.25)
    assert turned == whole
    assert 30 <= len(whole.held_out) <= 70
    assert set(p.id for p in half.held_out) <= set(p.id for p in whole.held_out)
    assert set(p.id for p in half.train) <= set(p.id for p in whole.train)


def test_a_smaller_limit_takes_some_of_what_a_larger_one_takes(chat: ChatTokenizer, tmp_path: Path):
    path = write(tmp_path / "p.jsonl", *numbered(100))
    few, more = (load(chat, path, held_out=0.3, limit=limit) for limit in (20, 60))
    assert len(few.train) + len(few.held_out) == 20
    assert texts(few) < texts(more)
    assert 2 <= len(few.held_out) <= 12


@pytest.mark.parametrize(("num", "sizes"), [(1, (1, 0)), (2, (1, 1))])
def test_small_data_still_has_both_sides(chat: ChatTokenizer, tmp_path: Path, num: int, sizes: tuple[int, int]):
    for share in (0.001, 0.999, 1.0):
        prompts = load(chat, write(tmp_path / "p.jsonl", *numbered(num)), held_out=share)
        assert (len(prompts.train), len(prompts.held_out)) == sizes


def test_a_malformed_line_is_told_with_file_and_line(chat: ChatTokenizer, tmp_path: Path):
    path = write(tmp_path / "p.jsonl", {"prompt": "a"}, '{"prompt": "b"', {"prompt": "c"})
    with pytest.raises(DataError, match=r"p\.jsonl, line 2: not valid JSON"):
        load(chat, path)


def test_a_line_that_is_not_utf8_is_told_with_file_and_line(chat: ChatTokenizer, tmp_path: Path):
    (tmp_path / "p.jsonl").write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n')
    with pytest.raises(DataError, match=r"line 2: not UTF-8"):
        load(chat, tmp_path / "p.jsonl")


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"question": "a"}, r"no `prompt` \(found: question\)"),
        (["a"], "found: a list"),
        ({"prompt": None}, "no `prompt`"),
        ({"prompt": "  "}, "the prompt is empty"),
        ({"prompt": 3}, "`prompt` is 3"),
        ({"prompt": "\ud83d"}, "half a character"),
        ({"prompt": [{"role": "user", "content": "\ud83d"}]}, "half a character"),
        ({"prompt": []}, r"`prompt` is \[\]"),
        ({"prompt": [{"role": "tool", "content": "a"}]}, "message 1 is"),
        ({"prompt": [{"role": "user", "content": ["a"]}]}, "message 1 is"),
        ({"prompt": ["a"]}, "message 1 is 'a'"),
        (
            {"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            "last message is of the role assistant",
        ),
        (
            {"prompt": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]},
            "system message stands after the first place",
        ),
    ],
)
def test_a_row_without_a_usable_prompt_is_told_with_its_line(
    chat: ChatTokenizer, tmp_path: Path, row: object, told: str
):
    path = write(tmp_path / "p.jsonl", {"prompt": "fine"}, row)
    with pytest.raises(DataError, match=told) as caught:
        load(chat, path)
    assert "p.jsonl, line 2" in str(caught.value)


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_data_set_is_refused(chat: ChatTokenizer, tmp_path: Path, content: str):
    (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(DataError, match=r"holds no prompt.*At least 1"):
        load(chat, tmp_path / "p.jsonl")


def test_a_source_that_matches_nothing_is_refused(chat: ChatTokenizer, tmp_path: Path):
    with pytest.raises(DataError, match="matches no file"):
        load(chat, tmp_path / "*.jsonl")


def test_a_file_of_an_unknown_kind_is_refused(chat: ChatTokenizer, tmp_path: Path):
    with pytest.raises(DataError, match=r"Known are \.jsonl"):
        load(chat, write(tmp_path / "p.csv", "prompt"))


@pytest.mark.parametrize("name", ["p.jsonl.gz", "p.parquet"])
def test_a_damaged_archive_is_refused(chat: ChatTokenizer, tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(gzip.compress(b'{"prompt": "a"}\n' * 50)[:30])
    with pytest.raises(DataError, match=name):
        load(chat, tmp_path / name)


def test_a_system_message_in_a_field_of_its_own_gives_the_prompt_that_alignment_learns_from(
    chat: ChatTokenizer, tmp_path: Path
):
    rows = [{"prompt": f"a {n}", "completion": "b", "system": "Be brief."} for n in range(8)]
    path = write(tmp_path / "p.jsonl", *rows)
    prompts = load(chat, path, system="Be long.", held_out=0.4)
    assert prompts.train[0].messages[0] == Message("system", "Be brief.")
    learned = load_conversations([Source(str(path))], 0.4)
    assert {p.messages for p in prompts.held_out} == {c.prompt for c in learned.held_out}
    for system, prompt, told in (
        (" ", "a", "`system` is empty"),
        ([{"type": "text", "text": "Be brief."}], "a", "`system` is no text: .*Be brief"),
        ("Be brief.", [{"role": "system", "content": "b"}, {"role": "user", "content": "a"}], "another in `system`"),
    ):
        with pytest.raises(DataError, match=rf"q\.jsonl, line 1: .*{told}"):
            load(chat, write(tmp_path / "q.jsonl", {"prompt": prompt, "system": system}))


def test_prompts_that_are_too_long_are_refused_with_their_number(chat: ChatTokenizer, tmp_path: Path):
    path = write(tmp_path / "p.jsonl", {"prompt": "short"}, {"prompt": "x" * 100}, {"prompt": "y" * 90})
    with pytest.raises(DataError, match=r"2 of 3 prompts.*longest has 104 tokens.*max_prompt_tokens is 64"):
        load(chat, path, max_prompt_tokens=64)
    assert len(load(chat, path, max_prompt_tokens=104).train) == 3


def test_a_template_that_refuses_a_row_is_told_with_its_line(tmp_path: Path):
    deaf = "{% for m in messages if m['role'] != 'system' %}{{ m['content'] + eos_token }}{% endfor %}"
    chat = ChatTokenizer(tokenizer_with(tmp_path / "model", deaf))
    with pytest.raises(ModelError, match=r"p\.jsonl, line 1.*leaves out the system message"):
        load(chat, write(tmp_path / "p.jsonl", {"prompt": "a"}), system="Be brief.")


@pytest.fixture
def ten(chat: ChatTokenizer):
    return [chat.prompt([Message("user", str(number))]) for number in range(10)]


def test_an_epoch_hands_out_every_prompt_once_and_the_next_in_another_order(ten):
    stream = PromptStream(ten, seed=1)
    first, second = ([prompt.id for _ in range(5) for prompt in stream.take(2)] for _ in range(2))
    assert sorted(first) == sorted(second) == sorted(prompt.id for prompt in ten)
    assert first != second


def test_one_take_never_holds_a_prompt_twice(ten):
    stream = PromptStream(ten, seed=1)
    for _ in range(50):
        assert len({prompt.id for prompt in stream.take(7)}) == 7


def test_the_order_hangs_on_the_seed_alone(ten):
    assert PromptStream(ten, 1).take(10) == PromptStream(ten, 1).take(10) != PromptStream(ten, 2).take(10)


@pytest.mark.parametrize("steps", [0, 1, 3, 4, 7])
def test_a_stream_goes_on_where_its_state_was_taken(ten, steps: int):
    undisturbed, stopped, resumed = (PromptStream(ten, 5) for _ in range(3))
    for _ in range(steps):
        undisturbed.take(3)
        stopped.take(3)
    resumed.load_state(json.loads(json.dumps(stopped.state())))
    for _ in range(8):
        assert resumed.take(3) == undisturbed.take(3)


def test_a_stream_refuses_the_state_of_other_prompts(ten):
    state = PromptStream(ten, 5).state()
    with pytest.raises(DataError, match="changed since the checkpoint"):
        PromptStream(ten[1:], 5).load_state(state)
    with pytest.raises(DataError, match="changed since the checkpoint"):
        PromptStream(ten, 6).load_state(state)


def test_more_prompts_per_step_than_there_are_is_refused(ten):
    with pytest.raises(DataError, match=r"11 prompts per step.*has 10"):
        PromptStream(ten, 1).take(11)
