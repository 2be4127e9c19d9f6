"""A reward model that learns the rankings: a LoRA adapter and a scalar head on the frozen base."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from rlhf.desk.desk import open_desk
from rlhf.desk.exchange import IMPORTED
from rlhf.errors import DataError
from rlhf.phases import Phases
from rlhf.rankings import kendall_tau_b, pairwise_accuracy
from rlhf.records import AnswerGroup, Ranking
from rlhf.seeds import shuffle_seed
from rlhf.stages import people
from rlhf.stages.context import Context, StageLeft
from rlhf.statistics import bootstrap_interval

Ranked = tuple[AnswerGroup, Ranking]
Scores = dict[tuple[int, str], torch.Tensor]  # [n] of a group, by its round and prompt id


def run(context: Context) -> dict[str, object]:
    """Held-out pairwise accuracy and Kendall's tau of the reward model, which is then in the run store.

    Each round trains one from the start, on the rankings of all rounds so far.
    """
    config, round = context.recipe.reward, context.round
    if round:
        context.team.release("reward")
    reward = context.team.reward
    if config.rankings and not round:
        people.take_in(context, Path(config.rankings))
    train, held_out = split(ranked_groups(context), config.held_out, context.recipe.seed)
    num_steps = fit(context, weighted(train, round, config.newest_weight))
    newest = {(round, group.prompt.id): group for group in context.store.groups("sample", round)}
    if not newest:  # rankings of a file only
        newest = {(r.round, r.prompt_id): group for group, r in (*train, *held_out)}
    raw = score_raw(context, newest | {(r.round, r.prompt_id): group for group, r in held_out})
    # Scores have mean 0 and standard deviation 1 on what the policy writes now, or else on what was ranked.
    gain, bias = gain_and_bias(torch.cat([raw[place] for place in newest]))
    reward.normalise(gain, bias)
    measured = held_out_figures(raw, held_out, context.recipe.seed)
    if context.recipe.rank.judge == "people":
        tell_desk(context, raw)
    context.store.save_role("reward", reward.state())
    return measured | {
        "num_train": len(train),
        "num_held_out": len(held_out),
        "num_steps": num_steps,
        "gain": gain,
        "bias": bias,
    }


def fit(context: Context, train: Sequence[Ranked]) -> int:
    """The batches so far, those of earlier rounds included; trains from the round's newest checkpoint on."""
    config, reward, store, round = context.recipe.reward, context.team.reward, context.store, context.round
    before = store.results("reward", round - 1)["num_steps"] if round else 0
    start, saving = restore(context, before), {}
    num_batches = -(-len(train) // config.groups_per_batch)
    num_steps = before + config.epochs * num_batches
    with context.console.task("reward", total=num_steps - start, unit="batches") as task:
        for step in range(start, num_steps):
            epoch, number = divmod(step - before, num_batches)
            where = (epoch, round) if round else (epoch,)
            batch = batches(train, num_batches, context.recipe.seed, *where)[number]
            phase = Phases(task, store.events, "reward", step)
            with phase("fit"):
                metrics = reward.fit([group for group, _ in batch], [ranking for _, ranking in batch])
            metrics |= {"reward/epoch": epoch + number / num_batches} | phase.metrics() | saving
            context.tracker.log("reward", step + 1, metrics)
            leaves = step + 1 < num_steps and context.is_to_leave()
            if leaves or ((step + 1) % config.save_every == 0 and step + 1 < num_steps):
                with phase("save"):
                    store.save_checkpoint("reward", step + 1, {"reward": reward.state()}, {"num_steps": num_steps})
            saving = {"time/save": phase.seconds.get("save", 0.0), "time/save_beside": store.settle(wait=False)}
            task.advance(1, f"loss {metrics.get('reward/loss', float('nan')):.3f}")
            if leaves:
                store.settle()
                raise StageLeft
    store.settle()
    return num_steps


def batches(train: Sequence[Ranked], num: int, seed: int, *where: int) -> list[list[Ranked]]:
    """All groups once, in an order that hangs on the seed and on `where` (the epoch), as `num` batches.

    They are of nearly equal size: none is left with a single group at the end of an epoch.
    """
    order = random.Random(shuffle_seed(seed, "reward", *where)).sample(train, len(train))
    return [order[number * len(order) // num : (number + 1) * len(order) // num] for number in range(num)]


def restore(context: Context, before: int) -> int:
    """The batch to go on with, the reward model as it was then; `before` is where the round began."""
    found = context.store.load_checkpoint("reward")
    if found is None or found[0] <= before:
        context.store.cut_metrics("reward", before)
        return before
    step, states, _ = found
    context.team.reward.load_state(states["reward"])
    context.store.cut_metrics("reward", step)
    context.console.say(f"reward: going on from the checkpoint of batch {step}")
    return step


def ranked_groups(context: Context) -> list[Ranked]:
    """Groups of all rounds with their rankings, those that are one big tie left out: they say nothing.

    Groups are the run's own and those that people ranked elsewhere.
    """
    pairs: list[Ranked] = []
    num_groups = 0
    for round in range(context.round + 1):
        groups = {group.prompt.id: group for group in context.store.groups("sample", round)}
        rankings = [ranking for ranking in context.store.rankings(round) if len(ranking.tiers) > 1]
        pairs += [(groups[r.prompt_id], r) for r in rankings if r.prompt_id in groups and r.by != IMPORTED]
        # Once each: the desk's consensus has those of a file too, where people rank.
        others = {ranking.prompt_id: ranking for ranking in rankings if ranking.prompt_id not in groups}
        given = people.given_groups(context, round, others.keys())
        pairs += [(given[prompt_id], ranking) for prompt_id, ranking in others.items() if prompt_id in given]
        num_groups += len(groups) + len(given)
    if len({ranking.prompt_id for _, ranking in pairs}) < 2:
        raise DataError(
            f"reward: {len(pairs)} of {num_groups} groups have a ranking with more than one tier.",
            limit="At least 2 are needed, one to train on and one held out.",
            remedy="Run `sample` and `rank` with more prompts, or a judge that ties less (rank.tie_margin).",
        )
    return pairs


def split(pairs: Sequence[Ranked], share: float, seed: int) -> tuple[list[Ranked], list[Ranked]]:
    """(train, held-out), by a hash of the prompt, so that a group stays on its side when others come.

    All rounds' groups of one prompt are on the same side.
    """

    def place(pair: Ranked) -> str:
        return hashlib.sha256(f"{seed}|reward|{pair[1].prompt_id}".encode()).hexdigest()

    ordered = sorted(pairs, key=place)
    prompts = list(dict.fromkeys(ranking.prompt_id for _, ranking in ordered))
    num_held_out = min(max(1, round(share * len(prompts))), len(prompts) - 1) if share > 0 else 0
    held_out = set(prompts[:num_held_out])
    return (
        [pair for pair in ordered if pair[1].prompt_id not in held_out],
        [pair for pair in ordered if pair[1].prompt_id in held_out],
    )


def weighted(train: Sequence[Ranked], round: int, weight: int) -> list[Ranked]:
    """What an epoch holds: groups of the newest round `weight` times where there are earlier ones, the others once."""
    return [pair for pair in train for _ in range(weight if round and pair[1].round == round else 1)]


def score_raw(context: Context, groups: Mapping[tuple[int, str], AnswerGroup]) -> Scores:
    """The raw scores of these groups."""
    reward, size = context.team.reward, context.recipe.reward.groups_per_batch
    reward.normalise(1.0, 0.0)
    scores: Scores = {}
    with context.console.task("reward: score the answers", total=len(groups), unit="groups") as task:
        for first in range(0, len(groups), size):
            batch = dict(itertools.islice(groups.items(), first, first + size))
            parts = reward.scores(list(batch.values())).split([len(group.answers) for group in batch.values()])
            scores |= dict(zip(batch, parts, strict=True))
            task.advance(len(batch))
    return scores


def tell_desk(context: Context, raw: Scores) -> None:
    """Gives the desk the scores, for the agreement of people with the reward model (which saw most of the groups)."""
    with open_desk(context.store.folder, context.recipe) as desk:
        newest = {prompt: scores.tolist() for (round, prompt), scores in raw.items() if round == context.round}
        there = {item.prompt_id for item in desk.items(context.round, limit=desk.progress(context.round).num_groups)}
        desk.set_scores({prompt: scores for prompt, scores in newest.items() if prompt in there}, context.round)


def gain_and_bias(raw: torch.Tensor) -> tuple[float, float]:
    """(gain, bias) that give these scores [N] mean 0 and standard deviation 1."""
    std = float(raw.std(unbiased=False))
    gain = 1.0 / std if std > 0 else 1.0
    return gain, -gain * float(raw.mean())


def held_out_figures(raw: Scores, pairs: Sequence[Ranked], seed: int) -> dict[str, object]:
    """Pairwise accuracy with its interval (bootstrap over groups) and mean Kendall's tau-b."""
    if not pairs:
        return {}
    shares: list[float] = []
    taus: list[float] = []
    for group, ranking in pairs:
        mine = raw[ranking.round, group.prompt.id]
        right, total = pairwise_accuracy(mine, ranking.tiers)
        place = torch.full((len(group.answers),), float("nan"))
        for number, tier in enumerate(ranking.tiers):
            place[list(tier)] = -float(number)
        ranked = ~place.isnan()
        shares.append(right / total)
        taus.append(kendall_tau_b(mine[ranked], place[ranked]))
    low, high = bootstrap_interval(torch.tensor(shares), num=2000, seed=seed)
    return {
        "accuracy": sum(shares) / len(shares),
        "accuracy_low": low,
        "accuracy_high": high,
        "tau": sum(taus) / len(taus),
    }
