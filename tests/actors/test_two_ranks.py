"""Two workers do what one does: the same scenario on one rank and on two, compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.base import Base
from actors.critic import Critic
from actors.learner import Learner
from actors.policy import Policy
from actors.reward import Reward
from configs.schema import LearnerConfig, LoraConfig, ModelConfig, OptimizerConfig
from rlhf.forward import token_logprobs
from rlhf.records import RoleState
from rlhf.rows import MicroBatch, make_micro_batches
from tests.actors.ranks import EPS, distance, make_groups, make_rankings, num_tokens, rollout_of, run_ranks, same_bits
from tests.recipes import tiny_recipe

pytestmark = pytest.mark.engine

STAGES = (0, 1, 2, 3)
CUTS: dict[str, dict[str, Any]] = {
    "whole": {"zero_stage": 0, "rows": "shared", "micro_batch_tokens": 10_000},
    "in pieces": {"zero_stage": 0, "rows": "separate", "micro_batch_tokens": 60},
    "spread": {"zero_stage": 3, "rows": "shared", "micro_batch_tokens": 60},
}
Results = dict[str, Any]


def scenario(rank: int, world_size: int, model: Path) -> Results:
    """Everything that the tests below compare; collective."""
    results: Results = {"bits": {}}
    for stage in STAGES if world_size > 1 else (0,):
        results[f"learner {stage}"], results["bits"][stage] = _learner(rank, world_size, model, stage)
    for name in CUTS if world_size > 1 else ("whole",):
        roles = _roles(rank, world_size, model, CUTS[name])
        results |= {f"{role} {name}": result for role, result in roles.items()}
    return results


def _shares(step: int, rank: int, world_size: int) -> list[int]:
    """Which of 12 answers a rank computes: one and eleven, all and none, six and six."""
    if world_size == 1:
        return list(range(12))
    cut = (1, 12, 6)[step % 3]
    return list(range(cut)) if rank == 0 else list(range(cut, 12))


def _learner(rank: int, world_size: int, model: Path, stage: int) -> tuple[Results, bool]:
    """(tensors and metrics after three updates, whether a resume and a way back give the same bits)."""

    def make() -> tuple[Base, Learner]:
        base = Base(
            ModelConfig(path=str(model), dtype="float32"), LoraConfig(rank=4, alpha=8), seed=0, spread=stage == 3
        )
        base.attach("policy")
        config = OptimizerConfig(lr=1e-2, weight_decay=0.1, max_grad_norm=0.05, eps=EPS)
        return base, Learner(base, "policy", None, config, LearnerConfig(zero_stage=stage), rank, world_size)

    def train(base: Base, learner: Learner, steps: Sequence[int]) -> list[dict[str, float]]:
        def loss(inside: MicroBatch) -> tuple[torch.Tensor, dict[str, float]]:
            logprobs, _ = token_logprobs(base.model, inside, 1.0, chunk=7)
            weights = torch.sin(7.0 * inside.answer + 3.0 * inside.step + 1.0)
            return (weights * logprobs).sum(), {
                "tokens": float(len(logprobs)),
                "top_max": float(logprobs.detach().max()),
            }

        metrics: list[dict[str, float]] = []
        for step in steps:
            groups = make_groups(seed=step)
            mine = _shares(step, rank, world_size)
            cut = make_micro_batches(groups, mine, rows="shared", max_tokens=30) if mine else []
            metrics.append(learner.step(learner.pad(cut), loss, num_tokens(groups)))
        return metrics

    def says(base: Base, learner: Learner) -> torch.Tensor:
        cut = make_micro_batches(make_groups(), None, rows="shared", max_tokens=10_000)
        return learner.run(cut, lambda inside: token_logprobs(base.model, inside, 1.0, chunk=7)[0])[0]

    base, learner = make()
    metrics = train(base, learner, range(3))
    saved, said = learner.state(), says(base, learner)
    kept = learner.state(keep=rank == 0)
    assert kept.tensors == {} if rank else same_bits(kept, saved), "rank 0 alone keeps what it was asked to keep"
    train(base, learner, range(3, 6))
    again, resumed = make()
    resumed.load_state(saved)
    equal = same_bits(resumed.state(), saved) and torch.equal(says(again, resumed), said)
    train(again, resumed, range(3, 6))
    equal = equal and same_bits(resumed.state(), learner.state())
    learner.load_state(saved)
    return {"state": saved, "metrics": metrics}, equal and torch.equal(says(base, learner), said)


def _roles(rank: int, world_size: int, model: Path, learner: dict[str, Any]) -> Results:
    """Tensors and metrics of each role after an update, each on a base of its own; what it says of its own groups."""
    adam = {"lr": 1e-3, "eps": EPS}
    recipe = tiny_recipe(
        model,
        model.parent,
        learner=learner,
        reward={"optimizer": adam},
        ppo={"epochs": 2, "num_minibatches": 2, "optimizer": adam, "critic_optimizer": adam},
        cluster={"placement": "separate"},
    )
    single = recipe.model_copy(
        update={"ppo": recipe.ppo.model_copy(update={"epochs": 1, "num_minibatches": 1, "advantage": "group"})}
    )
    groups = make_groups(5)
    mine = groups if world_size == 1 else groups[:4] if rank == 0 else groups[4:]

    def base() -> Base:
        return Base(recipe.model, recipe.lora, seed=0, spread=recipe.learner.zero_stage == 3)

    policy = Policy(base(), recipe, rank, world_size)
    old = _from_ranks(policy.logprobs(mine), world_size)
    results: Results = {"policy": {"metrics": policy.update(rollout_of(groups, recipe, old)), "state": policy.state()}}
    results["policy"]["old"] = old
    one_step = Policy(base(), single, rank, world_size)
    bare = rollout_of(groups, single.model_copy(update={"ppo": _without_kl(single)}), None)
    results["one step"] = {"metrics": one_step.update(bare), "state": one_step.state()}
    critic = Critic(base(), recipe, rank, world_size)
    results["critic"] = {"metrics": critic.update(rollout_of(groups, recipe, old)), "state": critic.state()}
    reward = Reward(base(), recipe, rank, world_size)
    metrics = [reward.fit(some, make_rankings(some)) for some in (groups, groups[:1])]
    results["reward"] = {"metrics": metrics[0], "state": reward.state()}
    results["reward"]["old"] = _from_ranks(reward.scores(mine)[:, None], world_size)
    return results


def _without_kl(recipe: Any) -> Any:
    return recipe.ppo.model_copy(update={"kl": recipe.ppo.kl.model_copy(update={"beta": 0.0})})


def _from_ranks(mine: torch.Tensor, world_size: int) -> torch.Tensor:
    """[N, T] of all ranks, padded to the longest."""
    parts: list[torch.Tensor] = [mine] * world_size
    torch.distributed.all_gather_object(parts, mine)
    width = max(part.shape[1] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts])


@pytest.fixture(scope="module")
def one(tiny_model: Path, process_group: None) -> Results:
    return scenario(0, 1, tiny_model)


@pytest.fixture(scope="module")
def two(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Results]]:
    yield run_ranks(2, scenario, tiny_model, tmp_path_factory.mktemp("ranks"))


def parameters(state: RoleState) -> dict[str, torch.Tensor]:
    return {name: t for name, t in state.tensors.items() if name.startswith("model.")}


@pytest.mark.parametrize("stage", STAGES)
def test_lopsided_and_empty_shares_give_the_update_of_one_rank(one: Results, two: list[Results], stage: int):
    expected = one["learner 0"]
    for results in two:
        found = results[f"learner {stage}"]
        assert distance(parameters(found["state"]), parameters(expected["state"])) < 1e-5
        for mine, theirs in zip(found["metrics"], expected["metrics"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-3)
            assert mine["grad_norm"] > 0.05  # so that the clip at the global norm has a part in it


@pytest.mark.parametrize("stage", STAGES)
def test_a_resume_of_two_ranks_goes_on_bit_for_bit(two: list[Results], stage: int):
    assert [results["bits"][stage] for results in two] == [True, True]


@pytest.mark.parametrize("stage", STAGES)
def test_both_ranks_hold_the_same_state_after_an_update(two: list[Results], stage: int):
    first, second = (results[f"learner {stage}"] for results in two)
    assert same_bits(first["state"], second["state"])
    assert first["metrics"] == second["metrics"]


@pytest.mark.parametrize("stage", STAGES)
def test_the_state_of_two_ranks_is_taken_up_by_one(
    two: list[Results], tiny_model: Path, process_group: None, stage: int
):
    base = Base(ModelConfig(path=str(tiny_model), dtype="float32"), LoraConfig(rank=4, alpha=8), seed=0)
    base.attach("policy")
    learner = Learner(base, "policy", None, OptimizerConfig(), LearnerConfig(zero_stage=2), 0, 1)
    saved = two[0][f"learner {stage}"]["state"]
    learner.load_state(saved)
    assert same_bits(learner.state(), saved)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("role", ["policy", "one step", "critic", "reward"])
def test_a_role_on_two_ranks_does_what_it_does_on_one(one: Results, two: list[Results], role: str, cut: str):
    expected = one[f"{role} whole"]
    for results in two:
        found = results[f"{role} {cut}"]
        assert distance(parameters(found["state"]), parameters(expected["state"])) < 1e-5
        assert found["metrics"] == pytest.approx(expected["metrics"], rel=2e-3, abs=1e-5)
        if "old" in expected:
            assert torch.allclose(found["old"], expected["old"], atol=1e-4)
