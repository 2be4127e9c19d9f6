"""Three steps, a resume and three steps are six steps, bit for bit, on real Ray, vLLM and DeepSpeed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.chaos import Follower
from cluster.console import LineConsole
from cluster.moments import key_of
from cluster.ray_session import RaySession
from cluster.run import run
from configs.load import load_recipe
from configs.schema import Recipe
from rlhf.compare import differences
from rlhf.events import EVENTS
from rlhf.step_journal import StepJournal
from rlhf.store import RunStore
from tests.recipes import tiny_recipe

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.timeout(400)]

Go = Callable[..., Path]


@pytest.fixture
def go(session: RaySession, monkeypatch: pytest.MonkeyPatch) -> Go:
    """Runs a recipe with new workers; interrupts it once a row was logged, if one is named."""

    def start(recipe: Recipe, stop_at: tuple[str, int] | None = None, **options: Any) -> Path:
        log = RunStore.log

        def logs_and_stops(self: RunStore, stage: str, step: int, metrics: Mapping[str, float]) -> None:
            log(self, stage, step, metrics)
            if (stage, step) == stop_at:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(RunStore, "log", logs_and_stops)
            try:
                run(recipe, LineConsole(StringIO()), session=session, **options)
            except KeyboardInterrupt:
                assert stop_at is not None
            else:
                assert stop_at is None, f"the run ended before it came to {stop_at}"
        return Path(recipe.runs) / recipe.name

    return start


def test_reward_training_and_ppo_with_a_critic_resume_bit_for_bit(go: Go, tiny_model: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "stages": ["sample", "rank", "reward", "ppo"],
        "reward": {"epochs": 3, "save_every": 3},
        "ppo": {
            "num_steps": 6,
            "score": {"reward": 1.0, "rules": 1.0},
            "value_init": "reward",
            "epochs": 2,
            "num_minibatches": 2,
            "kl": {"adaptive": True, "horizon": 40},
            "save_every": 3,
            "evaluate_every": 2,
            "evaluate_prompts": 2,
        },
        "tracker": {"mode": "disabled"},
    }
    whole = go(tiny_recipe(tiny_model, tmp_path, name="whole", **changes))
    halted = tiny_recipe(tiny_model, tmp_path, name="halted", **changes)
    go(halted, stop_at=("reward", 4))
    go(halted, stop_at=("ppo", 4))
    assert differences(whole, go(halted)) == []


def test_ppo_with_group_advantages_resumes_bit_for_bit(go: Go, tiny_model: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "stages": ["ppo"],
        "ppo": {
            "num_steps": 6,
            "score": "rules",
            "advantage": "group",
            "kl": {"where": "loss"},
            "save_every": 3,
        },
        "tracker": {"mode": "disabled"},
    }
    whole = go(tiny_recipe(tiny_model, tmp_path, name="whole", **changes))
    halted = tiny_recipe(tiny_model, tmp_path, name="halted", **changes)
    go(halted, stop_at=("ppo", 4))
    assert differences(whole, go(halted)) == []


def test_ppo_whose_answers_are_written_ahead_resumes_bit_for_bit(go: Go, tiny_model: Path, tmp_path: Path) -> None:
    """In groups of their own, generator and policy are at work at the same time; on answers of the version before."""
    changes: dict[str, Any] = {
        "stages": ["ppo"],
        "ppo": {
            "num_steps": 6,
            "max_staleness": 1,
            "score": "rules",
            "advantage": "group",
            "kl": {"beta": 0.0},
            "save_every": 3,
        },
        "cluster": {"placement": "separate"},
        "tracker": {"mode": "disabled"},
    }
    whole = go(tiny_recipe(tiny_model, tmp_path, name="whole", **changes))
    halted = tiny_recipe(tiny_model, tmp_path, name="halted", **changes)
    go(halted, stop_at=("ppo", 4))
    assert differences(whole, go(halted)) == []
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [row["sampling/staleness"] for row in rows] == [0, 1, 1, 1, 1, 1]
    assert all(row["time/wait_for_answers"] >= 0 and row["memory/policy-0_pss_gib"] > 0 for row in rows)
    assert all(row["time/generate_beside"] > 0 for row in rows[1:])
    events = Follower(whole / EVENTS).read()
    at = {(event["what"], *key_of(event)): place for place, event in enumerate(events)}
    for step in range(5):
        assert at["begin", "ppo", step + 1, "generate ahead"] < at["begin", "ppo", step, "update policy"]
        assert at["end", "ppo", step + 1, "generate ahead"] < at["begin", "ppo", step + 1, "sync"]


def test_two_workers_resumed_as_one_and_back_learn_the_same_from_the_same_answers(
    go: Go, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {
        "stages": ["ppo"],
        "ppo": {"num_steps": 6, "score": "rules", "save_every": 2},
        "learner": {"zero_stage": 2},
        "tracker": {"mode": "disabled"},
    }
    with monkeypatch.context() as patch:
        patch.setattr(StepJournal, "drop_below", lambda self, step: None)  # so that all answers can be used again
        whole = go(tiny_recipe(tiny_model, tmp_path, name="whole", **changes))

    def with_workers(num: int) -> Recipe:
        return tiny_recipe(tiny_model, tmp_path, name="mixed", cluster={"workers": {"trainer": num}}, **changes)

    mixed = Path(with_workers(2).runs) / "mixed"
    with RunStore.open(with_workers(2).runs, with_workers(2)):
        shutil.copytree(whole / "journal", mixed / "journal", dirs_exist_ok=True)
    go(with_workers(2), stop_at=("ppo", 3))
    go(with_workers(1), stop_at=("ppo", 5), accept=("cluster.workers",))
    go(with_workers(2), accept=("cluster.workers",))
    with (
        RunStore.open(mixed.parent, with_workers(2)) as two,
        RunStore.open(whole.parent, load_recipe(whole / "recipe.yaml")) as one,
    ):
        assert_close(one, two)


def assert_close(one: RunStore, two: RunStore) -> None:
    first, second = one.load_role("policy"), two.load_role("policy")
    assert first is not None and second is not None
    for name, tensor in first.tensors.items():
        torch.testing.assert_close(second.tensors[name], tensor, rtol=1e-3, atol=2e-5, msg=name)
    for a, b in zip(one.metrics("ppo"), two.metrics("ppo"), strict=True):
        for name in ("objective/scores", "objective/kl", "loss/policy_avg", "loss/value_avg", "policy/grad_norm"):
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-5), name
