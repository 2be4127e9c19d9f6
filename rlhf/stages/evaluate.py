"""Before and after: the judge, the reward model, and what was lost, on held-out prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rlhf.adapters import starting_adapter
from rlhf.checksum import checksum
from rlhf.errors import DataError, StoreError
from rlhf.judges import checked_scores, make_scorer
from rlhf.ports import Scorer
from rlhf.records import Adapter, AnswerGroup, Prompt, Sampling
from rlhf.seeds import request_seed
from rlhf.stages.context import Context
from rlhf.statistics import bootstrap_interval, win_rate
from rlhf.text import bits_per_byte, text_groups

NUM_EXAMPLES = 3
PROMPTS_PER_REQUEST = 16


@dataclass(frozen=True, slots=True)
class Side:
    """One model on the held-out prompts."""

    sampled: list[AnswerGroup]  # [P] groups of n
    greedy: list[AnswerGroup]  # [P] groups of 1
    scores: list[torch.Tensor]  # [P] tensors [n], the judge's
    figures: dict[str, float]


def run(context: Context) -> dict[str, object]:
    """The table before and after, and the win rate with its 95 % interval."""
    config, team = context.recipe.evaluate, context.team
    policy_state = context.store.load_role("policy")
    if policy_state is None:
        raise StoreError("evaluate: the run has no policy yet.", remedy="Run the stage `ppo` first.")
    team.policy.load_state(policy_state)
    context.store.cut_metrics("evaluate", 0)  # an interrupted evaluation starts again
    # Where a judge is not the reward model, its score is shown beside, if there is one and the recipe placed the role.
    has_reward = config.judge == "reward" or (
        context.recipe.uses_reward(context.recipe.stages) and context.store.load_role("reward") is not None
    )
    if has_reward:
        context.load_reward("evaluate.judge=reward")
    prompts = held_out(context, config.num_prompts)
    scorer = make_scorer(config.judge, context.recipe, team)
    adapter = team.policy.adapter()
    start = starting_adapter(context.recipe) or starting_point(adapter)
    before = side(context, "before", start, prompts, scorer, has_reward)
    after = side(context, "after", adapter, prompts, scorer, has_reward)
    wins = torch.stack([win_rate(b, a) for b, a in zip(before.scores, after.scores, strict=True)])
    low, high = bootstrap_interval(wins, num=config.bootstrap, seed=context.recipe.seed)
    context.tracker.log(
        "evaluate",
        context.recipe.rounds * context.recipe.ppo.num_steps,
        {
            f"evaluate/{name}_{key}": value
            for name, s in (("before", before), ("after", after))
            for key, value in s.figures.items()
        }
        | {"evaluate/win_rate": float(wins.mean()), "evaluate/win_rate_low": low, "evaluate/win_rate_high": high},
    )
    if has_reward and config.judge != "reward":
        rose = after.figures["reward_score"] - before.figures["reward_score"]
        grew = after.figures["judge_score"] - before.figures["judge_score"]
        warn_if_exploited(context, "evaluate", scorer.name, rose, grew)
    return {
        "judge": scorer.name,
        "judge_trained_on": config.judge in context.recipe.ppo.score_sources,
        "judge_ranked": config.judge == context.recipe.rank.judge and "reward" in context.recipe.ppo.score_sources,
        "before": before.figures,
        "after": after.figures,
        "win_rate": float(wins.mean()),
        "win_rate_low": low,
        "win_rate_high": high,
        "num_prompts": len(prompts),
        "num_answers": len(prompts) * context.sampling.n,
        "examples": [
            {"prompt": b.prompt.text, "before": b.answers[0].text, "after": a.answers[0].text}
            for b, a in zip(before.greedy[:NUM_EXAMPLES], after.greedy[:NUM_EXAMPLES], strict=True)
        ],
    }


def side(
    context: Context, name: str, adapter: Adapter, prompts: Sequence[Prompt], scorer: Scorer, has_reward: bool
) -> Side:
    """The figures of one model: the starting point, or the trained policy. The same seeds for both."""
    team = context.team
    team.generator.load_adapter(adapter)
    sampled = answers(context, prompts, context.sampling, f"evaluate {name}: sampled")
    greedy = answers(context, prompts, context.greedy, f"evaluate {name}: greedy")
    with context.console.task(f"evaluate {name}: score"):
        scores = scored(context, scorer, sampled)
        flat = [answer for group in sampled for answer in group.answers]
        figures = {
            "judge_score": float(torch.cat(scores).mean()),
            "greedy_judge_score": float(torch.cat(scored(context, scorer, greedy)).mean()),
            "mean_length": sum(len(answer.token_ids) for answer in flat) / len(flat),
            "ended_ratio": sum(answer.ended == "eos" for answer in flat) / len(flat),
            "kl": 0.0,
        }
        if has_reward:
            figures["reward_score"] = float(team.reward.scores(sampled).mean())
        model = team.policy if name == "after" else team.reference
        if name == "after":
            gap = team.policy.logprobs(sampled) - team.reference.logprobs(sampled)
            figures["kl"] = float(gap.sum(1).mean())
        if context.recipe.evaluate.text:
            texts = text_groups(context.recipe.evaluate.text, context.chat, context.recipe.evaluate.text_tokens)
            figures["bits_per_byte"] = bits_per_byte(model.logprobs(texts, temperature=1.0), texts)
    return Side(sampled, greedy, scores, figures)


def answers(context: Context, prompts: Sequence[Prompt], sampling: Sampling, label: str) -> list[AnswerGroup]:
    """[P] groups, with progress. Seeds depend on the prompt alone: both sides draw with the same ones."""
    groups: list[AnswerGroup] = []
    with context.console.task(label, total=len(prompts), unit="prompts") as task:
        for first in range(0, len(prompts), PROMPTS_PER_REQUEST):
            batch = prompts[first : first + PROMPTS_PER_REQUEST]
            seeds = [request_seed(context.recipe.seed, "evaluate", 0, 0, prompt.id) for prompt in batch]
            groups += context.team.generator.answer(batch, sampling, seeds)
            task.advance(len(batch))
    return groups


def scored(context: Context, scorer: Scorer, groups: list[AnswerGroup]) -> list[torch.Tensor]:
    """[P] tensors [n]. Evaluation compares pair by pair, so a score that failed stops it whatever the recipe says."""
    scores, _, _ = checked_scores(
        scorer, groups, "retry" if context.recipe.on_bad_score == "drop" else context.recipe.on_bad_score
    )
    return list(scores.split([len(group.answers) for group in groups]))


def held_out(context: Context, num: int) -> Sequence[Prompt]:
    """The first `num` held-out prompts."""
    prompts = context.prompts.held_out[:num]
    if not prompts:
        raise DataError(
            f"evaluate: data.held_out={context.recipe.data.held_out} leaves no prompt to evaluate on.",
            remedy="Raise data.held_out or bring more prompts.",
        )
    if len(prompts) < num:
        context.console.warn(f"evaluate: {num} held-out prompts were asked for, there are {len(prompts)}")
    return prompts


def starting_point(adapter: Adapter) -> Adapter:
    """An adapter that was begun on the base, before its first step: version 0, every `lora_B` zero."""
    tensors = {name: torch.zeros_like(t) if "lora_B" in name else t for name, t in adapter.tensors.items()}
    return dataclasses.replace(adapter, version=0, tensors=tensors, checksum=checksum(tensors))


def warn_if_exploited(context: Context, when: str, judge: str, score_grew: float, judge_grew: float) -> None:
    """Warns when what PPO was told to raise rose and the judge fell."""
    if score_grew > 0 > judge_grew:
        context.console.warn(
            f"{when}: the score that PPO raises rose by {score_grew:.2f} since the start, but the judge ({judge}) fell "
            f"by {-judge_grew:.2f}: the policy may be exploiting the score. A higher ppo.kl.beta, fewer steps, or more "
            "rankings help."
        )


class InLoop:
    """Greedy answers to a few held-out prompts, at intervals inside PPO."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._prompts: Sequence[Prompt] = ()
        self._first: dict[str, float] | None = None

    def measure(self, step: int) -> dict[str, float]:
        """`evaluate/judge_score` and `evaluate/score` now; warns when the score rose and the judge fell.

        The score is what PPO was told to raise (`ppo.score`).
        """
        context = self._context
        judge = make_scorer(context.recipe.evaluate.judge, context.recipe, context.team)
        scorer = make_scorer(context.recipe.ppo.score, context.recipe, context.team)
        self._prompts = self._prompts or held_out(context, context.recipe.ppo.evaluate_prompts)
        groups = context.team.generator.answer(self._prompts, context.greedy, [0] * len(self._prompts))
        metrics = {
            "evaluate/judge_score": float(torch.cat(scored(context, judge, groups)).mean()),
            "evaluate/score": float(torch.cat(scored(context, scorer, groups)).mean()),
        }
        if self._first is None:
            self._first = self._of_step_zero() or metrics
        grown = {name: value - self._first[name] for name, value in metrics.items()}
        warn_if_exploited(
            context, f"ppo step {step}", judge.name, grown["evaluate/score"], grown["evaluate/judge_score"]
        )
        return metrics

    def _of_step_zero(self) -> dict[str, float] | None:
        # Of the round: the reward model of another has another scale.
        began = self._context.ppo_steps.start
        rows = [r for r in self._context.store.metrics("ppo") if "evaluate/judge_score" in r and r["step"] > began]
        return rows[0] if rows else None
