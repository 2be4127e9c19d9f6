"""A judge says which of the ten are better."""

from __future__ import annotations

import dataclasses

from rlhf.errors import DataError
from rlhf.judges import make_judge
from rlhf.stages import people
from rlhf.stages.context import Context


def run(context: Context) -> dict[str, object]:
    """How many groups were ranked, and how many of them are one big tie."""
    round = context.round
    groups = context.store.groups("sample", round)
    if not groups:
        raise DataError("rank: there are no answers to rank", remedy="run the stage `sample` first")
    if context.recipe.rank.judge == "reward":
        context.load_reward("rank.judge=reward")
    if context.recipe.rank.judge == "people":
        return people.rank(context, groups)
    judge = make_judge(context.recipe.rank.judge, context.recipe, context.team)
    ranked = {ranking.prompt_id for ranking in context.store.rankings(round)}
    missing = [group for group in groups if group.prompt.id not in ranked]
    if ranked and context.recipe.on_bad_score == "drop":
        missing = []  # rankings are committed all at once: what is missing was dropped
    with context.console.task(f"rank {len(missing)} groups"), context.store.events.around("rank", round, "rank"):
        context.store.add_rankings([dataclasses.replace(ranking, round=round) for ranking in judge.rank(missing)])
    rankings = context.store.rankings(round)
    return {
        "judge": judge.name,
        "num_groups": len(rankings),
        "num_tied_groups": sum(len(ranking.tiers) < 2 for ranking in rankings),
    }
