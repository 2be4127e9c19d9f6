"""The base: adapters that switch cleanly on one frozen decoder."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from actors.base import Base
from configs.schema import LoraConfig, ModelConfig
from rlhf.errors import ModelError

TOKENS = torch.arange(1, 21)[None]


def make_base(model: Path, dtype: str = "float32", seed: int = 0, **lora: object) -> Base:
    config = ModelConfig.model_validate({"path": str(model), "dtype": dtype})
    return Base(config, LoraConfig.model_validate({"rank": 4, "alpha": 8} | lora), seed=seed)


def stir(base: Base, name: str, seed: int = 1) -> None:
    """Moves an adapter away from its start, so that it changes what the decoder says."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in base.parameters(name).values():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def logits(base: Base, adapter: str | None) -> torch.Tensor:
    with torch.no_grad(), base.use(adapter) as model:
        return model(TOKENS).logits


def test_adapters_off_equals_the_pristine_base_exactly(tiny_model: Path):
    pristine = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    base = make_base(tiny_model)
    for name in ("policy", "critic"):
        base.attach(name)
        stir(base, name)
    assert not torch.equal(logits(base, "policy"), logits(base, None))
    with torch.no_grad():
        assert torch.equal(logits(base, None), pristine(TOKENS).logits)


def test_a_fresh_adapter_changes_nothing(tiny_model: Path):
    base = make_base(tiny_model)
    before = logits(base, None)
    base.attach("policy")
    assert torch.equal(logits(base, "policy"), before)


def test_each_adapter_speaks_for_itself_and_the_one_before_comes_back(tiny_model: Path):
    base = make_base(tiny_model)
    for seed, name in enumerate(("policy", "reward")):
        base.attach(name)
        stir(base, name, seed)
    policy = logits(base, "policy")
    with base.use("policy") as model, torch.no_grad():
        assert not torch.allclose(logits(base, "reward"), policy)
        assert not torch.allclose(logits(base, None), policy)
        assert torch.equal(model(TOKENS).logits, policy)


def test_every_adapter_stays_trainable_and_the_base_frozen_after_a_switch(tiny_model: Path):
    base = make_base(tiny_model)
    base.attach("policy")
    base.attach("critic")
    own = {id(p) for name in base.adapters for p in base.parameters(name).values()}
    for adapter in ("policy", None, "critic", "policy"):
        logits(base, adapter)
        with base.use(adapter):
            assert {id(p) for p in base.model.parameters() if p.requires_grad} == own


def test_adapters_start_the_same_on_every_rank_and_differ_by_name_and_seed(tiny_model: Path):
    def start(seed: int, name: str, before: tuple[str, ...] = ()) -> torch.Tensor:
        base = make_base(tiny_model, seed=seed)
        for other in (*before, name):
            base.attach(other)
        return torch.cat([p.detach().flatten() for p in base.parameters(name).values()])

    state = torch.get_rng_state()
    policy = start(0, "policy")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(start(0, "policy", before=("critic",)), policy)
    assert not torch.equal(start(0, "critic"), policy)
    assert not torch.equal(start(1, "policy"), policy)


def test_adapters_are_float32_on_a_bfloat16_base(tiny_model: Path):
    base = make_base(tiny_model, dtype="bfloat16")
    base.attach("policy")
    base.attach("critic")
    assert {p.dtype for name in base.adapters for p in base.parameters(name).values()} == {torch.float32}
    assert base.model.dtype == torch.bfloat16


def test_dropout_is_off_although_the_model_has_it(tiny_model: Path, tmp_path: Path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}))
    base = make_base(folder)
    base.attach("policy")
    stir(base, "policy")
    base.model.train()
    with base.use("policy") as model:
        assert torch.equal(model(TOKENS).logits, model(TOKENS).logits)


def test_parameters_have_pefts_names_and_an_adapter_folder_loads_with_peft(tiny_model: Path, tmp_path: Path):
    base = make_base(tiny_model, targets=("q_proj", "v_proj"))
    base.attach("policy")
    base.attach("critic")
    stir(base, "policy")
    parameters = {name: p.detach().clone() for name, p in base.parameters("policy").items()}
    save_file(parameters, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(base.adapter_config("policy")))
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), tmp_path)
    assert set(get_peft_model_state_dict(loaded)) == set(parameters)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(TOKENS).logits, logits(base, "policy"))


def test_all_linear_means_every_layer_but_the_output(tiny_model: Path):
    base = make_base(tiny_model, targets="all-linear")
    base.attach("policy")
    expected = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {name.split(".")[-3] for name in base.parameters("policy")} == expected
    assert base.adapter_config("policy")["target_modules"] == sorted(expected)


def test_a_layer_that_does_not_exist_is_named_with_the_nearest(tiny_model: Path):
    with pytest.raises(ModelError, match=r"no linear layer 'q_prj'.*Did you mean q_proj"):
        make_base(tiny_model, targets=("q_prj",))


def test_an_output_layer_that_is_the_embedding_too_is_no_target(tiny_model: Path, tmp_path: Path):
    make_base(tiny_model, targets=("q_proj", "lm_head"))
    tied = shutil.copytree(tiny_model, tmp_path / "tied")
    config = json.loads((tied / "config.json").read_text())
    (tied / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    weights = load_file(tied / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tied / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lora\.targets: 'lm_head' is the output layer.*all-linear"):
        make_base(tied, targets=("q_proj", "lm_head"))


def test_a_folder_that_is_missing_or_holds_no_model_is_refused(tmp_path: Path):
    with pytest.raises(ModelError, match=r"absent: no such folder\..*tenfold import-model"):
        make_base(tmp_path / "absent")
    with pytest.raises(ModelError, match=r"no config\.json"):
        make_base(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="does not load"):
        make_base(tmp_path)


def test_the_reward_head_has_the_published_spread_and_the_value_head_is_zero(tiny_model: Path):
    base = make_base(tiny_model)
    head = base.reward_head("reward")
    std = 1 / math.sqrt(128 + 1)
    # Over 128 weights the sample's deviation is within a fifth of the true one but for 1 in 1,000 draws.
    assert abs(float(head.weight.detach().std()) / std - 1) < 0.2
    assert torch.equal(head.weight, base.reward_head("reward").weight)
    assert head.bias is None
    assert head.weight.dtype == torch.float32
    assert not base.value_head()(torch.ones(2, 128, dtype=torch.bfloat16)).any()
