"""The reward model: it learns rankings of whole groups, whatever the micro-batches."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.base import Base
from actors.reward import Reward
from configs.schema import Recipe
from rlhf.ranking_losses import all_pairs_loss, plackett_luce_loss
from rlhf.records import AnswerGroup, Ranking
from tests.actors.ranks import EPS, distance, make_groups, make_rankings, same_bits
from tests.recipes import tiny_recipe

pytestmark = pytest.mark.engine


def make_recipe(model: Path, folder: Path, loss: str = "plackett_luce", **learner: Any) -> Recipe:
    cut = {"micro_batch_tokens": 10_000, "rows": "shared"} | learner
    return tiny_recipe(model, folder, learner=cut, reward={"loss": loss, "optimizer": {"lr": 3e-3, "eps": EPS}})


def make_reward(recipe: Recipe) -> Reward:
    base = Base(recipe.model, recipe.lora, seed=recipe.seed, spread=recipe.learner.zero_stage == 3)
    return Reward(base, recipe, 0, 1)


def trained(reward: Reward) -> dict[str, torch.Tensor]:
    return {name: t for name, t in reward.state().tensors.items() if name.startswith("model.")}


def test_it_learns_a_toy_ranking(tiny_model: Path, tmp_path: Path, process_group: None):
    reward = make_reward(make_recipe(tiny_model, tmp_path))
    groups = make_groups()
    rankings = make_rankings(groups)
    metrics = [reward.fit(groups, rankings) for _ in range(25)]
    assert metrics[0]["reward/accuracy"] < 1
    assert metrics[-1]["reward/accuracy"] == 1
    assert metrics[-1]["reward/loss"] < 0.3 * metrics[0]["reward/loss"]
    scores = reward.scores(groups).split(4)
    for ranking, mine in zip(rankings, scores, strict=True):
        assert torch.argsort(mine, descending=True).tolist() == [index for (index,) in ranking.tiers]


@pytest.mark.parametrize("stage", [0, 3])
def test_on_a_bfloat16_base_scores_and_what_is_saved_are_float32(
    tiny_model: Path, tmp_path: Path, process_group: None, stage: int
):
    recipe = tiny_recipe(tiny_model, tmp_path, learner={"zero_stage": stage}, cluster={"placement": "separate"})
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"dtype": "bfloat16"})})
    reward = make_reward(recipe)
    groups = make_groups()
    losses = [reward.fit(groups, make_rankings(groups))["reward/loss"] for _ in range(8)]
    assert losses[-1] < losses[0]
    assert {reward.scores(groups).dtype, *(t.dtype for t in reward.state().tensors.values())} == {torch.float32}


@pytest.mark.parametrize("loss", ["plackett_luce", "all_pairs"])
def test_the_loss_is_the_mean_over_groups_of_the_loss_of_their_scores(
    tiny_model: Path, tmp_path: Path, process_group: None, loss: str
):
    reward = make_reward(make_recipe(tiny_model, tmp_path, loss))
    groups = make_groups()
    rankings = make_rankings(groups)
    of = {"plackett_luce": plackett_luce_loss, "all_pairs": all_pairs_loss}[loss]
    scores = reward.scores(groups).split(4)
    expected = sum(float(of(mine, r.tiers)) for mine, r in zip(scores, rankings, strict=True)) / 3
    assert reward.fit(groups, rankings)["reward/loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "learner", [{"micro_batch_tokens": 45}, {"micro_batch_tokens": 20}, {"micro_batch_tokens": 1}, {"rows": "separate"}]
)
def test_a_group_in_several_micro_batches_gives_the_same_update(
    tiny_model: Path, tmp_path: Path, process_group: None, learner: dict[str, Any]
):
    results: list[Any] = []
    for changes in ({}, learner):
        reward = make_reward(make_recipe(tiny_model, tmp_path, **changes))
        for step in range(2):
            groups = make_groups(seed=step)
            metrics = reward.fit(groups, make_rankings(groups))
        results.append((trained(reward), metrics))
    assert distance(results[0][0], results[1][0]) < 1e-5
    assert results[1][1] == pytest.approx(results[0][1], rel=1e-3)


def test_a_batch_of_full_ties_changes_nothing(tiny_model: Path, tmp_path: Path, process_group: None):
    reward = make_reward(make_recipe(tiny_model, tmp_path))
    groups = make_groups()
    before = reward.state()
    ties = [Ranking(group.prompt.id, ((0, 1, 2, 3),), by="test") for group in groups]
    assert reward.fit(groups, ties) == {"reward/num_groups": 0.0}
    assert same_bits(reward.state(), before)


def test_a_fully_tied_group_does_not_dilute_the_others(tiny_model: Path, tmp_path: Path, process_group: None):
    groups = make_groups()
    rankings = make_rankings(groups)
    tied = [*rankings[:2], Ranking(groups[2].prompt.id, ((0, 1, 2, 3),), by="test")]
    with_tie, without = (make_reward(make_recipe(tiny_model, tmp_path)) for _ in range(2))
    assert with_tie.fit(groups, tied) == without.fit(groups[:2], rankings[:2])
    assert same_bits(with_tie.state(), without.state())


def test_an_answer_that_was_not_ranked_has_no_part(tiny_model: Path, tmp_path: Path, process_group: None):
    (group,) = make_groups(1)
    other = dataclasses.replace(group.answers[3], token_ids=(1, 2, 3), logprobs=(-1.0, -1.0, -1.0))
    changed = AnswerGroup(group.prompt, (*group.answers[:3], other))
    partial = [Ranking(group.prompt.id, ((2,), (0, 1)), by="test")]
    one, two = (make_reward(make_recipe(tiny_model, tmp_path)) for _ in range(2))
    assert one.fit([group], partial) == two.fit([changed], partial)
    assert same_bits(one.state(), two.state())


def test_a_score_does_not_depend_on_the_other_answers(tiny_model: Path, tmp_path: Path, process_group: None):
    reward = make_reward(make_recipe(tiny_model, tmp_path))
    groups = make_groups()
    alone = [reward.scores([AnswerGroup(group.prompt, (answer,))]) for group in groups for answer in group.answers]
    assert torch.allclose(reward.scores(groups), torch.cat(alone), atol=1e-5)
    assert reward.scores([]).shape == (0,)


def test_scores_are_gain_times_head_plus_bias_also_after_a_resume(
    tiny_model: Path, tmp_path: Path, process_group: None
):
    recipe = make_recipe(tiny_model, tmp_path)
    reward = make_reward(recipe)
    groups = make_groups()
    reward.fit(groups, make_rankings(groups))
    raw = reward.scores(groups)
    reward.normalise(2.0, -1.0)
    assert torch.allclose(reward.scores(groups), 2 * raw - 1, atol=1e-6)
    resumed = make_reward(recipe)
    resumed.load_state(reward.state())
    assert torch.equal(resumed.scores(groups), reward.scores(groups))
    assert same_bits(resumed.state(), reward.state())
    assert resumed.fit(groups, make_rankings(groups)) == reward.fit(groups, make_rankings(groups))
