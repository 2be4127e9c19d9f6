"""Small worlds behind the ports: a model that is a table of logits, so that every stage runs without an engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from rlhf.checksum import checksum
from rlhf.records import Adapter, Answer, AnswerGroup, Message, Prompt, Ranking, RoleState, Rollout, Sampling

VOCABULARY = 8
EOS = 7


def prompt(name: str, length: int = 3) -> Prompt:
    return Prompt(name, (Message("user", name),), tuple(range(length)))


def answer(*token_ids: int, ended: str = "eos", version: int = 0, logprob: float = -1.0) -> Answer:
    text = " ".join(f"w{token}" for token in token_ids if token != EOS)
    return Answer(token_ids, (logprob,) * len(token_ids), ended, version, text)  # type: ignore[arg-type]


def group(name: str, *answers: Answer) -> AnswerGroup:
    return AnswerGroup(prompt(name), answers)


def padded(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


def flat(groups: Sequence[AnswerGroup]) -> list[Answer]:
    return [answer for group in groups for answer in group.answers]


class SilentConsole:
    """Keeps what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.tasks: dict[str, tuple[int | None, int]] = {}  # name -> (total, how much was done before)
        self.warned: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def warn(self, text: str) -> None:
        self.warned.append(text)

    @contextmanager
    def task(
        self, name: str, total: int | None = None, unit: str = "", patient: bool = False, before: int = 0
    ) -> Iterator[SilentConsole]:
        self.tasks[name] = (total, before)
        yield self

    def advance(self, num: int = 1, note: str = "") -> None: ...

    def begin(self, done: int) -> None: ...


