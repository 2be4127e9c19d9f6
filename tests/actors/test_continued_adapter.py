"""PPO that continues an adapter: the policy begins as it, and the reference stays it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from actors.base import Base
from actors.critic import Critic
from actors.policy import Policy
from actors.reference import Reference
from actors.reward import Reward
from configs.schema import Recipe
from rlhf.adapters import read_start, starting_adapter
from rlhf.checksum import checksum
from rlhf.errors import ModelError, StoreError
from rlhf.records import Adapter, Rollout
from rlhf.rollout import answer_mask
from tests.actors.ranks import EPS, make_groups, make_rankings, rollout_of, same_bits
from tests.recipes import tiny_recipe

pytestmark = pytest.mark.engine

TOKENS = torch.arange(1, 21)[None]


def make_start(model: Path, folder: Path, seed: int = 5, rank: int = 4, **config: Any) -> Path:
    """A folder as plain peft saves it, with a random adapter that changes what the model says."""
    settings = PeftLoraConfig(
        r=rank, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False, **config
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model_with = get_peft_model(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), settings)
    model_with.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def law(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_start(tiny_model, tmp_path_factory.mktemp("adapters") / "law")


def make_recipe(model: Path, folder: Path, law: Path | None, **changes: Any) -> Recipe:
    learner = {"micro_batch_tokens": 10_000, "rows": "shared"} | changes.pop("learner", {})
    ppo = {"optimizer": {"lr": 1e-3, "eps": EPS}, "critic_optimizer": {"lr": 1e-3, "eps": EPS}}
    start = {"adapter_from": str(law)} if law else {}
    return tiny_recipe(model, folder, learner=learner, ppo=ppo, **start, **changes)


def make_base(recipe: Recipe) -> Base:
    return Base(recipe.model, recipe.lora, seed=recipe.seed)


def logits(base: Base, adapter: str | None) -> torch.Tensor:
    with torch.no_grad(), base.use(adapter) as model:
        return model(TOKENS).logits


def rollout(recipe: Recipe, policy: Policy, reference: Reference, step: int = 0) -> Rollout:
    groups = make_groups(seed=step)
    made = rollout_of(groups, recipe, policy.logprobs(groups), step=step)
    return dataclasses.replace(made, ref_logprobs=reference.logprobs(groups))


def tensors_of(base: Base) -> str:
    """A checksum of the decoder's own weights, by their names before any adapter was attached."""
    own = {name: p for name, p in base.model.named_parameters() if "lora_" not in name}
    return checksum({name.replace(".base_layer", ""): p for name, p in own.items()})


def test_the_policy_begins_as_the_adapter_and_speaks_as_plain_peft_does(
    tiny_model: Path, tmp_path: Path, law: Path, process_group: None
):
    recipe = make_recipe(tiny_model, tmp_path, law)
    base = make_base(recipe)
    adapter = Policy(base, recipe, 0, 1).adapter()
    assert (adapter.version, adapter.checksum) == (0, read_start(law).checksum)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), str(law))
    with torch.no_grad():
        assert torch.equal(plain.eval()(TOKENS).logits, logits(base, "policy"))
    assert not torch.equal(logits(base, "policy"), logits(base, None))


@pytest.mark.parametrize("placement", ["shared", "separate"])
@pytest.mark.parametrize("learner", [{}, {"zero_stage": 2}, {"gradient_checkpointing": True}])
def test_the_reference_is_the_start_before_and_after_updates(
    tiny_model: Path, tmp_path: Path, law: Path, process_group: None, placement: str, learner: dict[str, Any]
):
    recipe = make_recipe(tiny_model, tmp_path, law, learner=learner)
    base = make_base(recipe)
    before = tensors_of(base)
    policy = Policy(base, recipe, 0, 1)
    reference = Reference(base if placement == "shared" else make_base(recipe), recipe)
    critic, reward = Critic(base, recipe, 0, 1), Reward(base, recipe, 0, 1)
    groups = make_groups()
    start = reference.logprobs(groups)
    assert torch.equal(start, policy.logprobs(groups))  # KL is 0, exactly
    assert not torch.allclose(start, reference.base_logprobs(groups), atol=0.1)
    for step in range(2):
        made = rollout(recipe, policy, reference, step)
        policy.update(made)
        critic.update(made)
        reward.fit(groups, make_rankings(groups))
    assert torch.equal(reference.logprobs(groups), start)
    assert not torch.equal(policy.logprobs(groups), start)
    assert tensors_of(base) == before


def test_the_first_step_has_no_kl_and_later_ones_have(tiny_model: Path, tmp_path: Path, law: Path, process_group: None):
    recipe = make_recipe(tiny_model, tmp_path, law)
    base = make_base(recipe)
    policy, reference = Policy(base, recipe, 0, 1), Reference(base, recipe)
    groups = make_groups()
    mask = answer_mask(groups)
    gaps: list[float] = []
    for step in range(3):
        gaps.append(float((policy.logprobs(groups) - reference.logprobs(groups))[mask].abs().max()))
        policy.update(rollout(recipe, policy, reference, step))
    assert gaps[0] == 0.0 and gaps[1] > 0 and gaps[2] > 0


