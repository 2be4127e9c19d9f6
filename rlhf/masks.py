"""From conversations to token ids of which the assistant's alone are trained."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from rlhf.chat import ChatTokenizer, is_left_out
from rlhf.errors import DataError, ModelError, TenfoldError
from rlhf.formats import Conversation
from rlhf.records import Message

Long = Literal["drop", "cut", "stop"]
_PROBE = "tenfold"


@dataclass(frozen=True, slots=True)
class TrainedText:
    """A sequence to train on. It ends with the last end token that is trained."""

    token_ids: tuple[int, ...]  # [T] one BOS at most, first
    trained: tuple[bool, ...]  # [T] true where the loss counts the token: answers and their end tokens
    where: str  # file and line of the conversation, for errors


@dataclass(frozen=True, slots=True)
class TrainedTexts:
    """The texts of a data set, none longer than the limit, in order of the conversations."""

    texts: tuple[TrainedText, ...]
    num_cut: int = 0  # texts that lost turns at their end
    num_dropped: int = 0  # texts that are left out


def make_texts(conversations: Iterable[Conversation], chat: ChatTokenizer, max_tokens: int, long: Long) -> TrainedTexts:
    """The texts of all conversations, and what became of those longer than `max_tokens`.

    `drop` leaves them out; `cut` keeps as many whole turns from the beginning as fit, up to an answer's end, and leaves
    a text out whose first trained answer does not fit; `stop` raises.

    Raises DataError: a text too long under `stop`, no text left, an answer that holds a mark of the template.
    Raises ModelError as `tokenise` does.
    """
    texts = [text for conversation in conversations for text in tokenise(conversation, chat)]
    fits = [_cut(text, max_tokens) if long == "cut" else _whole(text, max_tokens) for text in texts]
    kept = tuple(text for text in fits if text is not None)
    num_long = sum(len(text.token_ids) > max_tokens for text in texts)
    num_dropped = len(texts) - len(kept)
    if num_long and (long == "stop" or not kept):
        longest = max(texts, key=lambda text: len(text.token_ids))
        raise DataError(
            f"{num_long} of {len(texts)} texts are too long{'' if kept else ', and none is left'}; the longest has "
            f"{len(longest.token_ids)} tokens ({longest.where}).",
            limit=f"A text has at most {max_tokens} tokens.",
            remedy="Raise the limit, as far as the model's context allows, shorten those conversations, or let long "
            "ones be cut or dropped.",
        )
    return TrainedTexts(kept, num_long - num_dropped, num_dropped)


def tokenise(conversation: Conversation, chat: ChatTokenizer) -> tuple[TrainedText, ...]:
    """The texts that train each learned answer once, after the very tokens that a generator would be given.

    Those tokens are `chat.prompt` of the messages before. As a rule a template only appends, so that one text holds
    all answers. One that renders earlier turns otherwise once others follow (it drops their reasoning, or moves the
    system message) gives a further text at each answer before which the past has changed, in which that answer and
    those after it are trained.

    An answer is trained as the template writes it, white space around it included, up to and with the first end token.

    Raises ModelError: the template fails, leaves a message out, rewrites an answer, or ends it with no end token.
    Raises DataError: an answer holds a special token by which the template tells turns apart.
    """
    texts: list[TrainedText] = []
    ids: tuple[int, ...] = ()
    trained: tuple[bool, ...] = ()
    for index, message in enumerate(conversation.messages):
        if message.role != "assistant" or index < conversation.num_given:
            continue
        try:
            prompt, answer = _turn(conversation.messages, index, chat)
        except TenfoldError as error:
            problem = f"{conversation.where}: {error.problem}"
            raise type(error)(problem, limit=error.limit, remedy=error.remedy) from error
        if prompt[: len(ids)] != ids:
            texts.append(TrainedText(ids, trained, conversation.where))
            ids, trained = (), ()
        trained += (False,) * (len(prompt) - len(ids)) + (True,) * len(answer)
        ids = prompt + answer
    return (*texts, TrainedText(ids, trained, conversation.where))


def _whole(text: TrainedText, max_tokens: int) -> TrainedText | None:
    return text if len(text.token_ids) <= max_tokens else None


def _cut(text: TrainedText, max_tokens: int) -> TrainedText | None:
    """The text up to the last answer that ends within the limit; None if there is none."""
    if len(text.token_ids) <= max_tokens:
        return text
    # What follows `trained[n - 1]` is not trained: an answer ends there.
    for num in range(max_tokens, 0, -1):
        if text.trained[num - 1] and not text.trained[num]:
            return TrainedText(text.token_ids[:num], text.trained[:num], text.where)
    return None


@dataclass(frozen=True, slots=True)
class _Marks:
    """What a chat template writes around messages."""

    opening: str  # between a user's words and the answer
    ends: tuple[str, ...]  # texts of the tokens that end an answer
    ids: frozenset[int]  # special tokens by which turns are told apart


@lru_cache(maxsize=4)
def _marks(chat: ChatTokenizer) -> _Marks:
    user, assistant = Message("user", _PROBE), Message("assistant", _PROBE)
    _, _, opening = chat.render([user], generation_prompt=True).rpartition(_PROBE)
    written = chat.encode_rendered(chat.render([user, assistant, user], generation_prompt=True))
    ends = tuple(filter(str.strip, (chat._tokenizer.decode([index]) for index in sorted(chat.eos_ids))))
    return _Marks(opening, ends, chat.eos_ids | (chat.special_ids() & set(written)))


def _turn(messages: Sequence[Message], index: int, chat: ChatTokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Token ids of what stands before the answer at `index`, and of the answer with its end token."""
    prompt = chat.render(messages[:index], generation_prompt=True)
    _check_nothing_left_out(messages[:index], prompt)
    written = _written(messages, index, prompt, chat)
    before, whole = chat.encode_rendered(prompt), chat.encode_rendered(prompt + written)
    if whole[: len(before)] == before:
        answer = whole[len(before) :]
    else:
        # A token spans the boundary. A generator starts after the prompt's own tokens, so the answer does, too.
        answer = chat.encode_rendered(written)
        decode = chat._tokenizer.decode
        if decode(list(before + answer)) != decode(list(whole)):
            raise ModelError(
                f"The tokenizer cannot write the answer {_shorten(written)!r} after {prompt[-20:]!r}: a token of its "
                "own spans the two.",
                remedy="Let the template's generation prompt end with a special token or a line break.",
            )
    if answer[-1] not in chat.eos_ids:
        last = chat._tokenizer.convert_ids_to_tokens(answer[-1])
        raise ModelError(
            f"The tokenizer writes the end of the answer {_shorten(written)!r} as the token {last!r}.",
            limit=f"Generation stops at the tokens {', '.join(_marks(chat).ends)}.",
            remedy="Let the template end a turn with a special token, and name it as eos_token_id in "
            "generation_config.json.",
        )
    if inside := _marks(chat).ids & set(answer[:-1]):
        names = ", ".join(chat._tokenizer.convert_ids_to_tokens(sorted(inside)))
        raise DataError(
            f"the assistant's text {_shorten(messages[index].content)!r} holds {names}.",
            limit="These tokens tell turns apart: the model would learn to write them inside an answer.",
            remedy="Mend or remove the row; if it went through a chat template before, give its messages instead.",
        )
    return before, answer


