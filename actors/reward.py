"""The reward model: a LoRA adapter and a scalar head, trained on rankings of whole groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch

from actors.base import Base
from actors.learner import Learner
from actors.passes import micro_batches_of
from configs.schema import Recipe
from rlhf.forward import last_token_hidden
from rlhf.minibatches import deal
from rlhf.ranking_losses import all_pairs_loss, plackett_luce_loss
from rlhf.rankings import Tiers, pairwise_accuracy
from rlhf.records import AnswerGroup, Ranking, RoleState
from rlhf.rows import MicroBatch

NAME = "reward"
LOSSES: dict[str, Callable[[torch.Tensor, Tiers], torch.Tensor]] = {
    "plackett_luce": plackett_luce_loss,
    "all_pairs": all_pairs_loss,
}


class Reward:
    """One rank's part of the reward model. All but `scores` are collective, and give the same on every rank.

    Args:
        base: the decoder; the adapter is attached to it here.
        recipe: the run's.
        rank: of this worker.
        world_size: workers of the group.
    """

    def __init__(self, base: Base, recipe: Recipe, rank: int, world_size: int) -> None:
        base.attach(NAME)
        self._base, self._recipe = base, recipe
        self._rank, self._world_size = rank, world_size
        self._head = base.reward_head(NAME)
        self._learner = Learner(base, NAME, self._head, recipe.reward.optimizer, recipe.learner, rank, world_size)
        self._loss_of = LOSSES[recipe.reward.loss]
        self._gain, self._bias = 1.0, 0.0

    def scores(self, groups: Sequence[AnswerGroup]) -> torch.Tensor:
        """[N] normalised scores, gain · head + bias, at each answer's last token; float32 on the CPU."""
        num_answers = sum(len(group.answers) for group in groups)
        raw = self._raw(micro_batches_of(groups, self._recipe.learner), num_answers)
        return self._gain * raw + self._bias

    def normalise(self, gain: float, bias: float) -> None:
        """Sets gain and bias, so that later scores are gain · head + bias."""
        self._gain, self._bias = float(gain), float(bias)

    def fit(self, groups: Sequence[AnswerGroup], rankings: Sequence[Ranking]) -> dict[str, float]:
        """Metrics of one optimizer step: the mean loss over the groups whose ranking says something.

        Every rank is given all groups and computes its share. A group may lie in several micro-batches although its
        loss needs all its scores: those are computed first without gradients, and the gradient of the loss with
        respect to each score then weighs that score's backward pass (gradient caching, Gao et al. 2021,
        arXiv:2101.06983). Groups that lie in one micro-batch need no such extra pass.
        """
        assert [group.prompt.id for group in groups] == [ranking.prompt_id for ranking in rankings]
        starts = [0, *accumulate(len(group.answers) for group in groups)]
        flat = [
            tuple(tuple(first + index for index in tier) for tier in ranking.tiers)
            for first, ranking in zip(starts, rankings, strict=False)
        ]
        telling = [place for place, tiers in enumerate(flat) if len(tiers) > 1]
        if not telling:
            return {"reward/num_groups": 0.0}
        learner = self._learner
        mine = [flat[place] for place in self._share(groups, rankings, telling)]
        indices = [index for tiers in mine for tier in tiers for index in tier]
        micro_batches = micro_batches_of(groups, self._recipe.learner, indices)
        slopes, sums_of_split = self._slopes_of_split(micro_batches, mine, starts[-1])

        def loss(micro_batch: MicroBatch) -> tuple[torch.Tensor, dict[str, float]]:
            scores, answers = self._heads(micro_batch)
            total = (slopes.to(scores.device)[answers] * scores).sum()
            whole = [tiers for tiers in mine if _lies_in(micro_batch, tiers)]
            if not whole:
                return total, {}
            everywhere = torch.zeros(starts[-1], device=scores.device).index_put((answers,), scores)
            added, sums = self._losses(everywhere, whole)
            return total + added, sums

        sums = learner.step(learner.pad(micro_batches), loss, len(telling))
        return _metrics(sums, learner.combine(sums_of_split), len(telling))

    def state(self) -> RoleState:
        """Adapter, head, optimizer, gain and bias."""
        state = self._learner.state()
        return RoleState(state.tensors, {**state.values, "gain": self._gain, "bias": self._bias})

    def load_state(self, state: RoleState) -> None:
        """Takes up a state exactly. Raises StoreError for one that does not fit."""
        self._learner.load_state(state)
        gain, bias = state.values["gain"], state.values["bias"]
        assert isinstance(gain, float) and isinstance(bias, float)
        self.normalise(gain, bias)

    def _share(self, groups: Sequence[AnswerGroup], rankings: Sequence[Ranking], telling: Sequence[int]) -> list[int]:
        """This rank's part of the groups, balanced by tokens."""
        costs = [
            len(groups[place].prompt.token_ids)
            + sum(len(groups[place].answers[index].token_ids) for tier in rankings[place].tiers for index in tier)
            for place in telling
        ]
        return [telling[item] for item in deal(costs, self._world_size)[self._rank]]

    def _slopes_of_split(
        self, micro_batches: Sequence[MicroBatch], mine: Sequence[Tiers], num_answers: int
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """(d loss / d score [N] of the groups that lie in several micro-batches and 0 elsewhere, their sums)."""
        split = [tiers for tiers in mine if not any(_lies_in(micro_batch, tiers) for micro_batch in micro_batches)]
        wanted = torch.tensor([index for tiers in split for tier in tiers for index in tier])
        touched = [m for m in micro_batches if bool(torch.isin(m.last_answer, wanted).any())]
        scores = self._raw(touched, num_answers).requires_grad_()
        if not split:
            return torch.zeros(num_answers), {}
        loss, sums = self._losses(scores, split)
        (slopes,) = torch.autograd.grad(loss, scores)
        return slopes, sums

    def _losses(self, scores: torch.Tensor, groups: Sequence[Tiers]) -> tuple[torch.Tensor, dict[str, float]]:
        """(sum of the groups' losses, what to report of them) from scores [N]."""
        loss = torch.stack([self._loss_of(scores, tiers) for tiers in groups]).sum()
        counts = [pairwise_accuracy(scores, tiers) for tiers in groups]
        sums = {
            "loss": float(loss.detach()),
            "right": sum(r for r, _ in counts),
            "pairs": float(sum(t for _, t in counts)),
        }
        return loss, sums

    def _raw(self, micro_batches: Sequence[MicroBatch], num_answers: int) -> torch.Tensor:
        """[N] float32 on the CPU: the head's scores of the answers in these micro-batches, 0 for others."""
        scores = torch.zeros(num_answers)
        for values, answers in self._learner.run(micro_batches, self._heads):
            scores[answers.cpu()] = values.float().cpu()
        return scores

    def _heads(self, micro_batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """(the head's scores [M], the answers' indices [M])."""
        hidden, answers = last_token_hidden(self._base.model, micro_batch)
        return self._head(hidden).squeeze(-1), answers


def _lies_in(micro_batch: MicroBatch, tiers: Tiers) -> bool:
    """Whether all ranked answers of a group are in this micro-batch."""
    inside = set(micro_batch.last_answer.tolist())
    return all(index in inside for tier in tiers for index in tier)


def _metrics(sums: dict[str, float], sums_of_split: dict[str, float], num_groups: int) -> dict[str, float]:
    def total(name: str) -> float:
        return sums.get(name, 0.0) + sums_of_split.get(name, 0.0)

    return {
        "reward/loss": total("loss") / num_groups,
        "reward/accuracy": total("right") / total("pairs"),
        "reward/grad_norm": sums["grad_norm"],
        "reward/lr": sums["lr"],
        "reward/num_groups": float(num_groups),
    }
