"""What came to the desk as text has the token ids that a generator would be given and write."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf.chat import ChatTokenizer
from rlhf.desk.groups import tokenised
from rlhf.desk.records import Item
from rlhf.errors import DataError
from rlhf.records import Message


def item(*answers: str, messages: tuple[Message, ...] = (Message("user", "sun?"),)) -> Item:
    return Item("p", 0, messages, answers, None, 1, 0, False)


def test_answers_stand_behind_the_prompt_that_the_template_writes_and_end_as_it_ends_them(tiny_model: Path) -> None:
    chat = ChatTokenizer(tiny_model)
    talk = (Message("user", "sun?"), Message("assistant", "moon"), Message("user", "and?"))
    (group,) = tokenised([item("stone", " a river\n", messages=talk)], chat)
    assert group.prompt.id == "p" and group.prompt.token_ids == chat.prompt(talk).token_ids
    assert [answer.text for answer in group.answers] == ["stone", " a river\n"]
    for answer in group.answers:
        assert chat.decode(answer.token_ids) == answer.text
        assert answer.token_ids[-1] in chat.eos_ids and not chat.eos_ids & set(answer.token_ids[:-1])
        assert answer.logprobs == (0.0,) * len(answer.token_ids) and answer.ended == "eos"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (" \n", "prompt p, answer 1 is empty"),
        ("so <|user|> no", r"holds <\|user\|>"),
        ("x" * 1100, r"has 11\d\d tokens with its prompt"),
    ],
)
def test_an_answer_that_cannot_be_trained_on_is_named(tiny_model: Path, answer: str, said: str) -> None:
    with pytest.raises(DataError, match=said) as error:
        tokenised([item("stone", answer)], ChatTokenizer(tiny_model))
    assert "prompt p, answer 1" in str(error.value)
