from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from configs.ppo import PPOConfig
from rlhf.kl import kl_estimate
from rlhf.ranking_losses import normal_scores
from rlhf.records import AnswerGroup, Rollout
from rlhf.rollout import (
    answer_mask,
    make_rollout,
    needs_old_logprobs,
    needs_ref_logprobs,
    sampling_logprobs,
    sampling_metrics,
)
from tests.rlhf.made import make_answer, make_group, make_groups

NO_KL = {"kl": {"beta": 0.0}, "is_clip": None}
GROUP = {"advantage": "group", "kl": {"beta": 0.0}}


def rollout(groups: list[AnswerGroup], scores: list[float], **given: Any) -> Rollout:
    """A rollout whose logprobs and values are 0 unless given."""
    recipe = given.pop("config", {})
    config = PPOConfig.model_validate(recipe)
    zeros = torch.zeros(answer_mask(groups).shape)
    arguments: dict[str, Any] = {
        "old_logprobs": zeros,
        "ref_logprobs": zeros,
        "values": zeros if config.advantage == "gae" else None,
        "beta": config.kl.beta,
    }
    return make_rollout(0, groups, scores=torch.tensor(scores), config=config, **(arguments | given))


def test_answers_are_padded_on_the_right_to_the_longest():
    groups = [
        make_group([make_answer(1, logprobs=[-0.5]), make_answer(3, logprobs=[-1.0, -2.0, -3.0])]),
        make_group([make_answer(2, logprobs=[-4.0, -5.0])]),
    ]
    assert answer_mask(groups).tolist() == [[True, False, False], [True, True, True], [True, True, False]]
    expected = [[-0.5, 0.0, 0.0], [-1.0, -2.0, -3.0], [-4.0, -5.0, 0.0]]
    assert sampling_logprobs(groups).tolist() == expected


def test_the_score_comes_at_the_last_real_token_and_the_kl_at_each():
    groups = make_groups([[2, 3]])
    old = torch.tensor([[-1.0, -2.0, 0.0], [-1.0, -1.0, -1.0]])
    ref = torch.tensor([[-1.5, -1.0, 0.0], [-1.0, -3.0, -1.0]])
    config = {"kl": {"beta": 0.1}, "whiten": False, "gamma": 1.0, "lam": 1.0}
    made = rollout(groups, [5.0, 7.0], old_logprobs=old, ref_logprobs=ref, config=config)
    # Without values, discount or λ an advantage is the reward to go: score - 0.1 · what k1 is still to come.
    expected = [[5 - 0.1 * (0.5 - 1.0), 5 - 0.1 * -1.0, 0.0], [7 - 0.1 * 2.0, 7 - 0.1 * 2.0, 7.0]]
    torch.testing.assert_close(made.advantages, torch.tensor(expected))
    assert made.returns is not None
    torch.testing.assert_close(made.returns, torch.tensor(expected))
    assert made.metrics["objective/kl"] == pytest.approx((-0.5 + 2.0) / 2)
    assert made.metrics["objective/non_score_reward"] == pytest.approx(-0.1 * (-0.5 + 2.0) / 2)
    assert made.metrics["objective/rlhf_reward"] == pytest.approx(6.0 - 0.1 * 0.75)
    assert made.ref_logprobs is None  # spent in the reward


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_each_estimator_can_be_the_reward(estimator: Any):
    groups = make_groups([[3]])
    old, ref = torch.tensor([[-1.0, -2.0, -0.3]]), torch.tensor([[-1.5, -1.0, -0.7]])
    config = {"kl": {"beta": 0.5, "estimator": estimator}, "whiten": False, "lam": 0.0, "gamma": 0.0}
    made = rollout(groups, [2.0], old_logprobs=old, ref_logprobs=ref, config=config)
    expected = -0.5 * kl_estimate(old, ref, estimator) + torch.tensor([[0.0, 0.0, 2.0]])
    torch.testing.assert_close(made.advantages, expected)
    assert made.metrics["objective/kl"] == pytest.approx(0.5 - 1.0 + 0.4)  # k1 whatever the reward is


def test_beta_of_the_controller_is_used_and_kept():
    made = rollout(make_groups([[1]]), [0.0], ref_logprobs=torch.tensor([[-1.0]]), beta=0.25,
                   config={"whiten": False})  # fmt: skip
    assert made.beta == 0.25
    assert made.advantages.tolist() == [[-0.25]]


