"""Adapters in PEFT's layout."""

import copy
import dataclasses
import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from configs.schema import LoraConfig
from rlhf.adapters import check_settings, read_start, starting_adapter, write_adapter
from rlhf.checksum import checksum
from rlhf.errors import ModelError, StoreError
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


def test_an_adapter_travels_as_the_buffers_that_its_tensors_lie_in():
    tensors = {
        "a": torch.randn(4, 6).t(),  # not contiguous
        "b": torch.randn(3, 5, dtype=torch.float32).to(torch.bfloat16),
        "one": torch.tensor(2.5, dtype=torch.float64),
    }
    sent = Adapter(3, tensors, {"r": 2}, checksum(tensors))
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(sent, protocol=5, buffer_callback=buffers.append)
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors.values()]
    assert [buffer.raw().nbytes for buffer in buffers] == sizes
    read_only = [bytes(buffer.raw()) for buffer in buffers]  # as memory that processes share
    for back in (pickle.loads(data, buffers=read_only), pickle.loads(pickle.dumps(sent)), copy.deepcopy(sent)):
        assert (back.version, back.config, back.checksum) == (3, {"r": 2}, sent.checksum)
        assert {name: (t.dtype, t.shape) for name, t in back.tensors.items()} == {
            name: (t.dtype, t.shape) for name, t in tensors.items()
        }
        assert checksum(back.tensors) == sent.checksum


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


# Starting from one

TENSORS = {"base_model.model.q.lora_A.weight": torch.tensor([[0.5, -1.0]])}
PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "init_lora_weights": True, "use_dora": False}
LORA = LoraConfig(rank=4, alpha=8)


def plain_folder(folder: Path, tensors: dict[str, torch.Tensor] | None = None, **config: object) -> Path:
    """A folder as plain peft writes it: without our manifest."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(PLAIN | config))
    save_file(tensors or TENSORS, folder / "adapter_model.safetensors")
    return folder


def test_a_start_is_read_from_pefts_folder_and_from_ours_alike(tmp_path: Path):
    plain = read_start(plain_folder(tmp_path / "plain"))
    write_adapter(tmp_path / "ours", Adapter(41, TENSORS, PLAIN, checksum(TENSORS)))
    ours = read_start(tmp_path / "ours")
    assert (plain.version, plain.config, plain.checksum) == (ours.version, ours.config, ours.checksum)
    assert (plain.version, plain.config["r"]) == (0, 4)
    assert plain.checksum == checksum(plain.tensors) == checksum(TENSORS)


def test_a_start_in_half_precision_comes_as_float32(tmp_path: Path):
    folder = plain_folder(tmp_path / "half", {name: t.bfloat16() for name, t in TENSORS.items()})
    start = read_start(folder)
    assert torch.equal(start.tensors["base_model.model.q.lora_A.weight"], torch.tensor([[0.5, -1.0]]))
    assert start.checksum == checksum(TENSORS)


def to_pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def cut(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-3])


def not_finite(folder: Path) -> None:
    save_file({"x.lora_A.weight": torch.tensor([1.0, float("nan")])}, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda folder: folder.rename(folder.with_name("away")), "there is no such folder"),
        (lambda folder: (folder / "adapter_config.json").unlink(), r"no adapter_config\.json in it.*model\.path"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), r"no adapter_model\.safetensors in it"),
        (to_pickle, r"are a pickle \(adapter_model\.bin\).*safetensors only.*save it again"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "is damaged"),
        (lambda folder: (folder / "adapter_config.json").write_text("[]"), "is damaged"),
        (lambda folder: (folder / "adapter_config.json").write_text('{"peft_type": "IA3"}'), "of the kind IA3"),
        (cut, "is damaged"),
        (not_finite, r"damaged: x\.lora_A\.weight holds numbers that are not finite"),
    ],
)
def test_a_folder_that_cannot_be_a_start_is_named_with_the_reason(
    tmp_path: Path, harm: Callable[[Path], object], said: str
):
    folder = plain_folder(tmp_path / "law")
    harm(folder)
    with pytest.raises(ModelError, match=rf"(?s)adapter_from=.*law.*{said}"):
        read_start(folder)


def test_a_start_of_ours_that_was_altered_is_refused(tmp_path: Path):
    write_adapter(tmp_path / "law", Adapter(1, TENSORS, PLAIN, checksum(TENSORS)))
    flip_a_byte(tmp_path / "law" / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"damaged: adapter_model\.safetensors was altered"):
        read_start(tmp_path / "law")


def start(**config: object) -> Adapter:
    return Adapter(0, TENSORS, PLAIN | config, checksum(TENSORS))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"r": 8}, r"its rank is 8\. The recipe says lora\.rank=4\. Set lora\.rank=8"),
        ({"lora_alpha": 16.5}, r"its alpha is 16\.5\. The recipe says lora\.alpha=8\. Set lora\.alpha=16\.5"),
        ({"use_rslora": True}, "says use_rslora=True"),
        ({"rank_pattern": {"q_proj": 2}}, "says rank_pattern="),
        ({"modules_to_save": ["lm_head"]}, "says modules_to_save="),
        ({"bias": "lora_only"}, "says bias=lora_only"),
        ({"init_lora_weights": "pissa_niter_4"}, "says init_lora_weights=pissa_niter_4"),
    ],
)
def test_a_start_of_other_settings_is_refused_with_those_to_set(config: dict[str, Any], said: str):
    with pytest.raises(ModelError, match=said):
        check_settings(start(**config), LORA)
    check_settings(start(lora_alpha=8.0, lora_dropout=0.1, init_lora_weights="gaussian"), LORA)


def test_the_recipe_names_the_start_or_there_is_none(tmp_path: Path):
    assert starting_adapter(recipe()) is None
    folder = plain_folder(tmp_path / "law")
    lora = {"rank": 4, "alpha": 8}
    found = starting_adapter(recipe(adapter_from=str(folder), lora=lora)) or pytest.fail("no adapter")
    assert found.checksum == read_start(folder).checksum
    with pytest.raises(ModelError, match=rf"adapter_from={folder}: its rank is 4"):
        starting_adapter(recipe(adapter_from=str(folder)))
