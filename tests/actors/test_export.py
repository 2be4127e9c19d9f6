"""What leaves a run loads with plain transformers and peft, and answers as what was trained."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import actors.export
from actors.base import Base
from actors.export import export
from configs.schema import LoraConfig, ModelConfig
from rlhf.adapters import write_adapter
from rlhf.checksum import checksum
from rlhf.errors import ModelError, StoreError
from rlhf.lineage import Trained
from rlhf.records import Adapter
from tests.rlhf.runs import flip_a_byte

LORA = LoraConfig(rank=4, alpha=6)
TEXTS = [list(range(1, 33)), [260, *range(40, 80, 3)]]


def make_trained(base: Path, folder: Path, scale: float = 0.1) -> Trained:
    """An adapter on this base as a stage leaves it; with scale 0 it changes nothing."""
    frozen = Base(ModelConfig(path=str(base), dtype="float32"), LORA, seed=0)
    frozen.attach("policy")
    generator = torch.Generator().manual_seed(1)
    tensors = {
        name: (
            parameter.detach().clone()
            if "lora_A" in name
            else scale * torch.randn(parameter.shape, generator=generator)
        )
        for name, parameter in frozen.parameters("policy").items()
    }
    write_adapter(folder, Adapter(3, tensors, frozen.adapter_config("policy"), checksum(tensors)))
    return Trained("ppo", folder, True, base)


def in_bfloat16(model: Path, folder: Path) -> Path:
    shutil.copytree(model, folder)
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def trained(tiny_model: Path, tmp_path: Path) -> Trained:
    return make_trained(tiny_model, tmp_path / "policy")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_an_adapter_is_written_as_peft_writes_it_and_nothing_else(trained: Trained, tiny_model: Path, tmp_path: Path):
    done = export(trained, tmp_path / "out", LORA, TEXTS, merge=False, with_tokenizer=False)
    assert names(tmp_path / "out") == {"adapter_config.json", "adapter_model.safetensors"}
    assert (done.kind, done.dtype, done.num_tokens) == ("adapter", "float32", 31 + 14)
    assert done.to_trained < 1e-5 and done.to_base is not None and done.to_base > 0.1
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["inference_mode"]) == (str(tiny_model), True)
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert checksum(written) == checksum(load_file(trained.folder / "adapter_model.safetensors"))


def test_a_merged_model_comes_with_tokenizer_template_and_generation_settings(
    trained: Trained, tiny_model: Path, tmp_path: Path
):
    (tmp_path / "out").mkdir()  # empty, so it may be used
    done = export(trained, tmp_path / "out", LORA, TEXTS, merge=True, with_tokenizer=False)
    assert (done.kind, done.dtype) == ("merged model", "float32")
    assert done.to_trained < 1e-4 and done.to_base is not None and done.to_base > 0.1
    mine, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "out", tiny_model))
    assert mine.chat_template == theirs.chat_template
    assert mine.encode("Why?") == theirs.encode("Why?")
    settings = [(folder / "generation_config.json").read_text() for folder in (tmp_path / "out", tiny_model)]
    assert settings[0] == settings[1]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    beside = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), str(trained.folder)).eval()
    with torch.no_grad():
        gap = merged(torch.tensor(TEXTS[:1])).logits - beside(torch.tensor(TEXTS[:1])).logits
    assert float(gap.abs().max()) < 1e-3


def test_a_merged_model_has_its_bases_dtype(tiny_model: Path, tmp_path: Path):
    base = in_bfloat16(tiny_model, tmp_path / "base")
    done = export(
        make_trained(base, tmp_path / "policy"), tmp_path / "out", LORA, TEXTS, merge=True, with_tokenizer=False
    )
    assert done.dtype == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16
    assert 0 < done.to_trained < 0.1


def test_an_adapter_that_the_bases_dtype_rounds_away_is_not_merged(tiny_model: Path, tmp_path: Path):
    base = in_bfloat16(tiny_model, tmp_path / "base")
    small = make_trained(base, tmp_path / "policy", scale=1e-4)
    with pytest.raises(ModelError, match=r"In bfloat16 the merged weights hardly hold the adapter.*Leave --merge out"):
        export(small, tmp_path / "out", LORA, TEXTS, merge=True, with_tokenizer=False)
    assert names(tmp_path) == {"base", "policy"}
    assert export(small, tmp_path / "out", LORA, TEXTS, merge=False, with_tokenizer=False).to_trained < 1e-5


@pytest.mark.parametrize("merge", [False, True])
def test_an_adapter_that_changes_nothing_is_an_error(tiny_model: Path, tmp_path: Path, merge: bool):
    zero = make_trained(tiny_model, tmp_path / "policy", scale=0.0)
    with pytest.raises(ModelError, match=r"The adapter changes nothing: .*policy and its base .* on 45 tokens"):
        export(zero, tmp_path / "out", LORA, TEXTS, merge=merge, with_tokenizer=False)
    assert names(tmp_path) == {"policy"}


def test_what_is_written_wrong_is_found_out_and_not_left_there(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write = actors.export._write_adapter

    def wrong(adapter: Adapter, base: Path, folder: Path) -> None:
        scaled = {name: 1.1 * tensor for name, tensor in adapter.tensors.items()}
        write(dataclasses.replace(adapter, tensors=scaled), base, folder)

    monkeypatch.setattr(actors.export, "_write_adapter", wrong)
    with pytest.raises(ModelError, match=r"answers otherwise than what was trained.*The limit is 0\.0001"):
        export(trained, tmp_path / "out", LORA, TEXTS, merge=False, with_tokenizer=False)
    assert names(tmp_path) == {"policy"}


def test_a_folder_that_holds_something_is_left_alone(trained: Trained, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ModelError, match=r"out is not empty\. .* delete what is there"):
        export(trained, tmp_path / "out", LORA, TEXTS, merge=False, with_tokenizer=False)
    assert names(tmp_path / "out") == {"mine.txt"}
    with pytest.raises(ModelError, match="is a file"):
        export(trained, tmp_path / "out" / "mine.txt", LORA, TEXTS, merge=False, with_tokenizer=False)


def test_a_damaged_adapter_and_a_base_that_is_gone_are_told(trained: Trained, tmp_path: Path):
    gone = dataclasses.replace(trained, base=tmp_path / "gone")
    with pytest.raises(ModelError, match="gone: no such folder"):
        export(gone, tmp_path / "out", LORA, TEXTS, merge=True, with_tokenizer=False)
    flip_a_byte(trained.folder / "adapter_model.safetensors")
    with pytest.raises(StoreError, match="was altered"):
        export(trained, tmp_path / "out", LORA, TEXTS, merge=False, with_tokenizer=False)


def test_the_runs_own_tokenizer_goes_with_an_adapter(trained: Trained, tmp_path: Path):
    export(trained, tmp_path / "out", LORA, TEXTS, merge=False, with_tokenizer=True)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").encode("Why?")
    assert not (tmp_path / "out" / "config.json").exists()


def make_whole(model: Path, folder: Path, moved: float) -> Path:
    """A whole model as a stage leaves it: every weight moved by a share of itself."""
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    save_file({name: t * (1 + moved) for name, t in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_whole_model_that_was_altered_is_not_exported(tiny_model: Path, tmp_path: Path):
    folder = make_whole(tiny_model, tmp_path / "sft", 0.1)
    files = {"model.safetensors": {"sha256": "0" * 64, "bytes": (folder / "model.safetensors").stat().st_size}}
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))
    with pytest.raises(StoreError, match=r"model\.safetensors was altered"):
        export(
            Trained("sft", folder, False, tiny_model), tmp_path / "out", LORA, TEXTS, merge=False, with_tokenizer=False
        )


@pytest.mark.parametrize("from_nothing", [False, True])
def test_a_whole_model_is_copied(tiny_model: Path, tmp_path: Path, from_nothing: bool):
    folder = make_whole(tiny_model, tmp_path / "sft", 0.1)
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "files": {}}))
    trained = Trained("sft", folder, False, None if from_nothing else tiny_model)
    done = export(trained, tmp_path / "out", LORA, TEXTS, merge=False, with_tokenizer=False)
    assert names(tmp_path / "out") == names(folder) - {"manifest.json"}
    assert (done.kind, done.to_trained) == ("model", 0.0)
    assert done.to_base is None if from_nothing else done.to_base > 0.1  # type: ignore[operator]


def test_a_whole_model_that_equals_its_base_is_an_error(tiny_model: Path, tmp_path: Path):
    trained = Trained("sft", make_whole(tiny_model, tmp_path / "sft", 0.0), False, tiny_model)
    with pytest.raises(ModelError, match="Training changed nothing"):
        export(trained, tmp_path / "out", LORA, TEXTS, merge=False, with_tokenizer=False)
