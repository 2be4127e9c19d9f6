"""Which answers go into which minibatch, and which rank computes them. Deciding only: nothing is moved here."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rlhf.records import Rollout
from rlhf.seeds import shuffle_seed

Plan = list[list[list[int]]]  # minibatch -> rank -> flat answer indices, ascending


def plan(rollout: Rollout, *, num_minibatches: int, epoch: int, seed: int, world_size: int) -> Plan:
    """Minibatches of whole groups in an order of their own for each epoch; every selected answer is in exactly one.

    What a minibatch holds depends on (seed, step, epoch) alone, never on the number of ranks. Groups without a
    selected answer are left out. With fewer groups than minibatches, there is one minibatch for each group.
    Inside a minibatch whole groups are dealt to the ranks, so that a prompt is computed once; where there are fewer
    groups than ranks, single answers are. A rank may get nothing, where there are fewer answers than ranks.
    """
    groups = [kept for group in _flat_indices(rollout) if (kept := [i for i in group if bool(rollout.selected[i])])]
    generator = torch.Generator().manual_seed(shuffle_seed(seed, "minibatches", rollout.step, epoch))
    order = [int(place) for place in torch.randperm(len(groups), generator=generator)]
    num = min(num_minibatches, len(groups))
    # Sizes differ by one at most, whatever the numbers are.
    parts = [order[i * len(order) // num : (i + 1) * len(order) // num] for i in range(num)]
    return [_to_ranks(rollout, [groups[place] for place in part], world_size) for part in parts]


def deal(costs: Sequence[int], num: int) -> list[list[int]]:
    """`num` lists of indices into `costs`, ascending, with sums as even as longest-first makes them (Graham 1969).

    The costliest item that is left goes to the list with the smallest sum; on equal costs and sums, to the first.
    """
    lists: list[list[int]] = [[] for _ in range(num)]
    sums = [0] * num
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        lightest = min(range(num), key=lambda i: (sums[i], i))
        lists[lightest].append(item)
        sums[lightest] += costs[item]
    return [sorted(part) for part in lists]


def _to_ranks(rollout: Rollout, groups: Sequence[Sequence[int]], world_size: int) -> list[list[int]]:
    """The answers of these groups for each rank, balanced by tokens (a prompt counts once for what goes together)."""
    prompt = [len(group.prompt.token_ids) for group in rollout.groups for _ in group.answers]
    lengths = [int(length) for length in rollout.mask.sum(1)]
    units = list(groups) if len(groups) >= world_size else [[index] for group in groups for index in group]
    dealt = deal([prompt[unit[0]] + sum(lengths[index] for index in unit) for unit in units], world_size)
    return [sorted(index for place in part for index in units[place]) for part in dealt]


def _flat_indices(rollout: Rollout) -> list[list[int]]:
    """The flat answer indices of each group."""
    groups: list[list[int]] = []
    first = 0
    for group in rollout.groups:
        groups.append(list(range(first, first + len(group.answers))))
        first += len(group.answers)
    return groups
