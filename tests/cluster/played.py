"""Roles light enough to play in a test's workers. Built there by dotted path."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cluster.placement import Role
from cluster.worker import Site
from rlhf.checksum import checksum
from rlhf.errors import ScoreError
from rlhf.records import Adapter, AnswerGroup, Prompt, RoleState, Rollout, Sampling
from tests.fakes import answer


class Echo:
    """Says who it is, and fails on demand."""

    def __init__(self, site: Site, settings: Any) -> None:
        self.site, self.settings = site, settings

    def who(self, *values: Any, loud: bool = False) -> str:
        said = f"{self.settings}{self.site.rank}/{self.site.world_size}{''.join(map(str, values))}"
        return said.upper() if loud else said

    def environment(self) -> dict[str, Any]:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
        return {name: os.environ[name] for name in names} | {"threads": torch.get_num_threads()}

    def sum_of_ranks(self) -> float:
        total = torch.tensor([float(self.site.rank + 1)])
        torch.distributed.all_reduce(total)
        return float(total)

    def bad_score(self) -> None:
        raise ScoreError("The score is nan.", limit="It must be finite.", remedy="Mend the rule.")

    def bug(self) -> None:
        raise KeyError(f"of rank {self.site.rank}")

    def bug_in_one(self) -> None:
        if self.site.rank == 1:
            raise KeyError("of rank 1")
        self.sum_of_ranks()  # waits for rank 1

    def meet(self, begun: Path, gate: Path) -> str:
        """What stands at the gate, once it is said there; two pipes, so nobody waits by sleeping."""
        begun.write_text("begun")
        return gate.read_text()

    def hang(self) -> None:
        threading.Event().wait()

    def die(self) -> None:
        os._exit(3)


class Numbers:
    """Policy, reference, reward and critic in one: an answer's number is that of its tokens, so order shows."""

    def __init__(self, site: Site, settings: Any) -> None:
        self.site = site
        self.base = site.once("base", object)  # one per worker, whatever its roles
        self.version = 0
        self.num_groups = 0

    def logprobs(self, groups: Sequence[AnswerGroup], temperature: float | None = None) -> torch.Tensor:
        self.num_groups = len(groups)
        rows = [torch.tensor(a.token_ids) * (temperature or 1.0) for group in groups for a in group.answers]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True) if rows else torch.zeros(0, 0)

    def values(self, groups: Sequence[AnswerGroup]) -> torch.Tensor:
        return -self.logprobs(groups)

    def scores(self, groups: Sequence[AnswerGroup]) -> torch.Tensor:
        return self.logprobs(groups).sum(1)

    def update(self, rollout: Rollout) -> dict[str, float]:
        self.version += 1
        return {"rank": float(self.site.rank), "scores": float(rollout.scores.sum())}

    def adapter(self) -> Adapter:
        tensors = {"lora_B": torch.tensor([float(self.version)])}
        return Adapter(self.version, tensors, {}, checksum(tensors))

    def state(self) -> RoleState:
        facts = {"rank": self.site.rank, "process": os.getpid(), "base": id(self.base), "num_groups": self.num_groups}
        return RoleState({"version": torch.tensor(self.version)}, facts)

    def load_state(self, state: RoleState) -> None:
        self.version = int(state.tensors["version"])


class Engine:
    """A generator whose answers are made of the request's seed."""

    def __init__(self, site: Site, settings: Any) -> None:
        self.site = site
        self.version = 0

    def load_adapter(self, adapter: Adapter) -> dict[str, float]:
        self.version = adapter.version
        return {"sync/load_s": float(self.site.rank)}

    def answer(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[AnswerGroup]:
        return [
            AnswerGroup(prompt, tuple(answer(seed, i, self.site.rank, version=self.version) for i in range(sampling.n)))
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]

    def canary_logprobs(self, token_ids: Sequence[int]) -> tuple[list[float], list[float]]:
        return [0.0] * (len(token_ids) - 1), [-1.0] * (len(token_ids) - 1)


FACTORIES: dict[Role, str] = {
    "policy": "tests.cluster.played:Numbers",
    "reference": "tests.cluster.played:Numbers",
    "reward": "tests.cluster.played:Numbers",
    "critic": "tests.cluster.played:Numbers",
    "generator": "tests.cluster.played:Engine",
}
