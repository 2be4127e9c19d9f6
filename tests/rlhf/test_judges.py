"""Scorers and judges, and the one place where a score that is not finite is met."""

from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch

from configs.schema import Recipe
from rlhf.errors import ScoreError
from rlhf.judges import RewardScorer, ScoreJudge, WeightedScorer, checked_scores, make_judge, make_scorer
from rlhf.ports import Team
from rlhf.records import Answer, AnswerGroup, Message, Prompt, RoleState

NAN, INF = float("nan"), float("inf")


def group(name: str, num: int) -> AnswerGroup:
    answers = tuple(Answer((1,), (0.0,), "eos", 0, f"Answer {index} words" + " more" * index) for index in range(num))
    return AnswerGroup(Prompt(name, (Message("user", f"Question {name}?"),), (1,)), answers)


TWO = [group("a", 2), group("b", 3)]


class FakeScorer:
    """Gives fixed scores by prompt; later calls take later lists where there are some."""

    name = "fake"

    def __init__(self, **by_prompt: list[list[float]]) -> None:
        self._by_prompt = by_prompt
        self.asked: list[list[str]] = []

    def scores(self, groups: Sequence[AnswerGroup]) -> torch.Tensor:
        self.asked.append([g.prompt.id for g in groups])
        flat: list[float] = []
        for g in groups:
            lists = self._by_prompt[g.prompt.id]
            flat += lists.pop(0) if len(lists) > 1 else lists[0]
        return torch.tensor(flat)


class FakeReward:
    """Scores by length of text."""

    def scores(self, groups: Sequence[AnswerGroup]) -> torch.Tensor:
        return torch.tensor([float(len(answer.text)) for g in groups for answer in g.answers])

    def fit(self, groups: object, rankings: object) -> dict[str, float]:
        return {}

    def normalise(self, gain: float, bias: float) -> None: ...

    def state(self) -> RoleState:
        return RoleState({})

    def load_state(self, state: RoleState) -> None: ...


class LazyTeam:
    """A team whose reward model is counted when it is started."""

    def __init__(self) -> None:
        self.started = 0

    @property
    def reward(self) -> FakeReward:
        self.started += 1
        return FakeReward()


def recipe(**sections: object) -> Recipe:
    base = {"name": "a", "model": {"path": "m"}, "data": {"prompts": "p"}, "rules": [{"name": "short"}]}
    return Recipe.model_validate(base | sections)


def team() -> tuple[LazyTeam, Team]:
    lazy = LazyTeam()
    return lazy, cast(Team, lazy)


def test_a_judge_ranks_by_score_with_ties():
    judge = ScoreJudge(FakeScorer(a=[[1.0, 2.0]], b=[[0.5, 0.3, 0.5]]))
    first, second = judge.rank(TWO)
    assert (first.prompt_id, first.tiers, first.by) == ("a", ((1,), (0,)), "fake")
    assert second.tiers == ((0, 2), (1,))


def test_scores_nearer_than_the_margin_are_a_tie():
    (ranking, _) = ScoreJudge(FakeScorer(a=[[1.0, 1.05]], b=[[0.0, 0.0, 0.0]]), tie_margin=0.1).rank(TWO)
    assert ranking.tiers == ((0, 1),)


def test_scores_that_are_finite_pass_unchanged():
    scores, kept, num_dropped = checked_scores(FakeScorer(a=[[1, 2]], b=[[3, 4, 5]]), TWO, "stop")
    assert (scores.tolist(), kept, num_dropped) == ([1, 2, 3, 4, 5], TWO, 0)


def test_no_groups_give_no_scores():
    scores, kept, num_dropped = checked_scores(FakeScorer(), [], "stop")
    assert (scores.shape, kept, num_dropped) == ((0,), [], 0)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_stop_names_scorer_prompt_and_answer(bad: float):
    with pytest.raises(ScoreError, match=rf"fake gave answer 2 to prompt b .*Question b.*score {bad}.*drop"):
        checked_scores(FakeScorer(a=[[1, 2]], b=[[3, bad, 5]]), TWO, "stop")


def test_drop_leaves_the_whole_group_out_and_counts_it():
    scores, kept, num_dropped = checked_scores(FakeScorer(a=[[1, NAN]], b=[[3, 4, 5]]), TWO, "drop")
    assert (scores.tolist(), kept, num_dropped) == ([3, 4, 5], TWO[1:], 1)


def test_dropping_every_group_is_an_error():
    with pytest.raises(ScoreError, match="not one of 2 groups"):
        checked_scores(FakeScorer(a=[[1, NAN]], b=[[3, NAN, 5]]), TWO, "drop")


def test_retry_asks_again_for_the_failed_groups_only():
    scorer = FakeScorer(a=[[1, 2]], b=[[3, NAN, 5], [NAN, 4, 5], [3, 4, 5]])
    scores, kept, num_dropped = checked_scores(scorer, TWO, "retry")
    assert (scores.tolist(), kept, num_dropped) == ([1, 2, 3, 4, 5], TWO, 0)
    assert scorer.asked == [["a", "b"], ["b"], ["b"]]


def test_retry_gives_up_after_three_tries():
    scorer = FakeScorer(a=[[1, 2]], b=[[3, NAN, 5]])
    with pytest.raises(ScoreError, match="score nan"):
        checked_scores(scorer, TWO, "retry")
    assert len(scorer.asked) == 3


def test_a_judge_leaves_dropped_groups_out():
    rankings = ScoreJudge(FakeScorer(a=[[1, NAN]], b=[[1, 2, 3]]), on_bad_score="drop").rank(TWO)
    assert [ranking.prompt_id for ranking in rankings] == ["b"]


def test_a_weighted_scorer_sums_and_passes_failure_on():
    one, two = FakeScorer(a=[[1, 2]], b=[[3, 4, NAN]]), FakeScorer(a=[[10, 20]], b=[[30, 40, 50]])
    scorer = WeightedScorer([(one, 1.0), (two, 0.5)])
    assert scorer.scores(TWO)[:4].tolist() == [6, 12, 18, 24]
    assert scorer.scores(TWO)[4].isnan()
    assert scorer.name == "1 fake + 0.5 fake"


@pytest.mark.parametrize(
    ("spec", "name", "starts"),
    [
        ("rules", "rules", 0),
        ("reward", "reward", 1),
        ({"rules": 1.0}, "1 rules", 0),
        ({"reward": 1.0, "rules": 0.5}, "1 reward + 0.5 rules", 1),
    ],
)
def test_a_scorer_is_made_as_the_recipe_says_and_starts_only_what_it_uses(spec: Any, name: str, starts: int):
    lazy, as_team = team()
    scorer = make_scorer(spec, recipe(), as_team)
    assert scorer.name == name
    assert lazy.started == starts
    assert scorer.scores(TWO).shape == (5,)


def test_the_reward_scorer_is_the_reward_model():
    assert RewardScorer(FakeReward()).scores(TWO[:1]).tolist() == [14, 19]


def test_a_judge_by_rules_prefers_the_shorter():
    lazy, as_team = team()
    judge = make_judge("rules", recipe(rank={"tie_margin": 0}), as_team)
    assert judge.rank(TWO[1:])[0].tiers == ((0,), (1,), (2,))
    assert (judge.name, lazy.started) == ("rules", 0)
    assert make_judge("reward", recipe(), as_team).rank(TWO[1:])[0].tiers == ((2,), (1,), (0,))
