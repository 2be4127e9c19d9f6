"""Whether two runs learnt the same, though their work was cut up differently."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from configs.load import load_recipe
from rlhf.store import RunStore

LEARNT = ("objective/scores", "objective/kl", "loss/policy_avg", "loss/value_avg", "policy/grad_norm")


def assert_learnt_the_same(one: Path, other: Path, *, rtol: float, atol: float) -> None:
    """Passes if losses of all PPO steps, and the policies at the end, differ by no more than this."""
    with (
        RunStore.open(one.parent, load_recipe(one / "recipe.yaml")) as first,
        RunStore.open(other.parent, load_recipe(other / "recipe.yaml")) as second,
    ):
        for a, b in zip(first.metrics("ppo"), second.metrics("ppo"), strict=True):
            for name in LEARNT:
                assert b[name] == pytest.approx(a[name], rel=rtol, abs=atol), f"{name} of step {a['step']}"
        policy, same = first.load_role("policy"), second.load_role("policy")
    assert policy is not None and same is not None
    for name, tensor in policy.tensors.items():
        torch.testing.assert_close(same.tensors[name], tensor, rtol=rtol, atol=atol, msg=name)
