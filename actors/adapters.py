"""Adapters on their way to a trainer or an engine: what the base allows, what must be held, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from configs.schema import LoraConfig
from rlhf.adapters import check_settings
from rlhf.checksum import checksum
from rlhf.errors import ModelError, SyncError
from rlhf.records import Adapter

Shapes = Mapping[str, tuple[int, ...]]


def expected_shapes(model_path: str, lora: LoraConfig) -> dict[str, tuple[int, ...]]:
    """PEFT's name and the shape of every tensor that an adapter on this base has. Loads no weights.

    Raises ModelError for a target that the base lacks, and for its output layer, which an engine cannot adapt.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_path))
    output = model.get_output_embeddings()
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if lora.targets == "all-linear":
        chosen = {name: module for name, module in layers.items() if module is not output}
    else:
        chosen = {name: module for name, module in layers.items() if _last(name) in lora.targets}
        allowed = sorted({_last(name) for name, module in layers.items() if module is not output})
        if wrong := sorted(set(lora.targets) - set(allowed)):
            raise ModelError(
                f"lora.targets names {', '.join(wrong)}, which no adapter on {model_path} can have in the engine.",
                limit=f"The base has {', '.join(allowed)}.",
                remedy="Choose among these, or all-linear.",
            )
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in chosen.items():
        shapes[f"base_model.model.{name}.lora_A.weight"] = (lora.rank, module.in_features)
        shapes[f"base_model.model.{name}.lora_B.weight"] = (module.out_features, lora.rank)
    return shapes


def target_names(names: Iterable[str]) -> list[str]:
    """The last parts of the names of the adapted layers ("q_proj"), sorted."""
    return sorted({_last(name.rpartition(".lora_")[0]) for name in names})


def check_adapter(adapter: Adapter, shapes: Shapes, lora: LoraConfig) -> None:
    """Raises SyncError for an adapter that was altered on its way, does not fit the base, or is not finite.

    Only LoRA matrices may travel: a scalar head among the tensors is refused, too.
    """
    what = f"The adapter of version {adapter.version}"
    foreign = sorted(set(adapter.tensors) - set(shapes))
    missing = sorted(set(shapes) - set(adapter.tensors))
    if foreign or missing:
        raise SyncError(
            f"{what} does not match the base: {_some('unknown', foreign)}{_some('missing', missing)}.",
            limit=f"The base has {len(shapes)} LoRA tensors for these targets, and nothing else may travel.",
            remedy="Trainer and generator must be given the same model.path and lora.targets.",
        )
    for name, tensor in adapter.tensors.items():
        if tuple(tensor.shape) != shapes[name]:
            raise SyncError(
                f"{what} does not match the base: {name} has the shape {tuple(tensor.shape)}.",
                limit=f"The base has {shapes[name]}.",
                remedy="Trainer and generator must be given the same model.path and lora.rank.",
            )
        if not bool(torch.isfinite(tensor).all()):
            raise SyncError(
                f"{what} holds numbers that are not finite, in {name}.",
                remedy="Training diverged: lower ppo.optimizer.lr, and resume from the newest checkpoint.",
            )
    if (scale := _scale(adapter)) != lora.alpha / lora.rank:
        raise SyncError(
            f"{what} is scaled by {scale}.",
            limit=f"lora.alpha / lora.rank is {lora.alpha / lora.rank}.",
            remedy="Trainer and generator must be given the same lora section.",
        )
    if (found := checksum(adapter.tensors)) != adapter.checksum:
        raise SyncError(
            f"{what} was altered on its way: its tensors have the checksum {found[:12]}.",
            limit=f"It was sent with {adapter.checksum[:12]}.",
            remedy="Resume the run: the trainer sends the adapter again.",
        )


def check_start(start: Adapter, shapes: Shapes, lora: LoraConfig) -> None:
    """Raises ModelError for an adapter that cannot be continued: of other settings than the recipe's, or another base.

    `shapes` are the names and shapes that a fresh adapter of these settings has on the base.
    """
    check_settings(start, lora)
    theirs = set(target_names(name for name in start.tensors if ".lora_" in name))
    ours = set(target_names(shapes))
    if theirs != ours:
        raise ModelError(
            f"The adapter to start from adapts {', '.join(sorted(theirs)) or 'nothing'}.",
            limit=f"By lora.targets the recipe adapts {', '.join(sorted(ours))}.",
            remedy=f"Set lora.targets=[{', '.join(sorted(theirs))}], if they are layers of the base.",
        )
    foreign, missing = sorted(set(start.tensors) - set(shapes)), sorted(set(shapes) - set(start.tensors))
    other = [name for name in shapes if name in start.tensors and tuple(start.tensors[name].shape) != shapes[name]]
    if not (foreign or missing or other):
        return
    problem = f"{_some('unknown', foreign)}{_some('missing', missing)}".strip()
    if other:
        problem = problem or f"{other[0]} has the shape {tuple(start.tensors[other[0]].shape)}, not {shapes[other[0]]}"
    raise ModelError(
        f"The adapter to start from does not fit the base: {problem}.",
        limit=f"The base has {len(shapes)} LoRA tensors for these targets.",
        remedy="Set model.path to the base that it was trained on.",
    )


def changes_nothing(adapter: Adapter) -> bool:
    """Whether every B matrix is zero, as at the start of training, so that base and adapter are the same model."""
    return not any(bool(tensor.any()) for name, tensor in adapter.tensors.items() if ".lora_B." in name)


def engine_checksum(adapter: Adapter, dtype: torch.dtype) -> str:
    """The checksum of what an engine must hold: A and scale · B, in the engine's dtype.

    LoRA adds scale · B · A to a layer (Hu et al., 2021, section 4.1); engines keep the scale in B.
    """
    scale = _scale(adapter)
    held = {name: tensor.detach().cpu().to(dtype) for name, tensor in adapter.tensors.items()}
    return checksum({name: tensor * scale if ".lora_B." in name else tensor for name, tensor in held.items()})


def _scale(adapter: Adapter) -> float:
    config = adapter.config
    rank, alpha = config["r"], config["lora_alpha"]
    assert isinstance(rank, (int, float)) and isinstance(alpha, (int, float))
    if config.get("rank_pattern") or config.get("alpha_pattern") or config.get("use_dora"):
        raise SyncError(
            f"The adapter of version {adapter.version} has rank_pattern, alpha_pattern or use_dora set.",
            limit="Every layer has the same rank and scale here.",
            remedy="Train it with a lora section of a recipe.",
        )
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _some(what: str, names: list[str]) -> str:
    if not names:
        return ""
    return f"{len(names)} {what} ({', '.join(names[:2])}{', …' if len(names) > 2 else ''}) "
