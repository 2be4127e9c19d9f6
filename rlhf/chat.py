"""From messages to token ids and back: the tokenizer and its chat template."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from rlhf.errors import DataError, ModelError
from rlhf.records import Message, Prompt

_PROBE = "tenfold"


class ChatTokenizer:
    """The tokenizer of a base model.

    Raises ModelError for a folder without a tokenizer or chat template, or with a template that fails.
    """

    def __init__(self, model_path: str | Path) -> None:
        self._path = Path(model_path)
        if not self._path.is_dir():  # else transformers would look for it on a hub
            raise ModelError(
                f"model.path={model_path}: there is no such folder.",
                remedy="Bring it back, set model.path to where it is now, or make one with "
                "`tenfold import-model SOURCE DEST`.",
            )
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(str(model_path))
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(
                f"model.path={model_path} has no tokenizer that can be loaded: {first_line(error)}.",
                remedy="Give a folder in Hugging Face layout; `tenfold import-model SOURCE DEST` makes one.",
            ) from error
        if not self._tokenizer.chat_template:
            raise ModelError(
                f"The base {model_path} has no chat template, so it is not known how it tells turns apart.",
                remedy="Take a model that was tuned on conversations (an instruct or chat model), or put its template "
                "into chat_template.jinja in that folder.",
            )
        self.bos_id: int | None = self._tokenizer.bos_token_id
        self.eos_ids: frozenset[int] = self._find_eos_ids()
        self.context_tokens: int | None = self._find_context()

    def prompt(self, messages: Sequence[Message], extra: Mapping[str, str] | None = None) -> Prompt:
        """The prompt record: through the chat template, generation prompt included, one BOS at most.

        Raises ModelError where the template refuses the messages, or silently leaves the system message or the last
        message out.
        """
        text = self.render(messages, generation_prompt=True)
        for message in (*(m for m in messages if m.role == "system"), messages[-1]):
            if is_left_out(message, messages, text):
                raise ModelError(
                    f"The chat template of {self._path} leaves out the {message.role} message "
                    f"{_shorten(message.content)!r}.",
                    remedy=_remedy(messages),
                )
        return Prompt(prompt_id(messages), tuple(messages), self.encode_rendered(text), dict(extra or {}))

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, with the special tokens that the tokenizer puts around any text."""
        return self._tokenizer(text, verbose=False)["input_ids"]

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of token ids, special tokens left out."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def render(self, messages: Sequence[Message], *, generation_prompt: bool) -> str:
        """What the chat template writes of these messages. Raises ModelError where it fails."""
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation_prompt)
        except Exception as error:  # a template is a program of its own: it may raise anything
            roles = ", ".join(message.role for message in messages)
            raise ModelError(
                f"The chat template of {self._path} fails on messages of the roles {roles}: {first_line(error)}.",
                remedy=_remedy(messages),
            ) from error

    def encode_rendered(self, text: str) -> tuple[int, ...]:
        """Token ids of what the template wrote, one BOS at most."""
        # The template decides on BOS, as in transformers' own apply_chat_template: the tokenizer adds none.
        ids = list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        while self.bos_id is not None and ids[:2] == [self.bos_id, self.bos_id]:
            del ids[0]
        return tuple(ids)

    def _find_eos_ids(self) -> frozenset[int]:
        """What ends an answer, by generation_config.json, the tokenizer, and the template's end of a turn."""
        named = read_json(self._path / "generation_config.json").get("eos_token_id")
        found: set[int] = {named} if isinstance(named, int) else set(named or ())
        if self._tokenizer.eos_token_id is not None:
            found.add(self._tokenizer.eos_token_id)
        turns = [Message("user", "x"), Message("assistant", _PROBE)]
        _, _, tail = self.render(turns, generation_prompt=False).rpartition(_PROBE)
        ids = self.encode_rendered(tail)
        if ids and ids[0] in self.special_ids() and ids[0] != self.bos_id:
            found.add(ids[0])
        if not found:
            raise ModelError(
                f"The base {self._path} names no token that ends an answer.",
                remedy="Set eos_token_id in generation_config.json in that folder.",
            )
        return frozenset(found)

    def special_ids(self) -> set[int]:
        """Tokens that no plain text gives."""
        added = self._tokenizer.added_tokens_decoder
        return set(self._tokenizer.all_special_ids) | {index for index, token in added.items() if token.special}

    def _find_context(self) -> int | None:
        """The longest sequence in tokens that the base was made for; None where its config does not say."""
        config = read_json(self._path / "config.json")
        for key in ("max_position_embeddings", "n_positions", "max_seq_len"):
            if isinstance(value := config.get(key), int):
                return value
        return None


def prompt_id(messages: Sequence[Message]) -> str:
    """16 hex digits (64 bits of SHA-256) that name these messages in every run."""
    plain = json.dumps([[message.role, message.content] for message in messages], ensure_ascii=True)
    return hashlib.sha256(plain.encode()).hexdigest()[:16]


def check_lengths(max_prompt_tokens: int, max_answer_tokens: int, chat: ChatTokenizer) -> None:
    """Raises DataError if a prompt and an answer of the longest kind do not fit the model's context together."""
    total = max_prompt_tokens + max_answer_tokens
    if chat.context_tokens is not None and total > chat.context_tokens:
        raise DataError(
            f"data.max_prompt_tokens={max_prompt_tokens} and sampling.max_answer_tokens={max_answer_tokens} make "
            f"{total} tokens.",
            limit=f"The model's context has {chat.context_tokens}.",
            remedy="Lower one of the two.",
        )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none. Raises ModelError for one that cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}.", remedy="Restore it, or delete it.") from error


def _remedy(messages: Sequence[Message]) -> str:
    if any(message.role == "system" for message in messages):
        return "Leave data.system out and remove system messages from the prompts, or take a model that knows them."
    return "Let user and assistant take turns, user first and last, or take a model whose template allows this."


def is_left_out(message: Message, messages: Sequence[Message], text: str) -> bool:
    """Whether the text that a template made of `messages` lacks this one of them.

    A system message must be there beside those that hold the same words; of others it is asked whether their words are.
    """
    content = message.content.strip()
    if message.role != "system" or not content:
        return content not in text
    return text.count(content) < sum(m.content.count(content) for m in messages if m.role != "assistant")


def first_line(error: Exception) -> str:
    """What an error says, in a line without its full stop."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _shorten(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
