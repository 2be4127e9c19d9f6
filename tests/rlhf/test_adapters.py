"""Adapters in PEFT's layout."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rlhf.checksum import checksum
from rlhf.errors import StoreError
from rlhf.records import Adapter
from rlhf.store import RunStore
from tests.rlhf.runs import flip_a_byte, recipe


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RunStore]:
    with RunStore.open(tmp_path, recipe()) as opened:
        yield opened


def adapter() -> Adapter:
    tensors = {"base_model.model.q.lora_A.weight": torch.randn(2, 4)}
    return Adapter(7, tensors, {"peft_type": "LORA", "r": 2, "target_modules": {"v", "q"}}, checksum(tensors))


def test_an_adapter_comes_back_with_version_and_checksum(store: RunStore):
    assert store.load_adapter("policy") is None
    saved = adapter()
    store.save_adapter("policy", saved)
    loaded = store.load_adapter("policy") or pytest.fail("no adapter")
    assert (loaded.version, loaded.checksum) == (7, saved.checksum)
    assert loaded.config == {"peft_type": "LORA", "r": 2, "target_modules": ["q", "v"]}
    assert checksum(loaded.tensors) == saved.checksum


def test_an_adapter_that_was_altered_is_refused(store: RunStore):
    flip_a_byte(store.save_adapter("policy", adapter()) / "adapter_model.safetensors")
    with pytest.raises(StoreError, match="was altered"):
        store.load_adapter("policy")


def test_an_adapter_whose_tensors_are_not_those_of_its_checksum_is_refused(store: RunStore):
    store.save_adapter("policy", dataclasses.replace(adapter(), checksum="0" * 64))
    with pytest.raises(StoreError, match="not those of its checksum"):
        store.load_adapter("policy")


def test_peft_loads_a_saved_adapter_without_this_project(store: RunStore, tiny_model: Path):
    import peft
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    trained = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config)
    tensors = {name: tensor.detach() for name, tensor in peft.get_peft_model_state_dict(trained).items()}
    folder = store.save_adapter("policy", Adapter(1, tensors, config.to_dict(), checksum(tensors)))
    ids = torch.tensor([[5, 6, 7, 8]])
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), folder)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, trained(ids).logits)
