"""A judge says which of the ten are better."""

from __future__ import annotations

import time

from rlhf.errors import DataError
from rlhf.judges import make_judge
from rlhf.stages.context import Context
from rlhf.stages.sample import ROUND


def run(context: Context) -> dict[str, object]:
    """How many groups were ranked, and how many of them are one big tie."""
    began = time.perf_counter()
    groups = context.store.groups("sample", ROUND)
    if not groups:
        raise DataError("rank: there are no answers to rank", remedy="run the stage `sample` first")
    judge = make_judge(context.recipe.rank.judge, context.recipe, context.team)
    ranked = {ranking.prompt_id for ranking in context.store.rankings(ROUND)}
    rankings = judge.rank([group for group in groups if group.prompt.id not in ranked])
    context.store.add_rankings(rankings)
    rankings = context.store.rankings(ROUND)
    return {
        "judge": judge.name,
        "num_groups": len(rankings),
        "num_tied_groups": sum(len(ranking.tiers) < 2 for ranking in rankings),
        "time_s": time.perf_counter() - began,
    }
