"""From scored answers to what an update learns from: penalty, ranks, advantages, whitening, selection, in order."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from configs.ppo import PPOConfig
from rlhf.advantages import gae, group_advantages, group_loo, whiten
from rlhf.kl import kl_estimate
from rlhf.losses import importance_weights
from rlhf.ranking_losses import normal_scores, select
from rlhf.rankings import Tiers, tiers_from_scores
from rlhf.records import AnswerGroup, Rollout


def make_rollout(
    step: int,
    groups: Sequence[AnswerGroup],
    *,
    scores: torch.Tensor,
    old_logprobs: torch.Tensor | None,
    ref_logprobs: torch.Tensor | None,
    values: torch.Tensor | None,
    config: PPOConfig,
    beta: float,
    extra_metrics: Mapping[str, float] | None = None,
) -> Rollout:
    """One step's experience with its metrics. What the arguments hold at padding has no influence.

    Args:
        step: counts from 0.
        groups: P groups of N answers in all.
        scores: [N] raw and finite; scores that failed are dealt with before.
        old_logprobs: [N, T] nats, of the policy before the update; None where `needs_old_logprobs` is false.
        ref_logprobs: [N, T] nats; None where `needs_ref_logprobs` is false.
        values: [N, T]; None unless the advantage is "gae".
        config: the PPO section.
        beta: KL coefficient of this step.
        extra_metrics: to be carried along.
    """
    mask, sampled = answer_mask(groups), sampling_logprobs(groups)
    old, ref, values = (_real(x, mask) for x in (old_logprobs, ref_logprobs, values))
    scores = scores.detach().cpu().float()
    assert scores.shape == mask.shape[:1], f"{tuple(scores.shape)} scores for {len(mask)} answers"
    assert bool(scores.isfinite().all()), "scores that are not finite must be dropped or retried before a rollout"
    penalised = penalised_scores(groups, scores, config)
    tiers = rank_groups(groups, penalised)
    goals = penalised
    if config.reward_from == "rank":
        goals = torch.cat([normal_scores(t, len(g.answers)) for t, g in zip(tiers, groups, strict=True)])
    non_score = _kl_rewards(old, ref, mask, config, beta)
    advantages, returns = _advantages(groups, goals, non_score, values, mask, config)
    metrics = (
        _objective_metrics(scores, goals, non_score, sampled if old is None else old, ref)
        | _completion_metrics(groups)
        | {"rankings/tied_groups": float(sum(len(t) < 2 for t in tiers))}
        | (sampling_metrics(old[mask], sampled[mask], config.is_clip) if old is not None else {})
        | (_critic_metrics(values[mask], returns[mask]) if values is not None and returns is not None else {})
        | dict(extra_metrics or {})
    )
    return Rollout(
        step=step,
        groups=tuple(groups),
        mask=mask,
        selected=_selected(groups, tiers, config),
        sampling_logprobs=sampled,
        old_logprobs=old,
        ref_logprobs=ref if config.kl.where == "loss" else None,
        values=values,
        advantages=advantages,
        returns=returns,
        scores=scores,
        beta=beta,
        metrics=metrics,
    )


def needs_old_logprobs(config: PPOConfig) -> bool:
    """Whether the policy's logprobs must be known before the update.

    They need not where the update's own are the same: it makes a single optimizer step, and neither GAE nor a KL in
    the reward asks for them earlier.
    """
    single_step = config.epochs == 1 and config.num_minibatches == 1
    kl_in_reward = config.kl.where == "reward" and config.kl.beta > 0
    return not single_step or config.advantage == "gae" or kl_in_reward


def needs_ref_logprobs(config: PPOConfig) -> bool:
    """Whether the reference must be asked: wherever there is a KL coefficient."""
    return config.kl.beta > 0


def answer_mask(groups: Sequence[AnswerGroup]) -> torch.Tensor:
    """[N, T] bool, true at answer tokens."""
    lengths = torch.tensor([len(answer.token_ids) for group in groups for answer in group.answers])
    assert len(lengths) > 0 and int(lengths.min()) > 0, "every answer has at least one token"
    return torch.arange(int(lengths.max()))[None, :] < lengths[:, None]


def sampling_logprobs(groups: Sequence[AnswerGroup]) -> torch.Tensor:
    """[N, T] nats, the engine's, 0 at padding."""
    rows = [torch.tensor(answer.logprobs) for group in groups for answer in group.answers]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def penalised_scores(groups: Sequence[AnswerGroup], scores: torch.Tensor, config: PPOConfig) -> torch.Tensor:
    """[N] scores, less the penalty where an answer was cut by length, if the recipe asks for one."""
    if config.missing_eos == "none":
        return scores
    cut = torch.tensor([answer.ended == "length" for group in groups for answer in group.answers])
    return torch.where(cut, scores - config.missing_eos_penalty, scores)


def rank_groups(groups: Sequence[AnswerGroup], scores: torch.Tensor) -> list[Tiers]:
    """[P] tiers of each group by these scores [N]; equal scores are a tie."""
    return [tiers_from_scores(part) for part in torch.split(scores, [len(group.answers) for group in groups])]


