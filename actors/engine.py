"""A DeepSpeed engine over a few parameters, on a process group that exists already."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import deepspeed
import torch
import torch.distributed
from deepspeed.utils import logger
from torch import nn

from configs.schema import OptimizerConfig

T = TypeVar("T")

LARGEST_BUCKET = 1 << 26  # numbers that are reduced over the ranks at once
SPREAD_WEIGHTS = 3  # the ZeRO stage that spreads the base itself over the ranks


class _Trained(nn.Module):
    """What DeepSpeed sees: the trained parameters alone, or the modules that it spreads over the ranks.

    Its forward pass is whatever is handed in, so that DeepSpeed's hooks fire around it. The base is left out where it
    can be, else one role's engine would clip by, reset and broadcast what belongs to the base and to other roles.
    """

    def __init__(self, trained: Sequence[nn.Parameter], spread: Sequence[nn.Module | None]) -> None:
        super().__init__()
        if spread:
            self.spread = nn.ModuleList(module for module in spread if module is not None)
        else:
            self.trained = nn.ParameterList(trained)

    def forward(self, body: Callable[[], T]) -> T:
        return body()


def attach(rank: int, world_size: int) -> None:
    """Makes DeepSpeed use the process group that exists, quietly."""
    assert torch.distributed.is_initialized(), "the worker makes the process group before it makes a learner"
    group = (torch.distributed.get_rank(), torch.distributed.get_world_size())
    assert group == (rank, world_size), f"the process group is {group}, the learner was told {(rank, world_size)}"
    logger.setLevel(logging.ERROR)
    # DeepSpeed calls collectives by names that torch is about to change, and every call would say so.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+_tensor` is deprecated", category=FutureWarning)
    if not torch.cuda.is_available():
        # Else DeepSpeed compiles, for half a minute, collectives that only its inference uses.
        deepspeed.ops.__compatible_ops__ = {}  # pyright: ignore[reportAttributeAccessIssue]
    os.environ.setdefault("LOCAL_RANK", "0")  # Ray shows each worker its own GPU only
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), auto_mpi_discovery=False)


def make_engine(
    trained: Sequence[nn.Parameter], spread: Sequence[nn.Module | None], optimizer: OptimizerConfig, zero_stage: int
) -> Any:
    """The engine with torch's AdamW over `trained`, called as `engine(body)` around each forward pass.

    Args:
        trained: parameters, float32.
        spread: modules whose parameters ZeRO 3 spreads, or which are spread already; empty for the stages below. They
            keep their dtypes: float32 adapters lie among the layers of a bfloat16 base.
        optimizer: rate, betas, clipping.
        zero_stage: 0 to 3.
    """
    adamw = torch.optim.AdamW(
        _groups(trained, optimizer.weight_decay), lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.eps
    )
    # DeepSpeed wants an even number.
    bucket_size = min(2 * sum(_numel(parameter) for parameter in trained), LARGEST_BUCKET)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,  # the learner marks the last micro-batch itself
        "gradient_clipping": optimizer.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # The defaults of the buckets are for whole models: 2 GB for each role.
        "zero_optimization": {
            "stage": zero_stage,
            "reduce_bucket_size": bucket_size,
            "allgather_bucket_size": bucket_size,
        },
    }
    engine, *_ = deepspeed.initialize(
        model=_Trained(trained, spread),
        optimizer=adamw,
        dist_init_required=False,
        config=config,
    )
    if 0 < zero_stage < SPREAD_WEIGHTS:
        _begin_moments(engine.basic_optimizer)
    return engine


def make_reader(spread: Sequence[nn.Module]) -> Any:
    """An engine that trains nothing, over modules whose parameters are spread; `reader.module(body)` is around a pass.

    DeepSpeed's hooks gather the parameters for the layer at work, and let go of them after it. They are there for as
    long as the engine is.
    """
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": SPREAD_WEIGHTS}}
    engine, *_ = deepspeed.initialize(model=_Trained([], spread), dist_init_required=False, config=config)
    return engine


def _begin_moments(adamw: Any) -> None:
    """Makes AdamW's moments, zero as it would at its first step, for all groups of parameters.

    DeepSpeed looks for those of all groups as soon as the first group has made its first step.
    """
    for group in adamw.param_groups:
        for part in group["params"]:
            zeros = {name: torch.zeros_like(part) for name in ("exp_avg", "exp_avg_sq")}
            adamw.state[part] = {"step": torch.zeros((), dtype=torch.float32), **zeros}


def _groups(trained: Sequence[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Matrices, and apart from them norms and biases, which do not decay: they scale and shift, and do not overfit."""
    matrices = [parameter for parameter in trained if _dimensions(parameter) > 1]
    others = [parameter for parameter in trained if _dimensions(parameter) <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _numel(parameter: nn.Parameter) -> int:
    """Of the whole parameter."""
    return getattr(parameter, "ds_numel", parameter.numel())


def _dimensions(parameter: nn.Parameter) -> int:
    """Of the whole parameter, also where ZeRO 3 left only a part of it here."""
    return len(getattr(parameter, "ds_shape", parameter.shape))