def test_an_answer_that_is_eos_alone_works():
    made = rollout(make_groups([[1, 2]]), [1.0, -1.0], config={"whiten": False, "lam": 1.0, **NO_KL})
    assert made.advantages.tolist() == [[1.0, 0.0], [-1.0, -1.0]]
    assert made.metrics["completions/mean_length"] == 1.5


@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e30])
def test_what_stands_at_padding_changes_nothing(garbage: float):
    groups = make_groups([[1, 3], [2, 3]])
    mask = answer_mask(groups)
    generator = torch.Generator().manual_seed(0)
    clean = [torch.randn(mask.shape, generator=generator) * mask for _ in range(3)]
    dirty = [x.where(mask, garbage) for x in clean]
    ours, theirs = (
        rollout(groups, [1.0, 2.0, 3.0, 5.0], old_logprobs=old, ref_logprobs=ref, values=values)
        for old, ref, values in (dirty, clean)
    )
    assert ours.metrics == theirs.metrics
    for name in ("advantages", "returns", "old_logprobs", "values"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))


def test_a_score_that_is_not_finite_is_refused():
    with pytest.raises(AssertionError, match="finite"):
        rollout(make_groups([[1, 1]]), [1.0, math.nan])


def test_logprobs_of_another_shape_are_refused():
    with pytest.raises(AssertionError, match="answers are"):
        rollout(make_groups([[1, 2]]), [1.0, 2.0], old_logprobs=torch.zeros(2, 3))


def cut_group() -> list[AnswerGroup]:
    """The first answer was cut by length; the others ended by themselves."""
    return [make_group([make_answer(2, "length"), make_answer(2), make_answer(2)])]


def test_the_penalty_for_a_missing_eos_comes_before_the_ranking():
    config = {"reward_from": "rank", "missing_eos": "penalty", "missing_eos_penalty": 5.0, "whiten": False, **NO_KL}
    made = rollout(cut_group(), [3.0, 2.0, 1.0], config=config)
    # By raw scores the cut answer would be the best; it is ranked last.
    best, _, worst = normal_scores([(0,), (1,), (2,)], 3).tolist()
    assert made.advantages[:, -1].tolist() == pytest.approx([worst, best, 0.0], abs=1e-6)
    assert made.metrics["objective/scores"] == pytest.approx(2.0)  # raw


def test_the_penalty_is_taken_off_the_score_of_cut_answers_only():
    config = {"missing_eos": "penalty", "missing_eos_penalty": 5.0, "whiten": False, **NO_KL}
    made = rollout(cut_group(), [3.0, 2.0, 1.0], config=config)
    assert made.advantages[:, -1].tolist() == [-2.0, 2.0, 1.0]
    assert made.scores.tolist() == [3.0, 2.0, 1.0]
    assert made.metrics["completions/clipped_ratio"] == pytest.approx(1 / 3)


def test_without_a_penalty_cut_answers_keep_their_score():
    made = rollout(cut_group(), [3.0, 2.0, 1.0], config={"whiten": False, **NO_KL})
    assert made.advantages[:, -1].tolist() == [3.0, 2.0, 1.0]


def test_rewards_from_ranks_are_the_normal_scores_of_each_group():
    groups = make_groups([[1, 1, 1], [1, 1]])
    config = {"reward_from": "rank", "whiten": False, **NO_KL}
    made = rollout(groups, [100.0, -3.0, 100.0, 0.1, 0.2], config=config)
    expected = [*normal_scores([(0, 2), (1,)], 3).tolist(), *normal_scores([(1,), (0,)], 2).tolist()]
    assert made.advantages[:, 0].tolist() == pytest.approx(expected)
    assert made.scores.tolist() == pytest.approx([100.0, -3.0, 100.0, 0.1, 0.2])
    assert made.metrics["objective/scores"] == pytest.approx(197.3 / 5)


def test_a_fully_tied_group_carries_no_signal_and_is_counted():
    groups = make_groups([[1, 1], [1, 1], [2, 2]])
    made = rollout(groups, [3.0, 3.0, 1.0, 2.0, 7.0, 7.0], config={"reward_from": "rank", **GROUP})
    assert made.advantages[[0, 1, 4, 5]].abs().max() == 0
    assert made.advantages[2:4].abs().min(dim=1).values.tolist() == [0.0, 0.0]  # padding
    assert made.advantages[2:4, 0].abs().min() > 0
    assert made.metrics["rankings/tied_groups"] == 2.0


