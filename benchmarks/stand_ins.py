"""Roles that compute nothing: they take as long as they are told, and answer with as much data as real ones."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cluster.placement import Role
from cluster.worker import Device, Site, Worker
from configs.schema import Recipe
from rlhf.checksum import checksum
from rlhf.records import Adapter, Answer, AnswerGroup, Prompt, RoleState, Rollout, Sampling

SECONDS = "stand-ins.json"  # in the folder of runs


@dataclass(frozen=True, slots=True)
class StandInSeconds:
    """How long each kind of work takes, and how large an adapter is."""

    generate_s: float
    forward_s: float
    update_s: float
    adapter_mib: int

    @property
    def train_s(self) -> float:
        """Logprobs of policy and reference and values, at the same time; then both updates, at the same time."""
        return self.forward_s + self.update_s


class CountedWorker(Worker):
    """A worker whose GPU Ray counts, and nobody has: its process group is that of CPUs."""

    def __init__(self, group: str, rank: int, world_size: int, device: Device) -> None:
        super().__init__(group, rank, world_size, "cpu")


class Trained:
    """Policy, critic or reference."""

    def __init__(self, site: Site, recipe: Recipe) -> None:
        self._seconds = _seconds(recipe)
        self._version = 0
        self._tensors = {"lora_B": torch.zeros(self._seconds.adapter_mib << 18)}  # float32
        self._checksum = checksum(self._tensors)  # once: it is work, and here all workers share a machine

    def adapter(self) -> Adapter:
        return Adapter(self._version, self._tensors, {}, self._checksum)

    def logprobs(self, groups: Sequence[AnswerGroup], temperature: float | None = None) -> torch.Tensor:
        if temperature is None:  # else it is the canary, whose one row takes no time
            time.sleep(self._seconds.forward_s)
        lengths = [len(answer.token_ids) for group in groups for answer in group.answers]
        return torch.full((len(lengths), max(lengths, default=0)), -1.0)

    def values(self, groups: Sequence[AnswerGroup]) -> torch.Tensor:
        return self.logprobs(groups)

    def update(self, rollout: Rollout) -> dict[str, float]:
        time.sleep(self._seconds.update_s)
        self._version += 1
        return {}

    def state(self) -> RoleState:
        return RoleState(self._tensors, {"version": self._version})


class Engine:
    """A generator whose answers have all the tokens that are allowed."""

    def __init__(self, site: Site, recipe: Recipe) -> None:
        self._seconds = _seconds(recipe)
        self._version = 0

    def load_adapter(self, adapter: Adapter) -> dict[str, float]:
        self._version = adapter.version
        return {}

    def answer(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[AnswerGroup]:
        time.sleep(self._seconds.generate_s)
        num = sampling.max_answer_tokens
        return [
            AnswerGroup(
                prompt,
                tuple(
                    Answer(
                        tuple(range(seed % 30_000, seed % 30_000 + num)),
                        (-1.0,) * num,
                        "length",
                        self._version,
                        "word " * num,
                    )
                    for _ in range(sampling.n)
                ),
            )
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]

    def canary_logprobs(self, token_ids: Sequence[int]) -> tuple[list[float], list[float]]:
        return [-1.0] * (len(token_ids) - 1), [-2.0] * (len(token_ids) - 1)


def _seconds(recipe: Recipe) -> StandInSeconds:
    return StandInSeconds(**json.loads((Path(recipe.runs) / SECONDS).read_text()))


FACTORIES: Mapping[Role, str] = {
    "policy": f"{__name__}:{Trained.__name__}",
    "critic": f"{__name__}:{Trained.__name__}",
    "reference": f"{__name__}:{Trained.__name__}",
    "generator": f"{__name__}:{Engine.__name__}",
}