class ListTracker:
    """Keeps what was logged, and hands it to a store if there is one."""

    def __init__(self, store: object | None = None) -> None:
        self.rows: list[tuple[str, int, dict[str, float]]] = []
        self.tables: list[tuple[str, int, str, list[list[object]]]] = []
        self._store = store

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        self.rows.append((stage, step, dict(metrics)))
        if self._store is not None:
            self._store.log(stage, step, metrics)  # type: ignore[attr-defined]

    def table(self, stage: str, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        assert all(len(row) == len(columns) for row in rows)
        self.tables.append((stage, step, name, [list(row) for row in rows]))


class TablePolicy:
    """A policy whose next token never depends on what was written: one logit per token; AdamW on them."""

    def __init__(self, lr: float = 0.3) -> None:
        self.logits = torch.zeros(VOCABULARY, requires_grad=True)
        self.version = 0
        self.optimizer = torch.optim.Adam([self.logits], lr=lr)
        self.rollouts: list[Rollout] = []

    def adapter(self) -> Adapter:
        tensors = {"lora_B": self.logits.detach().clone()}
        return Adapter(self.version, tensors, {}, checksum(tensors))

    def logprobs(self, groups: Sequence[AnswerGroup], temperature: float | None = None) -> torch.Tensor:
        with torch.no_grad():
            return self._logprobs(groups)

    def _logprobs(self, groups: Sequence[AnswerGroup]) -> torch.Tensor:
        logprobs = self.logits.log_softmax(0)
        return padded([logprobs[list(answer.token_ids)] for answer in flat(groups)])

    def update(self, rollout: Rollout) -> dict[str, float]:
        self.rollouts.append(rollout)
        logprobs = self._logprobs(rollout.groups)
        loss = -(logprobs * rollout.advantages * rollout.mask * rollout.selected[:, None]).sum() / rollout.mask.sum()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.version += 1
        return {"loss/policy_avg": float(loss.detach())}

    def state(self) -> RoleState:
        moments = self.optimizer.state.get(self.logits, {})
        tensors = {"logits": self.logits.detach().clone()}
        tensors |= {f"optimizer.{name}": torch.as_tensor(value).clone() for name, value in moments.items()}
        return RoleState(tensors, {"version": self.version})

    def load_state(self, state: RoleState) -> None:
        with torch.no_grad():
            self.logits.copy_(state.tensors["logits"])
        moments = {name.removeprefix("optimizer."): t for name, t in state.tensors.items() if "optimizer." in name}
        if moments:
            self.optimizer.state[self.logits] = {name: tensor.clone() for name, tensor in moments.items()}
        self.version = int(state.values["version"])  # type: ignore[call-overload]


class TableGenerator:
    """Samples from the logits that it was last given."""

    def __init__(self) -> None:
        self.logits = torch.zeros(VOCABULARY)
        self.version = 0
        self.requests: list[tuple[tuple[str, ...], tuple[int, ...]]] = []

    def load_adapter(self, adapter: Adapter) -> dict[str, float]:
        self.logits, self.version = adapter.tensors["lora_B"], adapter.version
        return {"sync/bytes": float(self.logits.nbytes)}

    def answer(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[AnswerGroup]:
        self.requests.append((tuple(prompt.id for prompt in prompts), tuple(seeds)))
        return [
            AnswerGroup(prompt, tuple(self._one(sampling, seed + i) for i in range(sampling.n)))
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]

    def _one(self, sampling: Sampling, seed: int) -> Answer:
        logprobs = self.logits.log_softmax(0)
        random = torch.Generator().manual_seed(seed % 2**63)
        tokens: list[int] = []
        while len(tokens) < sampling.max_answer_tokens and EOS not in tokens:
            greedy = sampling.temperature == 0
            token = logprobs.argmax() if greedy else torch.multinomial(logprobs.exp(), 1, generator=random)
            tokens.append(int(token))
        text = " ".join(f"w{token}" for token in tokens if token != EOS)
        chosen = tuple(float(logprobs[token]) for token in tokens)
        return Answer(tuple(tokens), chosen, "eos" if tokens[-1] == EOS else "length", self.version, text)

    def canary_logprobs(self, token_ids: Sequence[int]) -> tuple[list[float], list[float]]:
        both = (logits.log_softmax(0)[list(token_ids[1:])] for logits in (self.logits, torch.zeros(VOCABULARY)))
        with_adapter, without = (logprobs.tolist() for logprobs in both)
        return with_adapter, without


class TableReference:
    """The policy's starting point: the base, or the logits of an adapter that is continued."""

    def __init__(self, logits: torch.Tensor | None = None) -> None:
        self.logits = torch.zeros(VOCABULARY) if logits is None else logits

    def logprobs(self, groups: Sequence[AnswerGroup], temperature: float | None = None) -> torch.Tensor:
        logprobs = self.logits.log_softmax(0)
        return padded([logprobs[list(answer.token_ids)] for answer in flat(groups)])

    def base_logprobs(self, groups: Sequence[AnswerGroup], temperature: float | None = None) -> torch.Tensor:
        return TableReference().logprobs(groups)


class CountingReward:
    """Likes token 3: weight · its share of the answer. `fit` learns the sign from the rankings."""

    def __init__(self) -> None:
        self.weight, self.gain, self.bias = 0.0, 1.0, 0.0

    def scores(self, groups: Sequence[AnswerGroup]) -> torch.Tensor:
        raw = [self.weight * answer.token_ids.count(3) / len(answer.token_ids) for answer in flat(groups)]
        return self.gain * torch.tensor(raw) + self.bias

    def fit(self, groups: Sequence[AnswerGroup], rankings: Sequence[Ranking]) -> dict[str, float]:
        for group, ranking in zip(groups, rankings, strict=True):
            best, worst = group.answers[ranking.tiers[0][0]], group.answers[ranking.tiers[-1][0]]
            self.weight += best.token_ids.count(3) - worst.token_ids.count(3)
        return {"reward/loss": 0.0}

    def normalise(self, gain: float, bias: float) -> None:
        self.gain, self.bias = gain, bias

    def state(self) -> RoleState:
        return RoleState({"weight": torch.tensor(self.weight)}, {"gain": self.gain, "bias": self.bias})

    def load_state(self, state: RoleState) -> None:
        self.weight = float(state.tensors["weight"])
        self.gain, self.bias = float(state.values["gain"]), float(state.values["bias"])  # type: ignore[arg-type]


class MeanCritic:
    """One value for every state, moved toward the mean return."""

    def __init__(self) -> None:
        self.value = torch.zeros(())

    def values(self, groups: Sequence[AnswerGroup]) -> torch.Tensor:
        return padded([self.value.expand(len(answer.token_ids)) for answer in flat(groups)])

    def update(self, rollout: Rollout) -> dict[str, float]:
        assert rollout.returns is not None
        self.value = self.value + 0.5 * (rollout.returns[rollout.mask].mean() - self.value)
        return {"loss/value_avg": float(self.value)}

    def start_from(self, reward: RoleState) -> None:
        self.value = reward.tensors["weight"].clone()

    def state(self) -> RoleState:
        return RoleState({"value": self.value})

    def load_state(self, state: RoleState) -> None:
        self.value = state.tensors["value"].clone()


class FakeTeam:
    """All five roles in one process."""

    def __init__(self) -> None:
        self.policy = TablePolicy()
        self.reference = TableReference()
        self.reward = CountingReward()
        self.critic = MeanCritic()
        self.generator = TableGenerator()
        self.rested = 0

    def release(self, *roles: str) -> None:
        for role in roles:
            setattr(self, role, type(getattr(self, role))())

    def rest(self) -> None:
        self.release("policy", "reward", "critic", "generator")
        self.rested += 1

    def prepare(self, *roles: str) -> None:
        for role in roles:
            assert hasattr(self, role), role

    def stats(self) -> dict[str, float]:
        return {"memory/trainer-0_pss_gib": 1.0}


class WordChat:
    """Encodes text one character a token; decodes to words."""

    def encode(self, text: str) -> list[int]:
        return [ord(character) % VOCABULARY for character in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join("abcdefgh"[token] for token in ids)
