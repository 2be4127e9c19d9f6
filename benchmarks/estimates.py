"""A mean and how sure it is."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlhf.statistics import bootstrap_interval

RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean, or a difference of means, with its interval of 95 %."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def estimate(per_prompt: torch.Tensor, seed: int = 0) -> Estimate:
    """The mean over prompts [P] with its interval, a bootstrap over them."""
    return Estimate(float(per_prompt.mean()), *bootstrap_interval(per_prompt, RESAMPLES, seed))
