"""The reward model of `benchmarks/people.py`: actors/reward.py in one process, without Ray, trained again and again."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from actors.base import Base
from actors.reward import Reward
from benchmarks.our_sft import alone, peak_gib
from configs.schema import Recipe
from rlhf.ports import Task
from rlhf.records import AnswerGroup, RoleState
from rlhf.stages.reward import Ranked, batches

__all__ = ["Trainer", "alone", "peak_gib"]

Scores = dict[str, list[float]]  # of a list's answers, by prompt id


class Trainer:
    """A reward model with one loss, which begins each training anew from the same start."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._reward = Reward(Base(recipe.model, recipe.lora, seed=recipe.seed, device="cpu"), recipe, 0, 1)
        self._start: RoleState = self._reward.state()

    def trained_scores(self, train: Sequence[Ranked], held_out: Sequence[AnswerGroup], work: Task) -> dict[str, Any]:
        """Raw scores of the groups held out, each batch's loss, and what it took."""
        config, losses = self._recipe.reward, list[float]()
        began, began_cpu = time.perf_counter(), time.process_time()
        self._reward.load_state(self._start)
        num = -(-len(train) // config.groups_per_batch)
        for epoch in range(config.epochs):
            for batch in batches(train, num, self._recipe.seed, epoch):
                metrics = self._reward.fit([group for group, _ in batch], [ranking for _, ranking in batch])
                losses.append(metrics["reward/loss"])
                work.advance(len(batch), f"loss {metrics['reward/loss']:.3f}")
        trained_s = time.perf_counter() - began
        scores = self.scores(held_out, work)
        score_s = time.perf_counter() - began - trained_s
        cpu_s = time.process_time() - began_cpu  # what it would be on a machine that does nothing else
        return {"scores": scores, "losses": losses, "train_s": trained_s, "score_s": score_s, "cpu_s": cpu_s}

    def untrained_scores(self, groups: Sequence[AnswerGroup], work: Task) -> Scores:
        """Raw scores of the model as it starts: the base with a random head."""
        self._reward.load_state(self._start)
        return self.scores(groups, work)

    def scores(self, groups: Sequence[AnswerGroup], work: Task) -> Scores:
        """Raw scores of the model as it is."""
        scores: Scores = {}
        for group in groups:
            scores[group.prompt.id] = self._reward.scores([group]).tolist()
            work.advance(1)
        return scores
