"""What the generator is measured against: a float32 Hugging Face forward of the same base with the adapter merged."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from actors.adapters import expected_shapes
from configs.schema import LoraConfig
from rlhf.checksum import checksum
from rlhf.records import Adapter, AnswerGroup

LORA = LoraConfig(rank=4, alpha=6)  # a rank below the engine's smallest, a scale that is no power of two


def make_adapter(model: Path, version: int) -> Adapter:
    """A random adapter of that version; version 0 is a start, with B zero."""
    generator = torch.Generator().manual_seed(version)
    tensors = {
        name: torch.randn(shape, generator=generator) * (0.2 if version or "lora_A" in name else 0.0)
        for name, shape in expected_shapes(str(model), LORA).items()
    }
    config = {"r": LORA.rank, "lora_alpha": LORA.alpha, "target_modules": ["q_proj"], "peft_type": "LORA"}
    return Adapter(version, tensors, config, checksum(tensors))


@cache
def merged(model: Path, version: int) -> Any:
    """The base in Hugging Face's implementation, with scale · B · A added to its weights (version 0: nothing)."""
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    adapter = make_adapter(model, version)
    for name in adapter.tensors if version else ():
        if ".lora_A." in name:
            a, b = adapter.tensors[name], adapter.tensors[name.replace(".lora_A.", ".lora_B.")]
            weight = reference.get_parameter(name.removeprefix("base_model.model.").replace(".lora_A", ""))
            weight.data.add_(b @ a, alpha=LORA.alpha / LORA.rank)
    return reference


@torch.no_grad()
def largest_gap(reference: Any, groups: Sequence[AnswerGroup], temperature: float) -> float:
    """The largest difference in nats between the engine's logprobs and log_softmax(logits / temperature)."""
    gaps: list[torch.Tensor] = []
    for group in groups:
        start = len(group.prompt.token_ids)
        rows = [torch.tensor([*group.prompt.token_ids, *answer.token_ids]) for answer in group.answers]
        logits = reference(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)).logits
        for row, answer in zip((logits / temperature).log_softmax(-1), group.answers, strict=True):
            steps = torch.arange(len(answer.token_ids))
            gaps.append(row[start - 1 + steps, list(answer.token_ids)] - torch.tensor(answer.logprobs))
    return float(torch.cat(gaps).abs().max())
