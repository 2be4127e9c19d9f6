"""One worker of pretrain and sft, with a real learner: what it writes, and that others load it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.model_trainer import work
from configs.schema import Recipe
from rlhf.masks import TrainedText
from rlhf.stages.sft import ConversationData
from rlhf.text_stream import examples_of
from rlhf.training import Job, Opening, Place, Report

pytestmark = pytest.mark.engine

IDS = torch.tensor([[10, 20, 30, 40, 50, 60]])


def job(model: Path, folder: Path, adapter: str | None, named: str | None = None, dtype: str = "float32") -> Job:
    """Four steps over eight short texts."""
    recipe = Recipe.model_validate(
        {
            "name": "x",
            "stages": ["sft"],
            "model": {"path": str(model), "dtype": dtype},
            "lora": {"rank": 4, "alpha": 8},
            "adapter": named,
            "sft": {
                "sources": [{"path": "p"}],
                "train": "lora" if adapter else "full",
                "batch_texts": 2,
                "optimizer": {"lr": 1e-2},
            },
        }
    )
    texts = examples_of([TrainedText((1, 5 + n, 9, 30 + n, 7), (False, False, True, True, True), "") for n in range(8)])
    return Job(
        stage="sft",
        recipe=recipe,
        folder=folder,
        start=model,
        tokenizer=model,
        adapter=adapter,
        result=folder / "models" / (named or "sft"),
        data=ConversationData(texts, texts[:2], recipe, (Opening("once", (1, 5)),)),
        num_steps=4,
        num_sample_tokens=3,
        evaluate_every=2,
        save_every=2,
    )


def train(made: Job) -> list[Report]:
    reports: list[Report] = []
    work(made, Place(0, 1), "cpu", lambda report: bool(reports.append(report)))
    return reports


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_full_training_writes_a_model_that_transformers_loads(
    tiny_model: Path, process_group: None, tmp_path: Path
) -> None:
    reports = train(job(tiny_model, tmp_path, None))
    losses = [report.metrics["sft/held_out_loss"] for report in reports if "sft/held_out_loss" in report.metrics]
    assert losses[-1] < losses[0] and reports[-1].kind == "written"
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "models" / "sft", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    assert float((logits(trained) - logits(base)).abs().max()) > 0.1
    saved = load_file(tmp_path / "checkpoints" / "sft" / "step-4" / "model.safetensors")
    for name, parameter in trained.named_parameters():
        assert torch.equal(parameter, saved[f"model.{name}"]), name
    assert AutoTokenizer.from_pretrained(tmp_path / "models" / "sft").chat_template
    ends = json.loads((tmp_path / "models" / "sft" / "generation_config.json").read_text())["eos_token_id"]
    assert ends == base.config.eos_token_id


def test_lora_is_merged_and_answers_as_base_and_adapter_do(
    tiny_model: Path, process_group: None, tmp_path: Path
) -> None:
    train(job(tiny_model, tmp_path / "merged", "sft"))
    train(job(tiny_model, tmp_path / "named", "sft", named="law"))  # the same adapter, kept
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged" / "models" / "sft", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    plain = logits(base)
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "named" / "models" / "law"))
    assert float((logits(merged) - logits(adapted)).abs().max()) < 1e-4
    assert float((logits(merged) - plain).abs().max()) > 0.01


def test_bfloat16_is_written_as_bfloat16_and_trained_in_float32(
    tiny_model: Path, process_group: None, tmp_path: Path
) -> None:
    train(job(tiny_model, tmp_path, None, dtype="bfloat16"))
    written = load_file(tmp_path / "models" / "sft" / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    saved = load_file(tmp_path / "checkpoints" / "sft" / "step-4" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


def test_new_tokens_start_as_the_mean_of_the_others(tiny_model: Path, process_group: None, tmp_path: Path) -> None:
    from actors.base import Base
    from configs.schema import LoraConfig, ModelConfig

    base = Base(ModelConfig(path=str(tiny_model), dtype="float32"), LoraConfig(), seed=0)
    before = base.model.get_input_embeddings().weight.clone()
    base.grow(len(before) + 2)
    for layer in (base.model.get_input_embeddings(), base.model.get_output_embeddings()):
        assert layer.weight.shape[0] == len(before) + 2
        torch.testing.assert_close(layer.weight[-1], layer.weight[: len(before)].mean(0))
    assert torch.equal(base.model.get_input_embeddings().weight[: len(before)], before)
    assert base.model.config.vocab_size == len(before) + 2


def test_a_sample_leaves_the_random_state_and_the_weights_alone(
    tiny_model: Path, process_group: None, tmp_path: Path
) -> None:
    with_samples = train(job(tiny_model, tmp_path / "a", None))
    made = job(tiny_model, tmp_path / "b", None)
    data = ConversationData(made.data.train, made.data.measured, made.recipe, ())  # type: ignore[attr-defined]
    without = train(replace(made, data=data))
    losses = [[r.metrics.get("sft/loss") for r in reports if r.kind == "row"] for reports in (with_samples, without)]
    assert losses[0] == losses[1]
    assert with_samples[-2].kind == "saved" and any(report.samples for report in with_samples)