def test_group_advantages_are_not_whitened_again_and_stand_at_every_token():
    groups = make_groups([[1, 2, 2], [1, 1]])
    config = {"advantage": "group", "kl": {"where": "loss"}}
    made = rollout(groups, [1.0, 2.0, 3.0, 5.0, 9.0], old_logprobs=None, config=config)
    one, pair = 1 / 1.0001, 2 / (math.sqrt(8) + 1e-4)
    expected = [[-one, 0.0], [0.0, 0.0], [one, one], [-pair, 0.0], [pair, 0.0]]
    torch.testing.assert_close(made.advantages, torch.tensor(expected))
    assert made.returns is None and made.values is None


def test_kl_in_the_loss_leaves_the_reward_alone_and_keeps_the_reference():
    groups = make_groups([[1, 2]])
    ref = torch.tensor([[-9.0, 0.0], [-9.0, -9.0]])
    config = {"advantage": "group_loo", "kl": {"where": "loss"}}
    made = rollout(groups, [1.0, 3.0], ref_logprobs=ref, old_logprobs=None, config=config)
    assert made.advantages.tolist() == [[-2.0, 0.0], [2.0, 2.0]]
    assert made.metrics["objective/non_score_reward"] == 0.0
    assert made.ref_logprobs is not None
    assert made.ref_logprobs.tolist() == ref.tolist()
    # The engine's own logprobs (-1 each) serve for the metrics, where the policy's are not computed.
    assert made.metrics["objective/kl"] == pytest.approx((8 + 16) / 2)
    assert made.metrics["objective/entropy"] == pytest.approx((1 + 2) / 2)


def test_advantages_are_whitened_over_all_tokens_of_all_answers():
    groups = make_groups([[1, 3], [2, 2]])
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4, 3, generator=generator)
    scores = [1.0, -2.0, 0.5, 3.0]
    plain = rollout(groups, scores, values=values, config={"whiten": False, **NO_KL})
    white = rollout(groups, scores, values=values, config=NO_KL)
    tokens = [float(plain.advantages[n, t]) for n, t in plain.mask.nonzero().tolist()]
    mean = sum(tokens) / 8
    std = math.sqrt(sum((x - mean) ** 2 for x in tokens) / 7)
    expected = [(x - mean) / std for x in tokens]
    assert white.advantages[white.mask].tolist() == pytest.approx(expected, abs=1e-5)
    assert plain.returns is not None and white.returns is not None
    torch.testing.assert_close(white.returns, plain.returns)  # the critic learns unwhitened returns


def test_selection_comes_after_whitening_and_by_penalised_rank():
    groups = [make_group([make_answer(1, "length"), *(make_answer(1) for _ in range(3))])]
    common = {"missing_eos": "penalty", "missing_eos_penalty": 50.0, **NO_KL}
    scores = [9.0, 1.0, 2.0, 3.0]
    part = rollout(groups, scores, config={"train_on": {"best": 1, "worst": 1}, **common})
    everything = rollout(groups, scores, config=common)
    assert part.selected.tolist() == [True, False, False, True]
    assert everything.selected.tolist() == [True] * 4
    assert torch.equal(part.advantages, everything.advantages)


def test_a_selection_of_nothing_is_refused():
    with pytest.raises(ValueError, match="nothing to train on"):
        PPOConfig.model_validate({"train_on": {"best": 0, "worst": 0}})


def test_ties_at_the_cut_are_selected_together():
    groups = make_groups([[1] * 4, [1] * 4])
    scores = [5.0, 5.0, 1.0, 0.0, 1.0, 2.0, 3.0, 3.0]
    made = rollout(groups, scores, config={"train_on": {"best": 1, "worst": 1}})
    assert made.selected.tolist() == [True, True, False, True, True, False, True, True]


