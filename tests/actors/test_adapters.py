"""Adapters on their way to an engine: what fits the base, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from actors.adapters import changes_nothing, check_adapter, engine_checksum, expected_shapes, target_names
from configs.schema import LoraConfig
from rlhf.checksum import checksum
from rlhf.errors import ModelError, SyncError
from rlhf.records import Adapter

LORA = LoraConfig(rank=2, alpha=3, targets=("q_proj", "v_proj"))
Q = "base_model.model.model.layers.0.self_attn.q_proj"


def adapter_of(tensors: dict[str, torch.Tensor], version: int = 1) -> Adapter:
    return Adapter(version, tensors, {"r": 2, "lora_alpha": 3}, checksum(tensors))


@pytest.fixture(scope="module")
def shapes(tiny_model: Path) -> dict[str, tuple[int, ...]]:
    return expected_shapes(str(tiny_model), LORA)


@pytest.fixture
def tensors(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def test_shapes_are_those_of_the_targets_in_every_layer(shapes: dict[str, tuple[int, ...]]) -> None:
    assert len(shapes) == 2 * 2 * 2  # layers, targets, A and B
    assert shapes[f"{Q}.lora_A.weight"] == (2, 128)
    assert shapes[f"{Q.replace('q_proj', 'v_proj')}.lora_B.weight"] == (64, 2)
    assert target_names(shapes) == ["q_proj", "v_proj"]


def test_shapes_and_names_are_those_of_peft(tiny_model: Path) -> None:
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    peft = get_peft_model(model, PeftLoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    theirs = {name: tuple(tensor.shape) for name, tensor in get_peft_model_state_dict(peft).items()}
    assert expected_shapes(str(tiny_model), LoraConfig(rank=2)) == theirs


def test_a_target_that_the_base_lacks_is_refused(tiny_model: Path) -> None:
    with pytest.raises(ModelError, match=r"q_prj.*The base has down_proj"):
        expected_shapes(str(tiny_model), LoraConfig(targets=("q_prj",)))


def test_the_output_layer_is_refused_as_a_target(tiny_model: Path) -> None:
    with pytest.raises(ModelError, match="lm_head"):
        expected_shapes(str(tiny_model), LoraConfig(targets=("q_proj", "lm_head")))


def test_an_adapter_that_fits_is_taken(shapes: dict[str, tuple[int, ...]], tensors: dict[str, torch.Tensor]) -> None:
    check_adapter(adapter_of(tensors), shapes, LORA)


def test_the_scalar_head_never_travels(shapes: dict[str, tuple[int, ...]], tensors: dict[str, torch.Tensor]) -> None:
    with pytest.raises(SyncError, match=r"1 unknown \(head.weight\)"):
        check_adapter(adapter_of(tensors | {"head.weight": torch.zeros(1, 128)}), shapes, LORA)


def test_a_missing_tensor_is_refused(shapes: dict[str, tuple[int, ...]], tensors: dict[str, torch.Tensor]) -> None:
    del tensors[f"{Q}.lora_B.weight"]
    with pytest.raises(SyncError, match=r"1 missing \(.*q_proj\.lora_B\.weight\)"):
        check_adapter(adapter_of(tensors), shapes, LORA)


def test_a_wrong_shape_is_refused(shapes: dict[str, tuple[int, ...]], tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{Q}.lora_A.weight"] = torch.zeros(2, 64)
    with pytest.raises(SyncError, match=r"\(2, 64\).*\(2, 128\)"):
        check_adapter(adapter_of(tensors), shapes, LORA)


def test_a_number_that_is_not_finite_is_refused(
    shapes: dict[str, tuple[int, ...]], tensors: dict[str, torch.Tensor]
) -> None:
    tensors[f"{Q}.lora_A.weight"][1, 5] = torch.nan
    with pytest.raises(SyncError, match="not finite"):
        check_adapter(adapter_of(tensors), shapes, LORA)


def test_a_single_altered_number_is_noticed(
    shapes: dict[str, tuple[int, ...]], tensors: dict[str, torch.Tensor]
) -> None:
    adapter = adapter_of(tensors)
    tensors[f"{Q}.lora_A.weight"][0, 0] += 1e-6
    with pytest.raises(SyncError, match="altered on its way"):
        check_adapter(adapter, shapes, LORA)


def test_another_scale_is_refused(shapes: dict[str, tuple[int, ...]], tensors: dict[str, torch.Tensor]) -> None:
    with pytest.raises(SyncError, match=r"scaled by 8.0.*1.5"):
        check_adapter(replace(adapter_of(tensors), config={"r": 2, "lora_alpha": 16}), shapes, LORA)


def test_per_layer_ranks_are_refused(shapes: dict[str, tuple[int, ...]], tensors: dict[str, torch.Tensor]) -> None:
    config = {"r": 2, "lora_alpha": 3, "rank_pattern": {"q_proj": 4}}
    with pytest.raises(SyncError, match="rank_pattern"):
        check_adapter(replace(adapter_of(tensors), config=config), shapes, LORA)


def test_an_adapter_changes_nothing_only_if_every_b_is_zero(tensors: dict[str, torch.Tensor]) -> None:
    zero = {name: torch.zeros_like(t) if "lora_B" in name else t for name, t in tensors.items()}
    assert changes_nothing(adapter_of(zero))
    zero[f"{Q}.lora_B.weight"][3, 1] = 1e-9
    assert not changes_nothing(adapter_of(zero))


def test_the_engine_must_hold_b_times_the_scale() -> None:
    adapter = adapter_of({"x.lora_A.weight": torch.tensor([[2.0]]), "x.lora_B.weight": torch.tensor([[4.0]])})
    held = {"x.lora_A.weight": torch.tensor([[2.0]]), "x.lora_B.weight": torch.tensor([[6.0]])}
    assert engine_checksum(adapter, torch.float32) == checksum(held)
    halves = {name: tensor.bfloat16() for name, tensor in held.items()}
    assert engine_checksum(adapter, torch.bfloat16) == checksum(halves)
