"""Prompts: read from files, told apart, split once, and handed out in a seeded order."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from configs.schema import DataConfig
from rlhf.chat import ChatTokenizer, prompt_id
from rlhf.errors import DataError, TenfoldError
from rlhf.records import Message, Prompt
from rlhf.seeds import shuffle_seed
from rlhf.sources import Item, read_items

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Prompts:
    """The prompts of a run. Both parts are ordered by a hash, so that the first n are a fair sample of all."""

    train: tuple[Prompt, ...]
    held_out: tuple[Prompt, ...]
    num_duplicates: int = 0  # rows that were left out since the same prompt came before


def load_prompts(config: DataConfig, chat: ChatTokenizer) -> Prompts:
    """All different prompts of the sources, split into train and held-out.

    The split and `limit` go by a hash of the prompt's id: they do not depend on the order of rows or files, a prompt
    keeps its side when others come or go, and a larger limit holds the prompts of a smaller one. If `held_out` is
    above 0 and there are two prompts or more, neither side is empty.

    Raises DataError: no file, a malformed row (with file and line), no prompt at all, prompts that are too long.
    """
    found: dict[str, tuple[Item, list[Message]]] = {}
    num_rows = 0
    for item in read_items(config.prompts):
        num_rows += 1
        messages = _messages(item, config.system)
        found.setdefault(prompt_id(messages), (item, messages))
    if not found:
        raise DataError(
            f"data.prompts={config.prompts!r} holds no prompt.",
            limit="At least 1 is needed.",
            remedy='Give a file with a row such as {"prompt": "Why is the sky blue?"}.',
        )
    kept = sorted(found, key=by_hash("limit"))[: config.limit]
    prompts = [_prompt(*found[id_], chat) for id_ in kept]
    _check_length(prompts, config.max_prompt_tokens)
    train, held_out = _split(prompts, config.held_out)
    return Prompts(train, held_out, num_rows - len(found))


class PromptStream:
    """Prompts in a seeded order, epoch after epoch, each in a new order.

    One `take` never holds a prompt twice: what is left of an epoch and is too little for it is passed over.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        self._prompts, self._seed = prompts, seed
        self._epoch, self._offset = 0, 0
        self._order = self._shuffled()

    def take(self, num: int) -> list[Prompt]:
        """The next `num` prompts. Raises DataError if there are not so many different ones."""
        if num > len(self._prompts):
            raise DataError(
                f"{num} prompts per step are asked for, and the train split has {len(self._prompts)}.",
                remedy="Lower ppo.num_prompts, or bring more prompts (data.limit, data.held_out).",
            )
        if self._offset + num > len(self._prompts):
            self._epoch, self._offset = self._epoch + 1, 0
            self._order = self._shuffled()
        taken = self._order[self._offset : self._offset + num]
        self._offset += num
        return [self._prompts[index] for index in taken]

    def state(self) -> dict[str, object]:
        """The position, and what it is a position in."""
        return {"epoch": self._epoch, "offset": self._offset, "seed": self._seed, "prompts": self._fingerprint()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state` was taken. Raises DataError if the prompts or the seed are others by now."""
        if (state["seed"], state["prompts"]) != (self._seed, self._fingerprint()):
            raise DataError(
                f"The train prompts changed since the checkpoint: fingerprint {state['prompts']} and seed "
                f"{state['seed']} then, {self._fingerprint()} and {self._seed} now.",
                remedy="Bring the data files back as they were, or start a run with another name.",
            )
        self._epoch, self._offset = int(state["epoch"]), int(state["offset"])
        self._order = self._shuffled()

    def _shuffled(self) -> list[int]:
        order = list(range(len(self._prompts)))
        random.Random(shuffle_seed(self._seed, "prompts", self._epoch)).shuffle(order)
        return order

    def _fingerprint(self) -> str:
        return hashlib.sha256(" ".join(prompt.id for prompt in self._prompts).encode()).hexdigest()[:16]


def _prompt(item: Item, messages: list[Message], chat: ChatTokenizer) -> Prompt:
    try:
        return chat.prompt(messages, item.extra)
    except TenfoldError as error:
        raise type(error)(f"{item.where}: {error.problem}", limit=error.limit, remedy=error.remedy) from error


def _messages(item: Item, system: str | None) -> list[Message]:
    """The messages of a row, after its system message, from a field of its own too; the recipe's where it has none."""
    messages = _turns(item)
    if own := item.extra.get("system"):
        if not own.strip():
            raise _bad(item, "`system` is empty")
        if messages[0].role == "system":
            raise _bad(item, "there is a system message in `prompt`, and another in `system`")
        _check_characters(item, own)
        return [Message("system", own), *messages]
    if system is None or messages[0].role == "system":
        return messages
    return [Message("system", system), *messages]


def _turns(item: Item) -> list[Message]:
    """The messages of a row's `prompt`: a text, or a list of turns of which the last is the user's."""
    if isinstance(item.prompt, str):
        if not item.prompt.strip():
            raise _bad(item, "the prompt is empty")
        _check_characters(item, item.prompt)
        return [Message("user", item.prompt)]
    if not isinstance(item.prompt, list) or not item.prompt:
        raise _bad(item, f"`prompt` is {_show(item.prompt)}")
    messages: list[Message] = []
    for turn in item.prompt:
        role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, dict) else (None, None)
        if role not in ROLES or not isinstance(content, str) or not content.strip():
            raise _bad(item, f"message {len(messages) + 1} is {_show(turn)}")
        messages.append(Message(role, content))
    if any(message.role == "system" for message in messages[1:]):
        raise _bad(item, "a system message stands after the first place")
    for message in messages:
        _check_characters(item, message.content)
    if messages[-1].role != "user":
        raise _bad(item, f"the last message is of the role {messages[-1].role}")
    return messages


def _check_characters(item: Item, text: str) -> None:
    # JSON can spell half of a surrogate pair; no tokenizer takes it.
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise _bad(item, "the prompt holds half a character (a lone surrogate)")


def _bad(item: Item, problem: str) -> DataError:
    return DataError(
        f"{item.where}: {problem}.",
        limit="`prompt` is a text, or a list of {role, content} whose last role is user; roles are "
        + ", ".join(ROLES)
        + ".",
        remedy="Mend or remove the row.",
    )


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _check_length(prompts: Sequence[Prompt], limit: int) -> None:
    too_long = [prompt for prompt in prompts if len(prompt.token_ids) > limit]
    if too_long:
        longest = max(too_long, key=lambda prompt: len(prompt.token_ids))
        raise DataError(
            f"{len(too_long)} of {len(prompts)} prompts are too long; the longest has {len(longest.token_ids)} tokens "
            f"and ends with {longest.text.strip()[-60:]!r}.",
            limit=f"data.max_prompt_tokens is {limit}.",
            remedy="Raise it, as far as the model's context allows, or remove those prompts.",
        )


def _split(prompts: Sequence[Prompt], share: float) -> tuple[tuple[Prompt, ...], tuple[Prompt, ...]]:
    """(train, held-out) by the share of all hashes that lies below a prompt's own."""
    if share == 0 or len(prompts) < 2:
        return tuple(prompts), ()
    place = by_hash("split")
    ordered = sorted(prompts, key=lambda prompt: place(prompt.id))
    bound = f"{int(share * 2**64):016x}" if share < 1 else "g"  # above every hex digit
    num = min(max(1, sum(place(prompt.id) < bound for prompt in prompts)), len(prompts) - 1)
    held_out = {prompt.id for prompt in ordered[:num]}
    return tuple(p for p in prompts if p.id not in held_out), tuple(p for p in prompts if p.id in held_out)


def by_hash(what: str) -> Callable[[str], str]:
    """A key to sort ids by, the same in every run: 64 hex digits that hang on the id and on what it is used for."""
    # Each use has a hash of its own: were they one, a limit would keep the prompts of one side.
    return lambda id_: hashlib.sha256(f"{what}|{id_}".encode()).hexdigest()