def test_a_frozen_adapter_takes_part_in_no_backward_pass(
    tiny_model: Path, tmp_path: Path, law: Path, process_group: None
):
    recipe = make_recipe(tiny_model, tmp_path, law)
    base = make_base(recipe)
    reference = Reference(base, recipe)
    policy, critic = Policy(base, recipe, 0, 1), Critic(base, recipe, 0, 1)
    trained = {id(p) for name in ("policy", "critic") for p in base.parameters(name).values()}
    frozen = base.parameters("reference").values()
    for adapter in ("reference", None, "policy", "reference", "critic"):
        with base.use(adapter):
            assert {id(p) for p in base.model.parameters() if p.requires_grad} == trained
    made = rollout(recipe, policy, reference)
    policy.update(made)
    critic.update(made)
    assert all(p.grad is None and not p.requires_grad for p in frozen)


def test_two_adapters_on_one_base_do_not_disturb_each_other(tiny_model: Path, tmp_path: Path, law: Path):
    recipe = make_recipe(tiny_model, tmp_path, law)
    starts = {"law": read_start(law), "style": read_start(make_start(tiny_model, tmp_path / "style", seed=9))}
    both = make_base(recipe)
    for name, start in starts.items():
        both.attach(name, start)
    for name, start in starts.items():
        alone = make_base(recipe)
        alone.attach(name, start)
        assert torch.equal(logits(both, name), logits(alone, name))
    assert not torch.equal(logits(both, "law"), logits(both, "style"))
    assert torch.equal(logits(both, None), logits(make_base(recipe), None))


def test_without_a_start_the_reference_attaches_nothing_and_the_state_is_as_it_was(
    tiny_model: Path, tmp_path: Path, process_group: None
):
    recipe = make_recipe(tiny_model, tmp_path, None)
    base = make_base(recipe)
    policy, reference = Policy(base, recipe, 0, 1), Reference(base, recipe)
    groups = make_groups()
    assert base.adapters == ("policy",)
    assert torch.equal(reference.logprobs(groups), reference.base_logprobs(groups))
    assert policy.state().values == {"updates": 0, "version": 0}


def other_settings(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    config["r"] = 8


def other_targets(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if "q_proj" not in name]:
        del tensors[name]


def fewer_layers(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if ".layers.1." in name]:
        del tensors[name]


def a_head(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.score.weight"] = torch.zeros(1, 128)


def another_width(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    for name in tensors:
        tensors[name] = torch.zeros(4, 64) if ".lora_A." in name else tensors[name]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (other_settings, r"its rank is 8\. The recipe says lora\.rank=4"),
        (other_targets, r"adapts q_proj\. By lora\.targets the recipe adapts down_proj.* Set lora\.targets=\[q_proj\]"),
        (fewer_layers, r"does not fit the base: 14 missing .*Set model\.path"),
        (a_head, r"does not fit the base: 1 unknown \(base_model\.model\.score\.weight\)"),
        (another_width, r"has the shape \(4, 64\), not \(4, 128\)"),
    ],
)
def test_a_start_that_does_not_fit_recipe_or_base_is_refused(
    tiny_model: Path, tmp_path: Path, law: Path, change: Any, said: str
):
    recipe = make_recipe(tiny_model, tmp_path, None)
    start = read_start(law)
    config, tensors = dict(start.config), dict(start.tensors)
    change(config, tensors)
    with pytest.raises(ModelError, match=said):
        make_base(recipe).attach("policy", Adapter(0, tensors, config, checksum(tensors)))


def test_a_role_names_the_folder_whose_settings_differ(tiny_model: Path, tmp_path: Path):
    folder = make_start(tiny_model, tmp_path / "rank8", rank=8)
    recipe = make_recipe(tiny_model, tmp_path, folder)
    for role in (lambda base: Policy(base, recipe, 0, 1), lambda base: Reference(base, recipe)):
        with pytest.raises(ModelError, match=r"adapter_from=.*rank8: its rank is 8\..*Set lora\.rank=8"):
            role(make_base(recipe))


def test_a_resume_goes_on_bit_for_bit_and_knows_its_start(
    tiny_model: Path, tmp_path: Path, law: Path, process_group: None
):
    recipe = make_recipe(tiny_model, tmp_path, law)

    def make() -> tuple[Policy, Reference]:
        base = make_base(recipe)
        return Policy(base, recipe, 0, 1), Reference(base, recipe)

    straight, reference = make()
    for step in range(2):
        straight.update(rollout(recipe, straight, reference, step))
    saved = straight.state()
    assert saved.values["start"] == (starting_adapter(recipe) or pytest.fail("no start")).checksum
    straight.update(rollout(recipe, straight, reference, 2))
    resumed, reference = make()
    resumed.load_state(saved)
    resumed.update(rollout(recipe, resumed, reference, 2))
    assert same_bits(resumed.state(), straight.state())

    other = make_recipe(tiny_model, tmp_path, make_start(tiny_model, tmp_path / "other", seed=9))
    with pytest.raises(StoreError, match=r"began as the adapter \w{12}\. .* is the adapter \w{12}"):
        Policy(make_base(other), other, 0, 1).load_state(saved)
    none = make_recipe(tiny_model, tmp_path, None)
    with pytest.raises(StoreError, match=r"began as the adapter .* now is the base"):
        Policy(make_base(none), none, 0, 1).load_state(saved)
