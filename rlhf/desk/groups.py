"""Groups of the desk as training takes them: what came in as text has token ids."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf.chat import ChatTokenizer
from rlhf.desk.records import Item
from rlhf.errors import DataError, TenfoldError
from rlhf.formats import Conversation
from rlhf.masks import tokenise
from rlhf.records import Answer, AnswerGroup, Message, Prompt


def tokenised(items: Sequence[Item], chat: ChatTokenizer) -> list[AnswerGroup]:
    """The groups with the token ids that a generator would be given, and would have to write to give these answers.

    An answer ends with the template's end token. Nobody knows by which probabilities it was written: logprobs are 0.

    Raises DataError or ModelError, with the group: an answer that the template cannot write (it is empty, say, or holds
    a token by which turns are told apart), or that is longer than the model's context.
    """
    return [_group(item, chat) for item in items]


def _group(item: Item, chat: ChatTokenizer) -> AnswerGroup:
    where = f"prompt {item.prompt_id}"
    try:
        prompt = chat.prompt(item.messages)
    except TenfoldError as error:
        raise type(error)(f"{where}: {error.problem}", limit=error.limit, remedy=error.remedy) from error
    answers = tuple(
        _answer(prompt.token_ids, (*item.messages, Message("assistant", text)), f"{where}, answer {index}", chat)
        for index, text in enumerate(item.answers)
    )
    return AnswerGroup(Prompt(item.prompt_id, item.messages, prompt.token_ids), answers)


def _answer(before: tuple[int, ...], messages: tuple[Message, ...], where: str, chat: ChatTokenizer) -> Answer:
    text = messages[-1].content
    if not text.strip():
        raise DataError(f"{where} is empty.", remedy="Mend or remove the row.")
    whole = tokenise(Conversation(messages, where, num_given=len(messages) - 1), chat)[-1].token_ids
    assert whole[: len(before)] == before, "the answer stands behind the prompt's own tokens"
    if chat.context_tokens is not None and len(whole) > chat.context_tokens:
        raise DataError(
            f"{where} has {len(whole)} tokens with its prompt.",
            limit=f"The model's context has {chat.context_tokens}.",
            remedy="Shorten or remove the row.",
        )
    ids = whole[len(before) :]
    return Answer(ids, (0.0,) * len(ids), "eos", 0, text)
