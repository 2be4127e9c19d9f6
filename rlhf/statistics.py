"""Is it better, and how sure is that? Everything is paired by prompt, since answers to one prompt hang together."""

from __future__ import annotations

import math

import torch


def win_rate(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """[...] the share of pairs (an answer before, an answer after to the same prompt) that `after` wins, ties half.

    0.5 where nothing changed. Prompts, if there are several, are leading dimensions: one number each.

    Args:
        before: scores, [..., n] answers.
        after: scores, [..., m] answers to the same prompts.
    """
    old, new = before.double().unsqueeze(-1), after.double().unsqueeze(-2)
    return ((new > old).double() + (new == old).double() / 2).mean(dim=(-2, -1))


def bootstrap_interval(per_prompt: torch.Tensor, num: int, seed: int, level: float = 0.95) -> tuple[float, float]:
    """Low and high end of the interval of the mean over prompts, by the percentile bootstrap.

    Efron and Tibshirani 1993, chapter 13: prompts are drawn with replacement `num` times, and the interval leaves
    (1 - level) / 2 of the means outside on each side (linear interpolation between order statistics).

    Args:
        per_prompt: [P], one number per prompt.
        num: resamples.
        seed: the same seed gives the same interval.
        level: of confidence.
    """
    assert per_prompt.ndim == 1 and len(per_prompt) > 0, f"one number per prompt, not {tuple(per_prompt.shape)}"
    values = per_prompt.detach().cpu().double()
    generator = torch.Generator().manual_seed(seed)
    # One resample at a time keeps the memory small however many prompts there are.
    means = torch.stack([values[_draw(len(values), generator)].mean() for _ in range(num)]).sort().values
    return _quantile(means, (1 - level) / 2), _quantile(means, (1 + level) / 2)


def bootstrap_ratio(
    part: torch.Tensor, whole: torch.Tensor, num: int, seed: int, level: float = 0.95
) -> tuple[float, float]:
    """Low and high end of the interval of Σ part / Σ whole, where what hangs together is drawn together.

    The percentile bootstrap of `bootstrap_interval`, over clusters: one that is drawn brings all that it has (Davison
    and Hinkley 1997, chapter 3.8). One in which `whole` is 0 changes nothing.

    Args:
        part: [G], one number per cluster: pairs that are right, say.
        whole: [G], what it is a part of: all pairs.
        num: resamples.
        seed: the same seed gives the same interval.
        level: of confidence.
    """
    assert part.shape == whole.shape and part.ndim == 1, f"{tuple(part.shape)} against {tuple(whole.shape)}"
    told = whole > 0
    parts, wholes = part[told].cpu().double(), whole[told].cpu().double()
    assert len(wholes) > 0, "there is a whole to be part of"
    generator = torch.Generator().manual_seed(seed)
    ratios = list[torch.Tensor]()
    for _ in range(num):
        drawn = _draw(len(wholes), generator)
        ratios.append(parts[drawn].sum() / wholes[drawn].sum())
    ordered = torch.stack(ratios).sort().values
    return _quantile(ordered, (1 - level) / 2), _quantile(ordered, (1 + level) / 2)


def _draw(num: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(num, (num,), generator=generator)


def _quantile(ordered: torch.Tensor, share: float) -> float:
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return float(ordered[low] + (place - low) * (ordered[high] - ordered[low]))
