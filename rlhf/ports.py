"""What a stage needs of the world, as Protocols. `cluster/` builds the real ones; unit tests hand in fakes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Literal, Protocol

from rlhf.records import Adapter, AnswerGroup, Prompt, Ranking, RoleState, Rollout, Sampling

if TYPE_CHECKING:
    import torch  # as in rlhf.records

RoleName = Literal["policy", "reference", "reward", "critic", "generator"]


class Stateful(Protocol):
    """A role that can be saved and restored exactly."""

    def state(self) -> RoleState: ...

    def load_state(self, state: RoleState) -> None: ...


class Policy(Stateful, Protocol):
    """The model that is trained."""

    def adapter(self) -> Adapter:
        """The adapter as it is now; its version counts the updates since the start."""
        ...

    def logprobs(self, groups: Sequence[AnswerGroup], temperature: float | None = None) -> torch.Tensor:
        """[N, T] nats, 0 at padding, at `temperature` (None: the sampling temperature of the recipe)."""
        ...

    def update(self, rollout: Rollout) -> dict[str, float]:
        """Metrics of all epochs and minibatches of one step."""
        ...


class Reference(Protocol):
    """The frozen starting point that KL is measured against: the base, or the adapter that PPO continues."""

    def logprobs(self, groups: Sequence[AnswerGroup], temperature: float | None = None) -> torch.Tensor:
        """[N, T] nats, 0 at padding, at `temperature` (None: the sampling temperature of the recipe)."""
        ...

    def base_logprobs(self, groups: Sequence[AnswerGroup], temperature: float | None = None) -> torch.Tensor:
        """The same of the base with every adapter off."""
        ...


class Reward(Stateful, Protocol):
    """The reward model: a scalar per answer, at its last token."""

    def scores(self, groups: Sequence[AnswerGroup]) -> torch.Tensor:
        """[N] normalised scores: gain · head + bias."""
        ...

    def fit(self, groups: Sequence[AnswerGroup], rankings: Sequence[Ranking]) -> dict[str, float]:
        """Metrics of one optimizer step on one batch of whole groups."""
        ...

    def normalise(self, gain: float, bias: float) -> None:
        """Sets gain and bias, so that later scores are gain · head + bias."""
        ...


class Critic(Stateful, Protocol):
    """The value of each answer token's state."""

    def values(self, groups: Sequence[AnswerGroup]) -> torch.Tensor:
        """[N, T], value before each answer token is written, 0 at padding."""
        ...

    def update(self, rollout: Rollout) -> dict[str, float]:
        """Metrics of all epochs and minibatches of one step."""
        ...

    def start_from(self, reward: RoleState) -> None:
        """Starts adapter and head as those of the reward model (`value_init: reward`)."""
        ...


class Generator(Protocol):
    """The engine that writes answers."""

    def load_adapter(self, adapter: Adapter) -> dict[str, float]:
        """Sync metrics, once the engine is proved to hold this adapter. Raises SyncError."""
        ...

    def answer(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[AnswerGroup]:
        """One group per prompt, in order; one engine request each, with its own seed."""
        ...

    def canary_logprobs(self, token_ids: Sequence[int]) -> tuple[list[float], list[float]]:
        """Nats at temperature 1 of each token after the first, [len(token_ids) - 1]: with the adapter, and without."""
        ...


class Judge(Protocol):
    """Ranks the answers of a group. `name` goes into the rankings and the summary."""

    name: str

    def rank(self, groups: Sequence[AnswerGroup]) -> list[Ranking]: ...


class Scorer(Protocol):
    """Gives a number per answer: rules, the reward model, or a weighted sum of them."""

    name: str

    def scores(self, groups: Sequence[AnswerGroup]) -> torch.Tensor:
        """[N] raw scores; not finite where it failed."""
        ...


class Tracker(Protocol):
    """Where metrics go."""

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Records the metrics of one step of a stage; each stage counts its own steps from 1."""
        ...

    def table(
        self, stage: str, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[object]]
    ) -> None: ...


class Task(Protocol):
    """A piece of long work under way."""

    def advance(self, num: int = 1, note: str = "") -> None: ...

    def begin(self, done: int) -> None:
        """So much is done, and the work itself begins now: the time before says nothing of its rate."""
        ...


class Console(Protocol):
    """What the user sees."""

    def say(self, text: str) -> None: ...

    def warn(self, text: str) -> None: ...

    def task(
        self, name: str, total: int | None = None, unit: str = "", patient: bool = False, before: int = 0
    ) -> AbstractContextManager[Task]:
        """A progress bar with a rate where there is a terminal, plain lines elsewhere; never silent for 10 s.

        `patient`: it may take days, so while nothing changes it is told every ten minutes only. `before`: how much of
        `total` was done before it started, which no rate counts.
        """
        ...


class Team(Protocol):
    """The roles of a run, built when first asked for."""

    def prepare(self, *roles: RoleName) -> None:
        """Starts these roles, at the same time where they can be."""
        ...

    def release(self, *roles: RoleName) -> None:
        """Forgets these roles and what they learnt; they are started anew when asked for again."""
        ...

    def rest(self) -> None:
        """Ends all workers and gives their resources back; roles are started anew when asked for again."""
        ...

    @property
    def policy(self) -> Policy: ...

    @property
    def reference(self) -> Reference: ...

    @property
    def reward(self) -> Reward: ...

    @property
    def critic(self) -> Critic: ...

    @property
    def generator(self) -> Generator: ...

    def stats(self) -> dict[str, float]:
        """`memory/*` of the workers that are there, in GiB."""
        ...
