"""Bits per byte on general text: what alignment cost in what the model could do before."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from rlhf.chat import ChatTokenizer
from rlhf.errors import DataError
from rlhf.records import Answer, AnswerGroup, Prompt

CHUNK_TOKENS = 512


def text_groups(path: str, chat: ChatTokenizer, num_tokens: int) -> list[AnswerGroup]:
    """The first `num_tokens` tokens of a text file in chunks: first token as the prompt, the rest as its answer.

    So text is measured by the very forward pass that scores answers.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"evaluate.text={path} cannot be read: {error}.", remedy="Give a UTF-8 text file, or leave it out."
        ) from error
    # A token is a byte at least, so 16 characters a token are plenty and a long file is not tokenised whole.
    ids = chat.encode(text[: 16 * num_tokens])[:num_tokens]
    chunks = [ids[first : first + CHUNK_TOKENS] for first in range(0, len(ids), CHUNK_TOKENS)]
    groups = [_group(chunk, chat) for chunk in chunks if len(chunk) > 1]
    if not groups:
        raise DataError(
            f"evaluate.text={path} holds {len(ids)} tokens.",
            limit="At least 2 are needed.",
            remedy="Give a longer text.",
        )
    return groups


def bits_per_byte(logprobs: torch.Tensor, groups: Sequence[AnswerGroup]) -> float:
    """Bits that the model needs per UTF-8 byte of the text: -Σ log2 p / bytes. `logprobs` [N, T] in nats."""
    num_bytes = sum(len(answer.text.encode()) for group in groups for answer in group.answers)
    return -float(logprobs.sum()) / math.log(2) / num_bytes


def _group(ids: Sequence[int], chat: ChatTokenizer) -> AnswerGroup:
    answer = Answer(tuple(ids[1:]), (0.0,) * (len(ids) - 1), "length", 0, chat.decode(ids[1:]))
    return AnswerGroup(Prompt("text", (), tuple(ids[:1])), (answer,))
