"""The whole path on real Ray, vLLM and DeepSpeed, with the tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.console import LineConsole
from cluster.ray_session import RaySession
from cluster.run import Outcome, run
from tests.recipes import tiny_recipe

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.timeout(300)]


NAMES = {
    *("objective/scores", "objective/kl", "objective/entropy", "objective/non_score_reward", "objective/rlhf_reward"),
    *("policy/approxkl_avg", "policy/clipfrac_avg", "loss/policy_avg", "loss/value_avg"),
    *("val/ratio", "val/ratio_var", "val/clipfrac_avg", "val/explained_var"),
    *("sampling/logp_difference_mean", "sampling/logp_difference_max", "sampling/importance_ratio_mean"),
    *("completions/mean_length", "completions/clipped_ratio"),
    *("time/generate", "time/score", "time/update", "time/sync", "time/save", "time/step"),
}


def rows(outcome: Outcome, stage: str) -> list[dict[str, Any]]:
    lines = (Path(outcome.places.run) / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["stage"] == stage]


def test_the_five_stages_from_prompts_to_a_judged_policy(session: RaySession, tiny_model: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(
        tiny_model,
        tmp_path,
        ppo={
            "score": "reward",
            "reward_from": "rank",
            "value_init": "reward",
            "evaluate_every": 1,
            "evaluate_prompts": 2,
        },
        tracker={"mode": "offline"},
    )
    outcome = run(recipe, LineConsole(), session=session)
    assert list(outcome.results) == ["sample", "rank", "reward", "ppo", "evaluate"]
    assert outcome.results["sample"]["num_answers"] == 80
    assert outcome.results["ppo"]["num_steps"] == 2
    steps = rows(outcome, "ppo")
    assert [row["step"] for row in steps] == [1, 2]
    first, second = steps
    assert first["val/ratio_first_error"] < 1e-4
    assert first["sampling/logp_difference_max"] < 1e-3
    assert second["sync/canary_checked"] in (0.0, 1.0)
    assert second.keys() >= NAMES, NAMES - second.keys()
    assert any(name.startswith("memory/generator-0") for name in second)
    assert 0 <= outcome.results["evaluate"]["win_rate_low"] <= outcome.results["evaluate"]["win_rate_high"] <= 1  # type: ignore[operator]
    again = run(recipe, LineConsole(), session=session)
    assert again.results == outcome.results


PPO_ALONE: dict[str, Any] = {"stages": ["ppo"], "ppo": {"score": "rules"}, "tracker": {"mode": "disabled"}}


@pytest.fixture(scope="module")
def shared_steps(
    session: RaySession, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """Rows of metrics of two steps, by one group on one base."""
    recipe = tiny_recipe(tiny_model, tmp_path_factory.mktemp("shared"), name="shared", **PPO_ALONE)
    return rows(run(recipe, LineConsole(), session=session), "ppo")


@pytest.mark.parametrize(("zero_stage", "references"), [(0, 1), (3, 2)])
def test_separate_groups_and_two_workers_give_the_steps_of_one_shared_group(
    session: RaySession,
    tiny_model: Path,
    tmp_path: Path,
    shared_steps: list[dict[str, Any]],
    zero_stage: int,
    references: int,
) -> None:
    workers = {"policy": 2, "critic": 2, "reference": references}
    recipe = tiny_recipe(
        tiny_model,
        tmp_path,
        name="separate",
        cluster={"placement": "separate", "workers": workers, "threads": 1},
        learner={"zero_stage": zero_stage},
        **PPO_ALONE,
    )
    separate = run(recipe, LineConsole(), session=session)
    for one, two in zip(shared_steps, rows(separate, "ppo"), strict=True):
        for name in ("objective/scores", "objective/kl", "loss/policy_avg", "loss/value_avg", "policy/grad_norm"):
            assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5), name
