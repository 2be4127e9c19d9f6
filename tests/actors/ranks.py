"""Groups, rollouts and ranks for the tests of roles that train."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch.multiprocessing.spawn import spawn

from configs.schema import Recipe
from rlhf.records import Answer, AnswerGroup, Message, Prompt, Ranking, RoleState, Rollout
from rlhf.rollout import answer_mask, make_rollout

Tensors = Mapping[str, torch.Tensor]
Scenario = Callable[[int, int, Path], dict[str, Any]]

# AdamW divides a gradient by its own size, so that one which is noise moves a parameter as far as any other. Updates
# compare only where noise (about 1e-8) is far below this.
EPS = 1e-4


def make_groups(num: int = 3, num_answers: int = 4, seed: int = 0) -> list[AnswerGroup]:
    """Groups of random tokens, of different lengths; the engine's logprobs are about right in size only."""
    draw = random.Random(seed)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw.randrange(256) for _ in range(draw.randint(low, high)))

    groups: list[AnswerGroup] = []
    for number in range(num):
        prompt = Prompt(id=f"p{number}", messages=(Message("user", "?"),), token_ids=tokens(3, 9))
        texts = [tokens(1, 8) for _ in range(num_answers)]
        answers = [
            Answer(token_ids=ids, logprobs=tuple(-5 - draw.random() for _ in ids), ended="eos", version=0, text="")
            for ids in texts
        ]
        groups.append(AnswerGroup(prompt, tuple(answers)))
    return groups


def make_rankings(groups: Sequence[AnswerGroup]) -> list[Ranking]:
    """The lower the first token, the better."""
    return [
        Ranking(
            group.prompt.id,
            tuple((i,) for i in sorted(range(len(group.answers)), key=lambda i: group.answers[i].token_ids[0])),
            by="test",
        )
        for group in groups
    ]


def rollout_of(
    groups: Sequence[AnswerGroup], recipe: Recipe, old_logprobs: torch.Tensor | None, step: int = 0
) -> Rollout:
    """A rollout with made-up scores and values."""
    generator = torch.Generator().manual_seed(step)
    mask = answer_mask(groups)
    scores = torch.randn(len(mask), generator=generator)
    values = 0.1 * torch.randn(mask.shape, generator=generator) if recipe.ppo.advantage == "gae" else None
    ref = None if old_logprobs is None else old_logprobs + 0.1 * torch.randn(mask.shape, generator=generator)
    return make_rollout(
        step,
        groups,
        scores=scores,
        old_logprobs=old_logprobs,
        ref_logprobs=ref,
        values=values,
        config=recipe.ppo,
        beta=recipe.ppo.kl.beta,
    )


def num_tokens(groups: Iterable[AnswerGroup]) -> int:
    """Answer tokens."""
    return sum(len(answer.token_ids) for group in groups for answer in group.answers)


def distance(a: Tensors, b: Tensors) -> float:
    """The largest difference of any element."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def same_bits(a: RoleState, b: RoleState) -> bool:
    """Whether two states hold the same values and the same bits."""
    assert a.tensors.keys() == b.tensors.keys()
    return a.values == b.values and all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)


def own_mib() -> float:
    """Memory of this process in MiB that is no mapped file."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024


def run_ranks(world_size: int, scenario: Scenario, model: Path, folder: Path) -> list[dict[str, Any]]:
    """What the scenario gives on each rank, each in a process of its own."""
    spawn(_rank, (world_size, scenario, model, folder), nprocs=world_size)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def _rank(rank: int, world_size: int, scenario: Scenario, model: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    torch.save(scenario(rank, world_size, model), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()
