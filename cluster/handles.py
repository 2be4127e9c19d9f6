"""The roles as a stage sees them: each port, played by a group of workers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from cluster.group import Group
from rlhf.errors import SyncError
from rlhf.records import Adapter, AnswerGroup, Prompt, Ranking, RoleState, Rollout, Sampling

ENGINES_AGREE = 0.5  # nats, mean: far above bfloat16's noise, far below an adapter under the wrong name
Turn = Callable[[], AbstractContextManager[None]]


class Handle:
    """A role played by a group; `turn` is held during each call, where two groups share their GPUs.

    There are two ways to ask. *Together*: every rank gets the same and takes part, and rank 0's result counts (what
    trains is the same on all ranks). *Split*: each rank gets its part, and the results are put together in order.
    """

    def __init__(self, role: str, group: Group, turn: Turn) -> None:
        self.role, self.group, self._turn = role, group, turn

    def _together(self, method: str, *values: Any, **keywords: Any) -> Any:
        with self._turn():
            return self.group.call_first(self.role, method, *values, **keywords)

    def _split(self, method: str, groups: Sequence[AnswerGroup], **keywords: Any) -> torch.Tensor:
        """[N] or [N, T]. Every rank is called, one without groups too: with ZeRO-3 a forward pass needs them all."""
        parts = balanced([num_tokens(group) for group in groups], self.group.plan.num_workers)
        values = {rank: ([groups[index] for index in part],) for rank, part in enumerate(parts)}
        with self._turn():
            results = self.group.call_each(self.role, method, values, **keywords)
        return merged([len(group.answers) for group in groups], parts, results)


class StatefulHandle(Handle):
    """A role that can be saved and restored."""

    def state(self) -> RoleState:
        return self._together("state")

    def load_state(self, state: RoleState) -> None:
        self._together("load_state", state)


class PolicyHandle(StatefulHandle):
    """`ports.Policy` over a group."""

    def adapter(self) -> Adapter:
        return self._together("adapter")

    def logprobs(self, groups: Sequence[AnswerGroup], temperature: float | None = None) -> torch.Tensor:
        return self._split("logprobs", groups, temperature=temperature)

    def update(self, rollout: Rollout) -> dict[str, float]:
        return self._together("update", rollout)


class ReferenceHandle(Handle):
    """`ports.Reference` over a group."""

    def logprobs(self, groups: Sequence[AnswerGroup], temperature: float | None = None) -> torch.Tensor:
        return self._split("logprobs", groups, temperature=temperature)

    def base_logprobs(self, groups: Sequence[AnswerGroup], temperature: float | None = None) -> torch.Tensor:
        return self._split("base_logprobs", groups, temperature=temperature)


class RewardHandle(StatefulHandle):
    """`ports.Reward` over a group."""

    def scores(self, groups: Sequence[AnswerGroup]) -> torch.Tensor:
        return self._split("scores", groups)

    def fit(self, groups: Sequence[AnswerGroup], rankings: Sequence[Ranking]) -> dict[str, float]:
        return self._together("fit", list(groups), list(rankings))

    def normalise(self, gain: float, bias: float) -> None:
        self._together("normalise", gain, bias)


class CriticHandle(StatefulHandle):
    """`ports.Critic` over a group."""

    def values(self, groups: Sequence[AnswerGroup]) -> torch.Tensor:
        return self._split("values", groups)

    def update(self, rollout: Rollout) -> dict[str, float]:
        return self._together("update", rollout)

    def start_from(self, reward: RoleState) -> None:
        self._together("start_from", reward)


class GeneratorHandle(Handle):
    """`ports.Generator` over engines that do not know of each other."""

    def load_adapter(self, adapter: Adapter) -> dict[str, float]:
        """Sync metrics of the slowest engine, once all hold the adapter."""
        with self._turn():
            found = self.group.call_all(self.role, "load_adapter", adapter)
        return {name: max(metrics[name] for metrics in found) for name in found[0]}

    def answer(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[AnswerGroup]:
        """Prompts go to the engines in runs of nearly equal number; an answer depends on its seed alone."""
        num = self.group.plan.num_workers
        cuts = [len(prompts) * rank // num for rank in range(num + 1)]
        values = {
            rank: (list(prompts[first:last]), sampling, list(seeds[first:last]))
            for rank, (first, last) in enumerate(itertools.pairwise(cuts))
            if last > first
        }
        with self._turn():
            return [group for part in self.group.call_each(self.role, "answer", values) for group in part]

    def canary_logprobs(self, token_ids: Sequence[int]) -> tuple[list[float], list[float]]:
        """Twice [len(token_ids) - 1] nats of the first engine, once all agree. Raises SyncError."""
        with self._turn():
            found = self.group.call_all(self.role, "canary_logprobs", list(token_ids))
        first = torch.tensor(found[0])
        for rank, other in enumerate(found):
            gap = float((torch.tensor(other) - first).abs().mean(dim=1).max())
            if not gap < ENGINES_AGREE:
                raise SyncError(
                    f"Generator {rank} differs from generator 0 by {gap:.3g} nats on the canary.",
                    limit=f"The limit is {ENGINES_AGREE}: all must hold the same adapter.",
                    remedy="Resume the run: the adapter is sent again.",
                )
        return found[0]

    def sleep(self) -> None:
        """Gives the GPU's memory to the trainer beside it."""
        self.group.call_all(self.role, "sleep")

    def wake(self) -> None:
        """Takes the GPU's memory back."""
        self.group.call_all(self.role, "wake")


def num_tokens(group: AnswerGroup) -> int:
    """Tokens that a pass over the group's row has."""
    return len(group.prompt.token_ids) + sum(len(answer.token_ids) for answer in group.answers)


def balanced(costs: Sequence[int], num_parts: int) -> list[list[int]]:
    """Indices by part, ascending within each: the dearest first, each to the part that has the least so far.

    Ties go to the lower index and the lower part, so that the same costs are always split in the same way.
    """
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    loads = [0] * num_parts
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        lightest = min(range(num_parts), key=lambda part: (loads[part], part))
        parts[lightest].append(index)
        loads[lightest] += costs[index]
    return [sorted(part) for part in parts]


def merged(sizes: Sequence[int], parts: Sequence[Sequence[int]], results: Sequence[torch.Tensor]) -> torch.Tensor:
    """[N] or [N, T] in the order of the groups, padded with 0, from each part's rows.

    Args:
        sizes: answers of each group.
        parts: group indices of each part.
        results: [rows of the part] or [rows of the part, its longest answer].
    """
    if len(parts) == 1:
        return results[0]
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    widest = max(results, key=lambda result: result.shape[1] if result.ndim > 1 else 0)
    out = torch.zeros(sum(sizes), *widest.shape[1:], dtype=widest.dtype)
    for part, result in zip(parts, results, strict=True):
        rows = [starts[index] + answer for index in part for answer in range(sizes[index])]
        assert len(rows) == len(result), f"{len(result)} rows came back for {len(rows)} answers"
        if rows and out.ndim > 1:
            out[rows, : result.shape[1]] = result
        elif rows:
            out[rows] = result
    return out
