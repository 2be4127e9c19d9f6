"""A decoder from a folder: whole in this process, or spread over the ranks without any of them holding it whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

from actors.engine import SPREAD_WEIGHTS, attach
from configs.schema import ModelConfig
from rlhf.errors import ModelError

Outline = list[tuple[str, tuple[int, ...], torch.dtype]]


def load(config: ModelConfig) -> Any:
    """The decoder on the CPU, frozen, in evaluation mode and without dropout.

    Weights that the folder holds in this dtype are mapped from its files, not copied. Raises ModelError for a folder
    that is missing or does not load.
    """
    return _load(config, _with_weights)


def load_spread(config: ModelConfig) -> Any:
    """The same decoder with every parameter cut over the ranks of the process group, on their devices. Collective.

    Rank 0 reads the weights and sends them one parameter at a time, so that a device holds its share and one whole
    parameter, and the host of rank 0 one copy at most (none but the mapped files where the dtype is theirs).

    Raises ModelError on every rank where it does not load on one, and for ranks whose folders hold different models.
    """
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    attach(rank, world_size)
    model, problem = None, None
    try:
        model = _load(config, _with_weights if rank == 0 else _without_weights)
    except ModelError as error:
        problem = error
    _check_ranks(config, problem, [] if model is None else _outline(model))
    assert model is not None
    zero = deepspeed.zero.Init(module=model, config_dict_or_path=_settings())
    model.to(zero.local_device)  # buffers: nothing is left of the parameters
    for buffer in model.buffers():
        value = buffer.contiguous()
        torch.distributed.broadcast(value, 0)
        if rank != 0:
            buffer.copy_(value)
    return model


@contextmanager
def zero3_known(spread: bool) -> Iterator[None]:
    """Lets transformers, inside, gather a `spread` decoder's parameters where it needs them whole."""
    known = HfDeepSpeedConfig(_settings()) if spread else None  # transformers keeps a weak reference to it
    try:
        yield
    finally:
        if known is not None:
            unset_hf_deepspeed_config()


def _settings() -> dict[str, Any]:
    return {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": SPREAD_WEIGHTS}}


def _load(config: ModelConfig, make: Any) -> Any:
    folder = Path(config.path)
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"model.path={config.path}: {'there is no config.json in it' if folder.is_dir() else 'no such folder'}.",
            limit="A base is a folder in Hugging Face layout.",
            remedy="Make one with `tenfold import-model SOURCE DEST`.",
        )
    transformers.utils.logging.disable_progress_bar()
    try:
        settings = AutoConfig.from_pretrained(folder)
        _without_dropout(settings)
        model = make(folder, settings, getattr(torch, config.dtype))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(
            f"model.path={config.path}: it does not load ({error}).",
            limit="A base is a decoder-only model that transformers can load.",
            remedy="Import it again with `tenfold import-model`.",
        ) from error
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.requires_grad_(False).eval()


def _with_weights(folder: Path, settings: PretrainedConfig, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, config=settings, dtype=dtype, attn_implementation="sdpa")


def _without_weights(folder: Path, settings: PretrainedConfig, dtype: torch.dtype) -> Any:
    """The same layers with memory that is asked for and never touched: it costs addresses only."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings, dtype=dtype, attn_implementation="sdpa")
    model.to_empty(device="cpu")
    model.tie_weights()
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def _outline(model: nn.Module) -> Outline:
    return [(name, tuple(p.shape), p.dtype) for name, p in (*model.named_parameters(), *model.named_buffers())]


def _check_ranks(config: ModelConfig, problem: ModelError | None, outline: Outline) -> None:
    """Raises where a rank has a problem or another model: it would be missed in the collectives that follow."""
    found: list[tuple[ModelError | None, Outline]] = [(None, [])] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, (problem, outline))
    problems = [error for error, _ in found if error is not None]
    if problem is not None or problems:
        raise problem or problems[0]
    for rank, (_, theirs) in enumerate(found):
        if theirs != found[0][1]:
            name = _first_difference(found[0][1], theirs)
            raise ModelError(
                f"model.path={config.path}: rank {rank} finds another model there than rank 0; they differ in {name}.",
                limit="All ranks load one model.",
                remedy="Give all nodes the same folder.",
            )


def _first_difference(ours: Outline, theirs: Outline) -> str:
    """The name of a tensor that only one of them has, or has like this."""
    return sorted(name for name, *_ in set(ours) ^ set(theirs))[0]


def _without_dropout(settings: PretrainedConfig) -> None:
    for key, value in list(vars(settings).items()):
        if isinstance(value, float) and ("dropout" in key or key.endswith("pdrop")):
            setattr(settings, key, 0.0)
