"""The records that travel between stages and roles.

Shape legend, used in every docstring of the project: P prompts (= groups), N answers of all groups, flat and in
order of the groups, T answer tokens (padded on the right to the longest answer), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from rlhf.shipping import Packed, packed, unpacked

if TYPE_CHECKING:
    import torch  # which takes seconds, and most of the records hold no tensor

Ended = Literal["eos", "length"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation: who speaks (`system`, `user`, `assistant`) and what is said."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is asked. `id` is a hash of the messages, so that the same prompt is the same record in every run."""

    id: str
    messages: tuple[Message, ...]
    token_ids: tuple[int, ...]  # through the chat template, generation prompt included, exactly one BOS if any
    extra: Mapping[str, str] = field(default_factory=dict[str, str])  # other fields of the row, for rules

    @property
    def text(self) -> str:
        """The last user message: what rules and tables look at."""
        return next((m.content for m in reversed(self.messages) if m.role == "user"), "")


@dataclass(frozen=True, slots=True)
class Answer:
    """One sampled answer, as the engine made it: nothing is tokenised again."""

    token_ids: tuple[int, ...]  # [T] cut after the first EOS, which is included
    logprobs: tuple[float, ...]  # [T] nats, of the distribution that was sampled from (temperature applied)
    ended: Ended  # "eos": it ended by itself; "length": it was cut
    version: int  # of the adapter that wrote it; 0 is the starting point
    text: str  # decoded once, special tokens removed


@dataclass(frozen=True, slots=True)
class AnswerGroup:
    """A prompt and its answers (ten, unless a recipe says otherwise)."""

    prompt: Prompt
    answers: tuple[Answer, ...]


@dataclass(frozen=True, slots=True)
class Ranking:
    """Who found which answers of a group better.

    `tiers` holds answer indices, best tier first; several in one tier are a tie; answers that are in no tier were
    not ranked.
    """

    prompt_id: str
    tiers: tuple[tuple[int, ...], ...]
    by: str  # "rules", "reward", or a person's name
    round: int = 0


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter on its way to an engine. Its tensors are only read: many processes may share their memory."""

    version: int
    tensors: Mapping[str, torch.Tensor]  # PEFT's names; no scalar head among them; CPU
    config: Mapping[str, object]  # PEFT's adapter_config.json
    checksum: str  # rlhf.checksum.checksum(tensors), hex

    def __reduce__(self) -> tuple[Callable[..., Adapter], tuple[object, ...]]:
        return _received, (self.version, packed(self.tensors), self.config, self.checksum)


def _received(version: int, tensors: Packed, config: Mapping[str, object], checksum: str) -> Adapter:
    return Adapter(version, unpacked(tensors), config, checksum)


@dataclass(frozen=True, slots=True)
class RoleState:
    """What a role must keep to go on exactly: named tensors, and plain values that JSON can hold."""

    tensors: Mapping[str, torch.Tensor]
    values: Mapping[str, object] = field(default_factory=dict[str, object])


@dataclass(frozen=True, slots=True)
class Sampling:
    """How answers are drawn. `temperature` 0 is greedy."""

    n: int = 10
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    max_answer_tokens: int = 256


@dataclass(frozen=True, slots=True)
class Rollout:
    """One step's experience, ready to train on. All tensors on CPU, float32 unless said."""

    step: int
    groups: tuple[AnswerGroup, ...]  # P groups, N answers in all
    mask: torch.Tensor  # [N, T] bool, true at answer tokens
    selected: torch.Tensor  # [N] bool, answers that the update uses
    sampling_logprobs: torch.Tensor  # [N, T] nats, of the engine
    old_logprobs: torch.Tensor | None  # [N, T] nats, of the policy before the update; None: the update's own serve
    ref_logprobs: torch.Tensor | None  # [N, T] nats; None where no KL is used in the loss
    values: torch.Tensor | None  # [N, T]; None without a critic
    advantages: torch.Tensor  # [N, T]
    returns: torch.Tensor | None  # [N, T]; None without a critic
    scores: torch.Tensor  # [N] raw, before penalty and ranking
    beta: float  # KL coefficient in force at this step
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])  # objective/*, sampling/*, completions/*