def test_the_gap_between_trainer_and_engine_is_logged():
    groups = [make_group([make_answer(2, logprobs=[-1.0, -2.0]), make_answer(1, logprobs=[-0.5])])]
    old = torch.tensor([[-1.1, -2.0], [-0.5 + math.log(4), 0.0]])
    metrics = rollout(groups, [0.0, 1.0], old_logprobs=old, config={"is_clip": 2.0}).metrics
    assert metrics["sampling/logp_difference_mean"] == pytest.approx((0.1 + 0.0 + math.log(4)) / 3)
    assert metrics["sampling/logp_difference_max"] == pytest.approx(math.log(4))
    assert metrics["sampling/importance_ratio_mean"] == pytest.approx((math.exp(-0.1) + 1 + 2) / 3)
    plain = rollout(groups, [0.0, 1.0], old_logprobs=old, config={"is_clip": None}).metrics
    assert plain["sampling/importance_ratio_mean"] == pytest.approx((math.exp(-0.1) + 1 + 4) / 3)


def test_the_p99_of_the_gap_is_the_99th_of_a_hundred():
    gap = torch.arange(1, 101, dtype=torch.float32)[torch.randperm(100, generator=torch.Generator().manual_seed(0))]
    metrics = sampling_metrics(-gap, torch.zeros(100), None)
    assert metrics["sampling/logp_difference_p99"] == 99.0
    assert metrics["sampling/logp_difference_max"] == 100.0


def test_the_explained_variance_is_1_for_perfect_values_and_0_for_constant_ones():
    groups = make_groups([[1, 1, 1]])
    scores = [1.0, 2.0, 6.0]
    perfect = rollout(groups, scores, values=torch.tensor([[1.0], [2.0], [6.0]]), config=NO_KL)
    constant = rollout(groups, scores, values=torch.full((3, 1), 4.0), config=NO_KL)
    half_way = rollout(groups, scores, values=torch.tensor([[0.5], [1.0], [3.0]]), config=NO_KL)
    assert perfect.metrics["val/explained_var"] == pytest.approx(1.0)
    assert constant.metrics["val/explained_var"] == pytest.approx(0.0)
    assert half_way.metrics["val/explained_var"] == pytest.approx(0.75)


def test_metrics_bear_the_names_that_trl_users_know():
    made = rollout(make_groups([[1, 2]]), [1.0, 3.0], extra_metrics={"completions/dropped_groups": 1.0})
    assert set(made.metrics) == {
        "objective/scores",
        "objective/scores_std",
        "objective/kl",
        "objective/entropy",
        "objective/non_score_reward",
        "objective/rlhf_reward",
        "completions/mean_length",
        "completions/clipped_ratio",
        "completions/dropped_groups",
        "rankings/tied_groups",
        "sampling/logp_difference_mean",
        "sampling/logp_difference_max",
        "sampling/logp_difference_p99",
        "sampling/importance_ratio_mean",
        "val/explained_var",
    }
    assert made.metrics["objective/scores_std"] == pytest.approx(math.sqrt(2))


@pytest.mark.parametrize(
    ("recipe", "needed"),
    [
        ({"advantage": "group", "kl": {"where": "loss"}}, False),
        ({"advantage": "group_loo", "kl": {"beta": 0.0}}, False),
        ({"advantage": "group", "kl": {"where": "loss"}, "epochs": 2}, True),
        ({"advantage": "group", "kl": {"where": "loss"}, "num_minibatches": 2}, True),
        ({"advantage": "gae", "kl": {"where": "loss"}}, True),
        ({"advantage": "gae", "kl": {"where": "reward"}}, True),
    ],
)
def test_old_logprobs_are_needed_unless_the_updates_own_serve(recipe: dict[str, Any], needed: bool):
    assert needs_old_logprobs(PPOConfig.model_validate(recipe)) is needed


def test_the_reference_is_needed_where_there_is_a_kl_coefficient():
    assert needs_ref_logprobs(PPOConfig())
    assert not needs_ref_logprobs(PPOConfig.model_validate({"kl": {"beta": 0.0}}))


def test_without_a_reference_there_is_no_kl_metric():
    made = rollout(make_groups([[1, 2]]), [1.0, 3.0], ref_logprobs=None, config=NO_KL)
    assert "objective/kl" not in made.metrics


def test_kl_in_the_reward_without_the_policys_logprobs_is_refused():
    with pytest.raises(AssertionError, match="KL in the reward"):
        rollout(make_groups([[1, 2]]), [1.0, 3.0], old_logprobs=None)
