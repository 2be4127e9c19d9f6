"""Who scores and who ranks: scorers by rules, by the reward model, by a server or several; judges made of scorers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from configs.schema import Recipe
from configs.scores import is_address
from rlhf.errors import ScoreError
from rlhf.ports import Judge, Reward, Scorer, Team
from rlhf.rankings import tiers_from_scores
from rlhf.records import AnswerGroup, Ranking
from rlhf.remote_score import RemoteScorer
from rlhf.rules import TRIES, OnBadScore, RuleScorer


class RewardScorer:
    """The reward model as a scorer."""

    name = "reward"

    def __init__(self, reward: Reward) -> None:
        self._reward = reward

    def scores(self, groups: Sequence[AnswerGroup]) -> torch.Tensor:
        """[N] normalised scores of the reward model."""
        return self._reward.scores(groups)


class WeightedScorer:
    """Σ weight · score of several scorers; not finite where one of them is not."""

    def __init__(self, parts: Sequence[tuple[Scorer, float]]) -> None:
        self._parts = parts
        self.name = " + ".join(f"{weight:g} {scorer.name}" for scorer, weight in parts)

    def scores(self, groups: Sequence[AnswerGroup]) -> torch.Tensor:
        """[N] weighted sums."""
        return torch.stack([weight * scorer.scores(groups).float() for scorer, weight in self._parts]).sum(0)


class ScoreJudge:
    """Ranks by score, best first; scores nearer than `tie_margin` to the best of their tier are a tie."""

    def __init__(self, scorer: Scorer, tie_margin: float = 0.0, on_bad_score: OnBadScore = "stop") -> None:
        self._scorer, self._tie_margin = scorer, tie_margin
        self._on_bad_score: OnBadScore = on_bad_score
        self.name = scorer.name

    def rank(self, groups: Sequence[AnswerGroup]) -> list[Ranking]:
        """A ranking per group, in order; groups whose score failed are left out, where the recipe says drop."""
        scores, kept, _ = checked_scores(self._scorer, groups, self._on_bad_score)
        parts = scores.split([len(group.answers) for group in kept])
        return [
            Ranking(group.prompt.id, tiers_from_scores(part, self._tie_margin), by=self.name)
            for group, part in zip(kept, parts, strict=True)
        ]


def checked_scores(
    scorer: Scorer, groups: Sequence[AnswerGroup], on_bad_score: OnBadScore
) -> tuple[torch.Tensor, list[AnswerGroup], int]:
    """(scores [N of the kept groups], the kept groups, how many groups were dropped).

    The one place where a score that is not finite is met: `stop` raises ScoreError, `retry` asks for the scores of
    such groups again before it raises, `drop` leaves the whole group out. To drop every group raises ScoreError too.
    """
    if not groups:
        return torch.zeros(0), [], 0
    parts = _scored(scorer, groups)
    for _ in range(TRIES - 1 if on_bad_score == "retry" else 0):
        bad = [index for index, part in enumerate(parts) if not part.isfinite().all()]
        if bad:
            for index, part in zip(bad, _scored(scorer, [groups[index] for index in bad]), strict=True):
                parts[index] = part
    kept = [index for index, part in enumerate(parts) if part.isfinite().all()]
    if len(kept) < len(groups) and on_bad_score != "drop":
        raise _bad_score(scorer, groups, parts)
    if not kept:
        raise ScoreError(
            f"{scorer.name}: not one of {len(groups)} groups has scores that are all finite, so all were dropped.",
            remedy="Mend what scores; set on_bad_score=stop to see the first failure.",
        )
    return torch.cat([parts[index] for index in kept]), [groups[index] for index in kept], len(groups) - len(kept)


def make_scorer(spec: str | Mapping[str, float], recipe: Recipe, team: Team) -> Scorer:
    """The scorer that `ppo.score` or `evaluate.judge` names. Only the reward model that is used is started."""
    if isinstance(spec, str):
        if is_address(spec):
            return RemoteScorer(spec, recipe.score_server, recipe.on_bad_score)
        return RuleScorer(recipe.rules, recipe.on_bad_score) if spec == "rules" else RewardScorer(team.reward)
    return WeightedScorer([(make_scorer(name, recipe, team), weight) for name, weight in spec.items()])


def make_judge(name: str, recipe: Recipe, team: Team) -> Judge:
    """The judge that `rank.judge` names."""
    return ScoreJudge(make_scorer(name, recipe, team), recipe.rank.tie_margin, recipe.on_bad_score)


def _scored(scorer: Scorer, groups: Sequence[AnswerGroup]) -> list[torch.Tensor]:
    sizes = [len(group.answers) for group in groups]
    scores = scorer.scores(groups).detach().float().cpu()
    assert scores.shape == (sum(sizes),), f"{scorer.name}: {tuple(scores.shape)} scores for {sum(sizes)} answers"
    return list(scores.split(sizes))


def _bad_score(scorer: Scorer, groups: Sequence[AnswerGroup], parts: Sequence[torch.Tensor]) -> ScoreError:
    group, part = next(pair for pair in zip(groups, parts, strict=True) if not pair[1].isfinite().all())
    index = int((~part.isfinite()).nonzero()[0])
    return ScoreError(
        f"{scorer.name} gave answer {index + 1} to prompt {group.prompt.id} ({group.prompt.text[:60]!r}) the score "
        f"{float(part[index])}.",
        limit="A score must be finite.",
        remedy="Mend what scores, or set on_bad_score=drop to leave such groups out.",
    )
