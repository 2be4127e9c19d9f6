"""The policy: what an update does, whatever the split, and what it reports."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.base import Base
from actors.policy import Policy
from actors.reference import Reference
from configs.schema import Recipe
from rlhf.checksum import checksum
from rlhf.records import Rollout
from rlhf.rollout import answer_mask, sampling_metrics
from tests.actors.ranks import EPS, distance, make_groups, rollout_of, same_bits
from tests.recipes import tiny_recipe

pytestmark = pytest.mark.engine

Changes = dict[str, Any]
GROUP: Changes = {"advantage": "group", "kl": {"where": "loss", "beta": 0.0}}


def make_recipe(model: Path, folder: Path, ppo: Changes | None = None, **changes: Any) -> Recipe:
    learner = {"micro_batch_tokens": 10_000, "rows": "shared"} | changes.pop("learner", {})
    ppo = {"optimizer": {"lr": 1e-3, "eps": EPS}} | (ppo or {})
    return tiny_recipe(model, folder, learner=learner, ppo=ppo, **changes)


def make_policy(recipe: Recipe) -> tuple[Base, Policy]:
    base = Base(recipe.model, recipe.lora, seed=recipe.seed)
    return base, Policy(base, recipe, 0, 1)


def started(recipe: Recipe) -> tuple[Policy, Rollout]:
    """A policy that has learned something already, and a rollout of its own."""
    _, policy = make_policy(recipe)
    groups = make_groups()
    one_step = recipe.ppo.advantage != "gae"
    policy.update(rollout_of(groups, recipe, policy.logprobs(groups)))
    return policy, rollout_of(groups, recipe, None if one_step else policy.logprobs(groups), step=1)


def test_logprobs_are_those_of_each_sequence_alone_at_the_sampling_temperature(
    tiny_model: Path, tmp_path: Path, process_group: None
):
    recipe = make_recipe(tiny_model, tmp_path, sampling={"temperature": 0.7})
    _, policy = make_policy(recipe)
    groups = make_groups()
    logprobs, at_one = policy.logprobs(groups), policy.logprobs(groups, temperature=1.0)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    mask = answer_mask(groups)
    assert logprobs.shape == mask.shape
    assert not logprobs[~mask].any()
    for number, answer in enumerate(answer for group in groups for answer in group.answers):
        prompt = groups[number // 4].prompt.token_ids
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *answer.token_ids]])).logits[0, len(prompt) - 1 : -1]
        at = (torch.arange(len(answer.token_ids)), torch.tensor(answer.token_ids))
        expected = torch.log_softmax(logits / 0.7, -1)[at]
        assert torch.allclose(logprobs[number][mask[number]], expected, atol=1e-4)
        assert torch.allclose(at_one[number][mask[number]], torch.log_softmax(logits, -1)[at], atol=1e-4)
    assert policy.logprobs([]).shape == (0, 0)


def test_the_ratio_is_1_on_the_first_minibatch(tiny_model: Path, tmp_path: Path, process_group: None):
    recipe = make_recipe(tiny_model, tmp_path, {"epochs": 2, "num_minibatches": 3})
    policy, rollout = started(recipe)
    metrics = policy.update(rollout)
    assert metrics["val/ratio_first_error"] < 1e-4
    assert metrics["val/ratio_var"] > 0  # the later ones have moved
    assert metrics["policy/num_updates"] == 6
    assert rollout.old_logprobs is not None
    stale = dataclasses.replace(rollout, old_logprobs=rollout.old_logprobs - 0.5)
    assert policy.update(stale)["val/ratio_first_error"] > 0.3


@pytest.mark.parametrize("learner", [{"micro_batch_tokens": 30}, {"rows": "separate"}, {"zero_stage": 2}])
def test_an_update_is_the_same_however_it_is_split(
    tiny_model: Path, tmp_path: Path, process_group: None, learner: Changes
):
    ppo: Changes = {"epochs": 2, "num_minibatches": 2}
    results: list[tuple[Any, dict[str, float]]] = []
    for changes in ({}, learner):
        _, policy = make_policy(make_recipe(tiny_model, tmp_path, ppo, learner=changes))
        groups = make_groups()
        metrics = policy.update(rollout_of(groups, make_recipe(tiny_model, tmp_path, ppo), policy.logprobs(groups)))
        results.append((policy.adapter().tensors, metrics))
    (one, of_one), (other, of_other) = results
    assert distance(one, other) < 1e-5
    assert of_other == pytest.approx(of_one, rel=1e-3, abs=1e-5)


def test_metrics_are_those_of_hand_worked_sums(tiny_model: Path, tmp_path: Path, process_group: None):
    recipe = make_recipe(tiny_model, tmp_path, {"is_clip": None})
    policy, rollout = started(recipe)
    metrics = policy.update(rollout)
    # With a ratio of 1 everywhere the loss is the mean advantage, negated; whitened advantages have mean 0.
    assert metrics["loss/policy_avg"] == pytest.approx(-float(rollout.advantages[rollout.mask].mean()), abs=1e-5)
    assert metrics["val/ratio"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["policy/clipfrac_avg"] == 0
    assert metrics["policy/approxkl_avg"] == pytest.approx(0.0, abs=1e-8)
    assert 0 < metrics["policy/entropy"] < 6
    assert metrics["policy/grad_norm"] > 0
    assert metrics["policy/lr"] == 1e-3


def test_an_update_makes_answers_with_a_positive_advantage_likelier(
    tiny_model: Path, tmp_path: Path, process_group: None
):
    recipe = make_recipe(tiny_model, tmp_path, GROUP | {"is_clip": None})
    _, policy = make_policy(recipe)
    groups = make_groups()
    rollout = rollout_of(groups, recipe, None)
    before = policy.logprobs(groups)
    for _ in range(3):
        policy.update(rollout)
    gain = ((policy.logprobs(groups) - before) * rollout.advantages)[rollout.mask].mean()
    assert gain > 0.01


def test_the_updates_own_logprobs_serve_as_the_old_ones(tiny_model: Path, tmp_path: Path, process_group: None):
    recipe = make_recipe(tiny_model, tmp_path, GROUP)
    groups = make_groups()
    tensors: list[Any] = []
    for known in (False, True):
        _, policy = make_policy(recipe)
        own = policy.logprobs(groups)
        metrics = policy.update(rollout_of(groups, recipe, own if known else None))
        tensors.append(policy.adapter().tensors)
        if not known:
            mask = answer_mask(groups)
            sampled = rollout_of(groups, recipe, None).sampling_logprobs
            expected = sampling_metrics(own[mask], sampled[mask], recipe.ppo.is_clip)
            assert {k: metrics[k] for k in expected} == pytest.approx(expected, rel=1e-4)
            assert metrics["val/ratio_first_error"] == 0
    assert distance(*tensors) < 1e-5


def test_the_importance_weight_is_cut_at_is_clip(tiny_model: Path, tmp_path: Path, process_group: None):
    norms: list[float] = []
    for is_clip in (None, 1.5):
        recipe = make_recipe(tiny_model, tmp_path, GROUP | {"is_clip": is_clip})
        _, policy = make_policy(recipe)
        groups = make_groups()
        rollout = rollout_of(groups, recipe, None)
        # The engine found every token far less likely than the trainer does, so every weight is cut.
        far = dataclasses.replace(rollout, sampling_logprobs=rollout.sampling_logprobs - 50.0)
        norms.append(policy.update(far)["policy/grad_norm"])
    assert norms[1] == pytest.approx(1.5 * norms[0], rel=1e-3)


def test_a_step_stops_once_the_policy_is_too_far(tiny_model: Path, tmp_path: Path, process_group: None):
    counts: list[float] = []
    for target in (None, 1e-9, 1e9):
        recipe = make_recipe(tiny_model, tmp_path, {"epochs": 4, "target_kl": target})
        policy, rollout = started(recipe)
        counts.append(policy.update(rollout)["policy/num_updates"])
    # The first update starts at the old policy; the second sees that the first went too far, and is the last.
    assert counts == [4, 2, 4]


def test_only_selected_answers_are_trained_on(tiny_model: Path, tmp_path: Path, process_group: None):
    recipe = make_recipe(tiny_model, tmp_path, GROUP | {"is_clip": None})
    groups = make_groups()
    whole = rollout_of(groups, recipe, None)
    first = torch.arange(len(whole.mask)) < 4
    some = dataclasses.replace(whole, selected=first)
    alone = dataclasses.replace(
        rollout_of(groups[:1], recipe, None), advantages=whole.advantages[:4, : max(whole.mask[:4].sum(1))]
    )
    tensors: list[Any] = []
    for rollout in (some, alone, whole):
        _, policy = make_policy(recipe)
        policy.update(rollout)
        tensors.append(policy.adapter().tensors)
    assert distance(tensors[0], tensors[1]) < 1e-5
    assert distance(tensors[0], tensors[2]) > 1e-4


def test_a_rollout_without_a_selected_answer_changes_nothing(tiny_model: Path, tmp_path: Path, process_group: None):
    recipe = make_recipe(tiny_model, tmp_path, GROUP)
    _, policy = make_policy(recipe)
    rollout = rollout_of(make_groups(), recipe, None)
    before = policy.adapter().tensors
    assert policy.update(dataclasses.replace(rollout, selected=torch.zeros(12, dtype=torch.bool))) == {
        "policy/num_updates": 0.0
    }
    assert distance(policy.adapter().tensors, before) == 0


def test_kl_in_the_loss_pulls_the_policy_back_to_the_reference(tiny_model: Path, tmp_path: Path, process_group: None):
    kl = {"where": "loss", "beta": 10.0, "estimator": "k3"}
    free = make_recipe(tiny_model, tmp_path, GROUP | {"is_clip": None})
    held = make_recipe(tiny_model, tmp_path, GROUP | {"is_clip": None, "kl": kl})
    groups = make_groups()
    base = Base(held.model, held.lora, seed=0)
    policy, reference = Policy(base, held, 0, 1), Reference(base, held)
    for _ in range(3):
        policy.update(rollout_of(groups, free, None))
    ref = reference.logprobs(groups)
    away = (policy.logprobs(groups) - ref).square().sum()
    for _ in range(8):  # the first few go on as before, by Adam's momentum
        rollout = rollout_of(groups, held, None)
        nothing_else = torch.zeros_like(rollout.advantages)
        metrics = policy.update(dataclasses.replace(rollout, ref_logprobs=ref, advantages=nothing_else))
        assert metrics["loss/kl_avg"] > 0
    assert (policy.logprobs(groups) - ref).square().sum() < 0.5 * away


def test_the_reference_is_the_base_whatever_the_policy_learns(tiny_model: Path, tmp_path: Path, process_group: None):
    recipe = make_recipe(tiny_model, tmp_path)
    base, policy = make_policy(recipe)
    reference = Reference(base, recipe)
    groups = make_groups()
    before = reference.logprobs(groups)
    assert torch.equal(before, policy.logprobs(groups))
    policy.update(rollout_of(groups, recipe, before))
    assert torch.equal(reference.logprobs(groups), before)
    assert not torch.equal(policy.logprobs(groups), before)
    alone = Reference(Base(recipe.model, recipe.lora, seed=0), recipe)
    assert torch.equal(alone.logprobs(groups), before)


def test_the_adapter_counts_updates_and_carries_its_checksum(tiny_model: Path, tmp_path: Path, process_group: None):
    recipe = make_recipe(tiny_model, tmp_path, {"epochs": 2})
    _, policy = make_policy(recipe)
    groups = make_groups()
    first = policy.adapter()
    policy.update(rollout_of(groups, recipe, policy.logprobs(groups)))
    second = policy.adapter()
    assert (first.version, second.version) == (0, 1)
    assert first.checksum == checksum(first.tensors) != second.checksum
    assert all(name.endswith(("lora_A.weight", "lora_B.weight")) for name in second.tensors)
    assert all(t.device.type == "cpu" and t.dtype == torch.float32 for t in second.tensors.values())
    assert json.loads(json.dumps(second.config))["r"] == recipe.lora.rank


def test_three_steps_a_resume_and_three_more_are_six_bit_for_bit(tiny_model: Path, tmp_path: Path, process_group: None):
    recipe = make_recipe(tiny_model, tmp_path, {"num_minibatches": 2, "optimizer": {"lr": 1e-3, "warmup_steps": 5}})

    def steps(policy: Policy, numbers: range) -> list[dict[str, float]]:
        metrics: list[dict[str, float]] = []
        for number in numbers:
            groups = make_groups(seed=number)
            metrics.append(policy.update(rollout_of(groups, recipe, policy.logprobs(groups), step=number)))
        return metrics

    _, straight = make_policy(recipe)
    steps(straight, range(3))
    saved = straight.state()
    metrics = steps(straight, range(3, 6))
    _, resumed = make_policy(recipe)
    resumed.load_state(saved)
    assert steps(resumed, range(3, 6)) == metrics
    assert same_bits(resumed.state(), straight.state())
    assert resumed.adapter().checksum == straight.adapter().checksum
    assert resumed.adapter().version == 6
