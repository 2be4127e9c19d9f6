"""Rows of the known formats: what they become, and what each bad one is told."""

import pytest

from rlhf.errors import DataError
from rlhf.formats import Conversation, read_row
from rlhf.records import Message

HELLO = (Message("user", "Hi"), Message("assistant", "Hello"))
TURNS = [{"role": message.role, "content": message.content} for message in HELLO]
ROW = {"messages": TURNS}


def read(row: object) -> Conversation:
    return read_row("f.jsonl, line 3", row)[1]


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"messages": TURNS}, "messages"),
        ({"prompt": "Hi", "completion": "Hello"}, "prompt+completion"),
        ({"prompt": TURNS[:1], "completion": TURNS[1:]}, "prompt+completion"),
        ({"prompt": TURNS[:1], "completion": "Hello"}, "prompt+completion"),
        ({"instruction": "Hi", "output": "Hello"}, "instruction/input/output"),
        ({"instruction": "Hi", "input": "", "output": "Hello"}, "instruction/input/output"),
        ({"instruction": "Hi", "input": None, "output": "Hello", "messages": None}, "instruction/input/output"),
    ],
)
def test_one_exchange_is_the_same_conversation_in_every_format(row: object, name: str):
    assert read_row("here", row) == (name, Conversation(HELLO, "here"))


def test_the_input_of_an_instruction_stands_below_it():
    found = read({"instruction": "Translate.", "input": "Bonjour", "output": "Hello"})
    assert found.messages[0] == Message("user", "Translate.\n\nBonjour")


def test_other_fields_are_kept_as_texts():
    row = {"prompt": "a prompt beside messages", "id": 7, "tags": ["x"], "none": None, "messages": TURNS}
    assert read(row).extra == {"prompt": "a prompt beside messages", "id": "7", "tags": '["x"]'}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TURNS},
        {"prompt": "Hi", "completion": "Hello"},
        {"instruction": "Hi", "output": "Hello", "history": [], "tools": []},
    ],
)
def test_a_system_message_may_stand_in_a_field_of_its_own(row: dict[str, object]):
    assert read(row | {"system": "Be brief."}).messages == (Message("system", "Be brief."), *HELLO)
    assert read(row | {"system": ""}).messages == HELLO
    more = {"prompt": [*TURNS, {"role": "user", "content": "Why?"}], "completion": "So.", "system": "Be brief."}
    assert read(more).num_given == 4


def test_answers_in_a_prompt_are_given_and_those_in_messages_are_learned():
    more = [*TURNS, {"role": "user", "content": "Why?"}]
    given = read({"prompt": more, "completion": "So."})
    learned = read({"messages": [*more, {"role": "assistant", "content": "So."}]})
    assert given.messages == learned.messages
    assert (given.num_given, learned.num_given) == (3, 0)
    assert given.prompt == given.messages[:3]
    assert learned.prompt == learned.messages[:1]
    assert given.id != learned.id


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"question": "a", "answer": "b"}, r"found: question, answer.*Known are messages, prompt\+completion, .*"
         r"prompt\+completion: rename `question` to `prompt` and rename `answer` to `completion`"),
        ({"prompt": "a"}, r"nearest is prompt\+completion: add `completion`"),
        ({"prompt": "a", "completion": None}, r"found: prompt\).*add `completion`"),
        ({"instruct": "a", "output": "b"}, r"instruction/input/output: rename `instruct` to `instruction`"),
        ({"conversations": []}, "messages: rename `conversations` to `messages`"),
        ({"text": "a"}, "found: text.*Rename the fields"),
        ({}, "found: none"),
        (["a"], "a list, not fields"),
        ({"messages": TURNS, "prompt": "a", "completion": "b"}, r"fits messages and prompt\+completion"),
    ],
)  # fmt: skip
def test_a_row_of_an_unknown_format_is_told_its_fields_and_the_nearest_format(row: object, told: str):
    with pytest.raises(DataError, match=f"line 3.*{told}"):
        read(row)


def turns(*roles: str) -> dict[str, object]:
    return {"messages": [{"role": role, "content": f"{role} {index}"} for index, role in enumerate(roles)]}


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (turns("user"), "no assistant turn"),
        (turns("system", "user"), "no assistant turn"),
        ({"prompt": [*TURNS, TURNS[0]], "completion": [TURNS[0]]}, "no assistant turn"),
        (turns("assistant"), "message 1 is of the role assistant where user is expected"),
        (turns("user", "user", "assistant"), "message 2 is of the role user where assistant is expected"),
        (turns("user", "assistant", "system", "assistant"), "message 3 is of the role system where user is expected"),
        (turns("user", "assistant", "user"), "last message is of the role user"),
        (turns("human", "gpt"), r"`messages\[0\]` has the role 'human'"),
        (turns("user", "tool"), r"`messages\[1\]` has the role 'tool'"),
        ({"messages": [{"from": "human", "value": "Hi"}]}, r"`messages\[0\]` has no role"),
        ({"messages": [TURNS[0], {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}]}, "tool_calls"),
        ({"instruction": "Hi", "output": "a", "history": [["b", "c"]]}, "`history`"),
        ({**ROW, "tools": [{"type": "function", "function": {"name": "add"}}]}, "`tools` would not be shown"),
        ({"prompt": "Hi", "completion": "a", "system": 3}, "content of `system` is no text: 3"),
        ({"system": "Be brief.", **turns("system", "user", "assistant")}, "message 2 is of the role system"),
        ({"messages": []}, r"`messages` is \[\]"),
        ({"messages": "Hi"}, "`messages` is 'Hi'"),
        ({"messages": ["Hi"]}, r"`messages\[0\]` is 'Hi'"),
        ({"messages": [TURNS[0], {"role": "assistant", "content": " \n"}]}, r"assistant turn `messages\[1\]` is empty"),
        ({"messages": [TURNS[0], {"role": "assistant", "content": None}]}, r"content of `messages\[1\]` is no text"),
        ({"messages": [TURNS[0], {"role": "assistant", "content": [{"type": "text", "text": "a"}]}]}, "is no text"),
        ({"messages": [TURNS[0], {"role": "assistant", "content": "\ud83d"}]}, r"`messages\[1\]` holds half a char"),
        ({"prompt": "Hi", "completion": ""}, "assistant turn `completion` is empty"),
        ({"prompt": 3, "completion": "a"}, "`prompt` is 3"),
        ({"prompt": "\udc00", "completion": "a"}, "`prompt` holds half a character"),
        ({"instruction": "Hi", "output": 4}, "content of `output` is no text: 4"),
        ({"instruction": "Hi", "input": 4, "output": "a"}, "`input` is no text: 4"),
        ({"instruction": "Hi", "input": "\ud83d", "output": "a"}, "`input` holds half a character"),
        ({"instruction": " ", "output": "a"}, "user turn `instruction` is empty"),
    ],
)
def test_a_row_that_is_no_conversation_is_told_its_line_and_the_rules(row: object, told: str):
    with pytest.raises(DataError, match=f"line 3: .*{told}.*the assistant last"):
        read(row)


@pytest.mark.parametrize(("role", "own"), [("human", "user"), ("GPT", "assistant")])
def test_a_role_by_another_name_is_told_ours(role: str, own: str):
    with pytest.raises(DataError, match=f"has the role '{role}'.*Write '{own}' for '{role}'"):
        read(turns(role, "assistant"))
