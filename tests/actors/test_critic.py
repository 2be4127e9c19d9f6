"""The critic: values start at zero (or at the reward model's scores) and learn the returns."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.base import Base
from actors.critic import Critic
from actors.reward import Reward
from configs.schema import Recipe
from rlhf.records import Answer, AnswerGroup
from rlhf.rollout import answer_mask
from tests.actors.ranks import EPS, distance, make_groups, make_rankings, rollout_of, same_bits
from tests.recipes import tiny_recipe

pytestmark = pytest.mark.engine


def make_recipe(model: Path, folder: Path, **learner: Any) -> Recipe:
    cut = {"micro_batch_tokens": 10_000, "rows": "shared"} | learner
    return tiny_recipe(
        model,
        folder,
        learner=cut,
        ppo={"kl": {"beta": 0.0}, "value_clip": None, "critic_optimizer": {"lr": 1e-3, "eps": EPS}},
    )


def make_critic(recipe: Recipe) -> Critic:
    return Critic(Base(recipe.model, recipe.lora, seed=recipe.seed), recipe, 0, 1)


def without_last(answer: Answer) -> Answer:
    return dataclasses.replace(answer, token_ids=answer.token_ids[:-1], logprobs=answer.logprobs[:-1])


def test_values_are_zero_at_the_start(tiny_model: Path, tmp_path: Path, process_group: None):
    groups = make_groups()
    values = make_critic(make_recipe(tiny_model, tmp_path)).values(groups)
    assert values.shape == answer_mask(groups).shape
    assert not values.any()


def test_the_first_loss_is_half_the_mean_square_of_the_returns(tiny_model: Path, tmp_path: Path, process_group: None):
    recipe = make_recipe(tiny_model, tmp_path)
    rollout = rollout_of(make_groups(), recipe, None)
    metrics = make_critic(recipe).update(rollout)
    assert rollout.returns is not None
    assert metrics["loss/value_avg"] == pytest.approx(float(rollout.returns[rollout.mask].square().mean()) / 2)
    assert metrics["val/clipfrac_avg"] == 0
    assert metrics["critic/grad_norm"] > 0


def test_values_learn_the_returns(tiny_model: Path, tmp_path: Path, process_group: None):
    recipe = make_recipe(tiny_model, tmp_path)
    critic = make_critic(recipe)
    groups = make_groups()
    rollout = rollout_of(groups, recipe, None)
    losses = [critic.update(rollout)["loss/value_avg"] for _ in range(30)]
    assert losses[-1] < 0.3 * losses[0]
    assert rollout.returns is not None
    left = (critic.values(groups) - rollout.returns)[rollout.mask].square().mean() / 2
    assert critic.update(rollout)["loss/value_avg"] == pytest.approx(float(left), rel=1e-4)


@pytest.mark.parametrize("learner", [{"micro_batch_tokens": 30}, {"rows": "separate"}, {"zero_stage": 1}])
def test_an_update_is_the_same_however_it_is_split(
    tiny_model: Path, tmp_path: Path, process_group: None, learner: dict[str, Any]
):
    results: list[Any] = []
    for changes in ({}, learner):
        recipe = make_recipe(tiny_model, tmp_path, **changes)
        critic = make_critic(recipe)
        for step in range(3):
            metrics = critic.update(rollout_of(make_groups(seed=step), recipe, None, step))
        tensors = {n: t for n, t in critic.state().tensors.items() if n.startswith("model.")}
        results.append((tensors, metrics))
    assert distance(results[0][0], results[1][0]) < 1e-5
    assert results[1][1] == pytest.approx(results[0][1], rel=1e-3)


def test_a_critic_started_from_the_reward_model_ends_at_its_score(
    tiny_model: Path, tmp_path: Path, process_group: None
):
    recipe = make_recipe(tiny_model, tmp_path)
    base = Base(recipe.model, recipe.lora, seed=0)
    reward, critic = Reward(base, recipe, 0, 1), Critic(base, recipe, 0, 1)
    groups = make_groups()
    reward.fit(groups, make_rankings(groups))
    reward.normalise(2.5, -0.75)
    critic.start_from(reward.state())
    values = critic.values(groups)
    # The value before an answer's last token is the score of that answer without it.
    shorter = [
        AnswerGroup(group.prompt, tuple(without_last(a) for a in group.answers if len(a.token_ids) > 1))
        for group in groups
    ]
    lengths = torch.tensor([len(a.token_ids) for group in groups for a in group.answers])
    kept = lengths > 1
    assert torch.allclose(values[kept, lengths[kept] - 1], reward.scores(shorter), atol=1e-5)


def test_three_updates_a_resume_and_three_more_are_six_bit_for_bit(
    tiny_model: Path, tmp_path: Path, process_group: None
):
    recipe = make_recipe(tiny_model, tmp_path)
    straight, resumed = make_critic(recipe), make_critic(recipe)
    for step in range(6):
        if step == 3:
            resumed.load_state(straight.state())
        rollout = rollout_of(make_groups(seed=step), recipe, None, step)
        metrics = straight.update(rollout)
        if step >= 3:
            assert resumed.update(rollout) == metrics
    assert same_bits(resumed.state(), straight.state())
