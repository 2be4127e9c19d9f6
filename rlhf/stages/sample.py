"""Ten answers per prompt for the rankings: from the starting model, in later rounds from the newest policy."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rlhf.adapters import starting_adapter
from rlhf.errors import StoreError
from rlhf.records import Adapter, AnswerGroup, Prompt
from rlhf.seeds import request_seed
from rlhf.stages.context import Context, StageLeft
from rlhf.stages.people import put_on_desk, where_the_page_is


def run(context: Context) -> dict[str, object]:
    """How many answers there are now and how fast they came. What an earlier run committed is not sampled again."""
    config, round = context.recipe.sample, context.round
    wanted = prompts_of(context.prompts.train, config.num_prompts, round)
    done = {group.prompt.id for group in context.store.groups("sample", round)}
    missing = [prompt for prompt in wanted if prompt.id not in done]
    if done:
        context.console.say(f"sample: {len(wanted) - len(missing)} of {len(wanted)} prompts are answered already")
    for_people = context.recipe.rank.judge == "people" and "rank" in context.recipe.stages
    began, num_tokens = time.perf_counter(), 0
    if missing:
        start = newest_adapter(context)
        generator = context.team.generator
        if start is not None:
            generator.load_adapter(start)
        began = time.perf_counter()
        with context.console.task("sample", total=len(missing), unit="prompts") as task:
            for number, batch in enumerate(_batches(wanted, config.prompts_per_request)):
                new = [prompt.id for prompt in batch if prompt.id not in done]
                if not new:
                    continue
                with context.store.events.around("sample", number, "generate"):
                    # The whole batch, also where part of it is there: other batches might give other last bits.
                    seeds = [request_seed(context.recipe.seed, "sample", round, 0, prompt.id) for prompt in batch]
                    groups = generator.answer(batch, context.sampling, seeds)
                    kept = [group for group in groups if group.prompt.id not in done]
                    context.store.append_groups("sample", round, kept)
                if for_people:
                    put_on_desk(context, kept)
                    if not num_tokens:
                        context.console.say(f"sample: people can begin; {where_the_page_is(context)}")
                num_tokens += _num_tokens(groups)
                task.advance(len(new))
                if context.is_to_leave():
                    raise StageLeft
    elapsed = time.perf_counter() - began
    if for_people:
        put_on_desk(context, context.store.groups("sample", round))
    answers = [answer for group in context.store.groups("sample", round) for answer in group.answers]
    speed: dict[str, object] = {"tokens_per_s": num_tokens / elapsed} if missing else {}
    return speed | {
        "round": round,
        "num_prompts": len(wanted),
        "num_answers": len(answers),
        "num_tokens": sum(len(answer.token_ids) for answer in answers),
        "mean_length": sum(len(answer.token_ids) for answer in answers) / len(answers),
        "ended_ratio": sum(answer.ended == "eos" for answer in answers) / len(answers),
    }


def prompts_of(train: Sequence[Prompt], num: int | None, round: int) -> Sequence[Prompt]:
    """The prompts of a round: each takes up where the one before ended, and begins again at the end of the split."""
    if num is None or num >= len(train):
        return train
    first = round * num % len(train)
    return (*train, *train)[first : first + num]


def newest_adapter(context: Context) -> Adapter | None:
    """What answers are written with: what training starts from (None: the base), later what PPO made of it."""
    if not context.round:
        return starting_adapter(context.recipe)
    adapter = context.store.load_adapter("policy")
    if adapter is None:
        raise StoreError(
            f"sample of round {context.round + 1}: the run has no policy.",
            remedy="Run the stage `ppo` of the round before.",
        )
    return adapter


def _batches(prompts: Sequence[Prompt], size: int) -> list[Sequence[Prompt]]:
    return [prompts[first : first + size] for first in range(0, len(prompts), size)]


def _num_tokens(groups: Sequence[AnswerGroup]) -> int:
    return sum(len(answer.token_ids) for group in groups for answer in group.answers)
