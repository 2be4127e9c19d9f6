"""Bytes that a worker of `pretrain` or `sft` takes. They run before the other roles start, on the same GPUs."""

from __future__ import annotations

from dataclasses import replace

from cluster.plan.memory import (
    CHUNK,
    CONTEXT,
    CPU_PROCESS,
    LIVE,
    NCCL,
    Parts,
    activations,
    learner_state,
    trainer_parts,
)
from cluster.plan.work import Layout, Work
from configs.schema import Stage


def model_parts(work: Work, layout: Layout, stage: Stage, world: int) -> Parts:
    """A worker of that stage. LoRA (`sft.train: lora`) takes what a policy takes; else the whole decoder is trained."""
    tokens = pass_tokens(work, layout, stage)
    if stage == "sft" and work.recipe.sft.train == "lora":
        longer = replace(layout, micro_batch_tokens=tokens)
        alike = trainer_parts(work, longer, ("policy",), world)
        return replace(alike, activations=activations(work, longer, tokens, trains=True))
    return _whole(work, layout, tokens, world)


def pass_tokens(work: Work, layout: Layout, stage: Stage) -> int:
    """Tokens of its largest pass: the limit, or one text where that is longer."""
    recipe = work.recipe
    longest = recipe.pretrain.row_tokens if stage == "pretrain" else recipe.sft.max_text_tokens
    texts = recipe.pretrain.batch_rows if stage == "pretrain" else recipe.sft.batch_texts
    return max(min(layout.micro_batch_tokens, texts * longest), longest)


def _whole(work: Work, layout: Layout, tokens: int, world: int) -> Parts:
    """All parameters in float32, with passes in the recipe's type (actors/base.py, `train_all`).

    Autocast keeps a copy of each weight in that type until the update is over (torch.amp). Every linear layer keeps its
    input, and norms also what they scaled.
    """
    shape, size = work.shape, work.dtype_bytes
    num = shape.num_parameters
    state = learner_state(num, layout.zero_stage, world)
    casts = 0 if size == 4 else size * num
    gathered = 4 * min(num, max(LIVE, shape.largest_module)) if layout.zero_stage == 3 and world > 1 else 0
    inputs = sum(layer.inputs * layer.count for layer in shape.linears) // shape.num_layers
    attention = 2 * 4 * shape.queries + (4 + size) * shape.keys + 4 * shape.heads
    layer = tokens * (size * inputs + 8 * shape.norms_per_layer + attention + 3 * size * shape.widest)
    kept = shape.num_layers * layer
    if layout.gradient_checkpointing:
        kept = shape.num_layers * tokens * 4 * shape.hidden + layer
    inside = tokens * (shape.widest * (4 + 2 * size) + 16 * shape.hidden)
    mask = tokens * tokens * (1 if work.device.is_cpu else 6)
    overhead = CPU_PROCESS if work.device.is_cpu else CONTEXT + (NCCL if world > 1 else 0)
    return Parts(
        weights=state.adapters + gathered + casts,
        gradients=state.gradients + state.passing,
        optimizer=state.optimizer,
        activations=kept + inside + mask,
        logits=min(CHUNK, tokens) * shape.vocab * (16 + size),
        overhead=overhead,
    )