def _check_nothing_left_out(messages: Sequence[Message], prompt: str) -> None:
    # Earlier answers may be changed (their reasoning is dropped): then they belong to another text.
    for message in messages:
        if message.role != "assistant" and is_left_out(message, messages, prompt):
            system = message.role == "system"
            raise ModelError(
                f"The chat template leaves out the {message.role} message {_shorten(message.content)!r}.",
                remedy="Remove system messages, or take a template that knows them."
                if system
                else "Take a template that writes every message.",
            )


def _written(messages: Sequence[Message], index: int, prompt: str, chat: ChatTokenizer) -> str:
    """The answer at `index` as the template writes it after the generation prompt, with its end token."""
    marks = _marks(chat)
    content = messages[index].content
    as_last = chat.render(messages[: index + 1], generation_prompt=False)
    found = _find(as_last, prompt, content, marks)
    if found is None:
        # Some put an empty passage of reasoning before a last answer that has none, and before earlier ones nothing.
        # A prompt asks for no such passage, so that the way of earlier answers is the one to learn.
        follows = messages[index + 1] if index + 1 < len(messages) else Message("user", _PROBE)
        earlier = chat.render([*messages[: index + 1], follows], generation_prompt=True)
        found = _find(earlier, prompt, content, marks)
    if found is None:
        seen = as_last.removeprefix(prompt) if as_last.startswith(prompt) else as_last[-60:]
        raise ModelError(
            f"After the generation prompt {_shorten(marks.opening)!r} the chat template writes {_shorten(seen)!r}.",
            limit=f"There must stand the answer {_shorten(content)!r} as it is, then one of {', '.join(marks.ends)}.",
            remedy="Write the answer as the template does, take another template, or name the token that ends a turn "
            "as eos_token_id in generation_config.json.",
        )
    return found


def _find(rendered: str, prompt: str, content: str, marks: _Marks) -> str | None:
    """The answer with its end token; None where it does not stand after the opening as it is."""
    if rendered.startswith(prompt):
        return _answer(rendered[len(prompt) :], content, marks.ends)
    # The past is rendered otherwise; the answer is what follows the last opening that it follows at all.
    place = rendered.rfind(marks.opening) if marks.opening and prompt.endswith(marks.opening) else -1
    while place >= 0:
        if found := _answer(rendered[place + len(marks.opening) :], content, marks.ends):
            return found
        place = rendered.rfind(marks.opening, 0, place + len(marks.opening) - 1)
    return None


def _answer(rest: str, content: str, ends: Iterable[str]) -> str | None:
    """What `rest` begins with, if that is the content and an end token, with white space around the content at most."""
    words = content.strip()
    start = len(rest) - len(rest.lstrip())
    if not rest.startswith(words, start):
        return None
    stop = start + len(words)
    stop += len(rest[stop:]) - len(rest[stop:].lstrip())
    end = max((end for end in ends if rest.startswith(end, stop)), key=len, default=None)
    return None if end is None else rest[: stop + len(end)]


def _shorten(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
