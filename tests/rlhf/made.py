"""Groups made by hand."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf.records import Answer, AnswerGroup, Ended, Message, Prompt


def make_answer(length: int, ended: Ended = "eos", logprobs: Sequence[float] | None = None) -> Answer:
    """An answer of so many tokens; each has the logprob -1 unless said."""
    given = tuple(logprobs) if logprobs is not None else (-1.0,) * length
    return Answer(token_ids=tuple(range(5, 5 + length)), logprobs=given, ended=ended, version=0, text="text")


def make_group(answers: Sequence[Answer], prompt_len: int = 3, name: str = "p") -> AnswerGroup:
    """A group whose prompt has so many tokens."""
    prompt = Prompt(id=name, messages=(Message("user", "?"),), token_ids=tuple(range(prompt_len)))
    return AnswerGroup(prompt=prompt, answers=tuple(answers))


def make_groups(lengths: Sequence[Sequence[int]], prompt_lens: Sequence[int] | None = None) -> list[AnswerGroup]:
    """One group for each list of answer lengths."""
    return [
        make_group([make_answer(n) for n in group], prompt_lens[i] if prompt_lens else 3, f"p{i}")
        for i, group in enumerate(lengths)
    ]