def sampling_metrics(
    logprobs: torch.Tensor, sampling_logprobs: torch.Tensor, is_clip: float | None
) -> dict[str, float]:
    """`sampling/*`: the gap between trainer and engine over flat tokens [K], in nats, and the mean importance weight.

    A learner whose update's own logprobs serve as the old ones reports these itself. The p99 is the smallest gap that
    at least 99 % of the tokens do not exceed.
    """
    gap = (logprobs - sampling_logprobs).detach().abs().double()
    weights = importance_weights(logprobs, sampling_logprobs, math.inf if is_clip is None else is_clip)
    return {
        "sampling/logp_difference_mean": float(gap.mean()),
        "sampling/logp_difference_max": float(gap.max()),
        "sampling/logp_difference_p99": float(gap.kthvalue(math.ceil(0.99 * len(gap))).values),
        "sampling/importance_ratio_mean": float(weights.double().mean()),
    }


def _real(x: torch.Tensor | None, mask: torch.Tensor) -> torch.Tensor | None:
    """[N, T] float32 on the CPU with 0 at padding, whatever stood there."""
    if x is None:
        return None
    assert x.shape == mask.shape, f"{tuple(x.shape)} per token, but the answers are {tuple(mask.shape)}"
    return x.detach().cpu().float().where(mask, 0)


def _kl_rewards(
    old: torch.Tensor | None, ref: torch.Tensor | None, mask: torch.Tensor, config: PPOConfig, beta: float
) -> torch.Tensor:
    """[N, T] -β·KL per token, or 0 where KL is no part of the reward."""
    if config.kl.where != "reward" or beta == 0:
        return torch.zeros(mask.shape)
    assert old is not None and ref is not None, "KL in the reward needs logprobs of policy and reference"
    return -beta * kl_estimate(old, ref, config.kl.estimator)


def _advantages(
    groups: Sequence[AnswerGroup],
    goals: torch.Tensor,
    non_score: torch.Tensor,
    values: torch.Tensor | None,
    mask: torch.Tensor,
    config: PPOConfig,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(advantages, returns), both [N, T], whitened if the recipe says so; returns are None without a critic."""
    if config.advantage == "gae":
        assert values is not None, "GAE needs values"
        last = mask.sum(1) - 1
        rewards = non_score.clone()
        rewards[torch.arange(len(goals)), last] += goals
        advantages, returns = gae(rewards, values, mask, config.gamma, config.lam)
        return (whiten(advantages, mask) if config.whiten else advantages), returns
    assert not bool(non_score.any()), "the group methods take KL in the loss"
    sizes = [len(group.answers) for group in groups]
    if config.advantage == "group":
        per_answer = group_advantages(goals, sizes, config.scale)
    else:
        per_answer = group_loo(goals, sizes)
    return per_answer[:, None] * mask, None


def _selected(groups: Sequence[AnswerGroup], tiers: Sequence[Tiers], config: PPOConfig) -> torch.Tensor:
    """[N] bool, the answers that the update uses."""
    sizes = [len(group.answers) for group in groups]
    if config.train_on is None:
        return torch.ones(sum(sizes), dtype=torch.bool)
    best, worst = config.train_on.best, config.train_on.worst
    return torch.cat([select(t, size, best, worst) for t, size in zip(tiers, sizes, strict=True)])


def _objective_metrics(
    scores: torch.Tensor, goals: torch.Tensor, non_score: torch.Tensor, logprobs: torch.Tensor, ref: torch.Tensor | None
) -> dict[str, float]:
    """`objective/*` as TRL's users know them: sums per answer, then means over answers.

    `scores` are raw, before penalty and ranking. `rlhf_reward` is what is maximised: score or rank, after the penalty,
    and the KL in the reward. `entropy` is the sampled estimate, -Σ log p. `kl` is k1 whatever the reward uses, so that
    runs compare; where the update's own logprobs serve as the old ones, both are of the engine's logprobs.
    """
    per_answer = non_score.sum(1)
    metrics = {
        "objective/scores": float(scores.mean()),
        "objective/scores_std": float(scores.std()) if len(scores) > 1 else 0.0,
        "objective/non_score_reward": float(per_answer.mean()),
        "objective/rlhf_reward": float((per_answer + goals).mean()),
        "objective/entropy": float(-logprobs.sum(1).mean()),
    }
    if ref is not None:
        metrics["objective/kl"] = float(kl_estimate(logprobs, ref, "k1").sum(1).mean())
    return metrics


def _completion_metrics(groups: Sequence[AnswerGroup]) -> dict[str, float]:
    answers = [answer for group in groups for answer in group.answers]
    return {
        "completions/mean_length": sum(len(answer.token_ids) for answer in answers) / len(answers),
        "completions/clipped_ratio": sum(answer.ended == "length" for answer in answers) / len(answers),
    }


def _critic_metrics(values: torch.Tensor, returns: torch.Tensor) -> dict[str, float]:
    """`val/explained_var` over flat tokens, 1 - Var(R - V) / Var(R), before the update; 0 if all returns are equal."""
    spread = float(returns.double().var(unbiased=False))
    left = float((returns - values).double().var(unbiased=False))
    return {"val/explained_var": 1 - left / spread if spread > 0 else 0.0}
