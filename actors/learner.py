"""The one trainer: a DeepSpeed engine over one adapter (and head) on a base, the same for every role and stage."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import nn

from actors.base import Base
from actors.engine import SPREAD_WEIGHTS, attach, make_engine
from actors.spread import one_token, padded, run_spread
from configs.schema import LearnerConfig, OptimizerConfig
from rlhf.errors import ModelError, StoreError
from rlhf.forward import token_logprobs, token_values, use_head_in_one_call
from rlhf.records import RoleState
from rlhf.rows import MicroBatch

T = TypeVar("T")
Loss = Callable[[MicroBatch], tuple[torch.Tensor, dict[str, float]]]

MOMENTS = ("exp_avg", "exp_avg_sq")


class Learner:
    """An optimizer over one adapter and its head, or over a whole model, on a process group that exists already.

    Collective: every rank of the group makes the same calls in the same order. A base that several roles share takes
    ZeRO 0 to 2; ZeRO 3 wants a base that is spread, and needs it alone.

    Args:
        base: the decoder, with `adapter` attached.
        adapter: its name; None: the whole decoder is trained, in float32 with passes in the dtype of `base`.
        head: scalar head that is trained along, or None.
        optimizer: rates and clipping.
        learner: ZeRO stage and gradient checkpointing.
        rank: of this worker, 0 .. world_size - 1.
        world_size: workers of the group.
        num_updates: of the whole training, which a cosine schedule needs to know.
    """

    def __init__(
        self,
        base: Base,
        adapter: str | None,
        head: nn.Module | None,
        optimizer: OptimizerConfig,
        learner: LearnerConfig,
        rank: int,
        world_size: int,
        num_updates: int | None = None,
    ) -> None:
        assert optimizer.schedule == "constant" or num_updates is not None, "a cosine ends somewhere"
        assert base.spread == (learner.zero_stage == SPREAD_WEIGHTS), "ZeRO 3 is for a base that is spread, and only it"
        attach(rank, world_size)
        self.updates = 0
        self._has_moments = False  # DeepSpeed knows them from its first step on
        self._base, self._adapter, self._optimizer = base, adapter, optimizer
        self._head, self._world_size = head, world_size
        self._name = adapter or "model"
        self._smallest = one_token()
        self._spread = base.spread
        if learner.gradient_checkpointing:
            base.enable_checkpointing()
        self._checkpointing = learner.gradient_checkpointing
        self._num_updates = num_updates
        self._parameters: dict[str, nn.Parameter] = base.train_all() if adapter is None else base.parameters(adapter)
        if head is not None:
            self._parameters |= {f"head.{name}": parameter for name, parameter in head.named_parameters()}
        spread: list[nn.Module] = []
        if self._spread:
            spread = [base.model, use_head_in_one_call(base.model) if head is None else head]
        self._engine: Any = make_engine(list(self._parameters.values()), spread, optimizer, learner.zero_stage)

    @property
    def lr(self) -> float:
        """The rate of the next update: it rises linearly over the warm-up, then stays or falls along a cosine.

        The last update is made at `min_lr_share` of the rate (Loshchilov and Hutter 2017, arXiv:1608.03983, eq. 5).
        """
        config = self._optimizer
        risen = min(1.0, (self.updates + 1) / (config.warmup_steps + 1))
        if config.schedule == "constant" or self._num_updates is None:
            return config.lr * risen
        falling = max(self._num_updates - config.warmup_steps - 1, 1)
        way = min(max(self.updates - config.warmup_steps, 0) / falling, 1.0)
        share = config.min_lr_share + (1 - config.min_lr_share) * (1 + math.cos(math.pi * way)) / 2
        return config.lr * risen * share

    def step(self, micro_batches: Sequence[MicroBatch | None], loss: Loss, global_count: float) -> dict[str, float]:
        """Metrics of one update: sums over all ranks of what `loss` reported; `grad_norm`, before clipping; `lr`.

        The update is that of (sum of the losses of all micro-batches on all ranks) / global_count, however they are
        split. A reported name that ends in `_max` is a maximum, not a sum.

        Args:
            micro_batches: this rank's; None pads a rank that has fewer than the others (see `pad`).
            loss: the sum over a micro-batch's tokens, and what to report of it.
            global_count: tokens (or groups) over all ranks.

        Raises ModelError on every rank, without an update, where the gradient is not finite.
        """
        assert micro_batches and global_count > 0, "an update needs a micro-batch and something to divide by"
        scale = self._world_size / global_count  # DeepSpeed averages over ranks
        reported: dict[str, float] = {}
        with self._base.training(self._adapter, checkpointing=self._checkpointing):
            for number, micro_batch in enumerate(micro_batches, start=1):
                self._engine.set_gradient_accumulation_boundary(number == len(micro_batches))
                self._engine.backward(self._scaled(micro_batch, loss, scale, reported), scale_wrt_gas=False)
            norm = self._apply(self.lr)
        metrics = self.combine(reported) | {"grad_norm": norm, "lr": self.lr}
        self.updates += 1
        return metrics

    def run(self, micro_batches: Sequence[MicroBatch], forward: Callable[[MicroBatch], T]) -> list[T]:
        """What `forward` gives for each of this rank's micro-batches, with the adapter on and without gradients."""
        if not self._spread:
            return self._base.run(self._adapter, micro_batches, forward)
        return run_spread(self._base, self._adapter, self._engine.module, micro_batches, forward)

    def pad(self, micro_batches: Sequence[MicroBatch]) -> list[MicroBatch | None]:
        """The micro-batches, padded with None so that every rank has as many as the fullest one."""
        return padded(micro_batches, self._base.device)

    def combine(self, reported: Mapping[str, float]) -> dict[str, float]:
        """Sums over all ranks (maxima of names that end in `_max`), the same on every rank; ranks may lack names."""
        if self._world_size == 1:
            return dict(reported)
        gathered: list[Mapping[str, float]] = [{}] * self._world_size
        torch.distributed.all_gather_object(gathered, dict(reported))
        total: dict[str, float] = {}
        for one in gathered:
            _add(total, one)
        return total

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, of the same shape on every rank; on the CPU."""
        total = tensor.to(self._base.device, copy=True)
        torch.distributed.all_reduce(total)
        return total.cpu()

    def tensors(self, *, keep: bool = True) -> dict[str, torch.Tensor]:
        """The trained parameters by name, float32 copies on the CPU; the head's names begin with `head.`.

        Empty on a rank that does not `keep` them, which takes part all the same: it may hold a share.
        """
        return self._copies(self._read, "", keep)

    def state(self, *, keep: bool = True) -> RoleState:
        """Everything that the next update depends on: parameters, both moments of AdamW, and the number of updates.

        Without tensors on a rank that does not `keep` them.
        """
        tensors = self._copies(self._read, "model.", keep)
        if self.updates:
            for moment in MOMENTS:
                tensors |= self._copies(partial(self._moment, moment=moment), f"{moment}.", keep)
        return RoleState(tensors, {"updates": self.updates})

    def load_state(self, state: RoleState) -> None:
        """Takes up a state exactly, that of another number of workers or another ZeRO stage too.

        Raises StoreError for a state of another model, LoRA rank or choice of layers.
        """
        wanted = {f"model.{name}": tuple(_shape(parameter)) for name, parameter in self._parameters.items()}
        found = {name: tuple(t.shape) for name, t in state.tensors.items() if name.startswith("model.")}
        wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        if wrong:
            name = wrong[0]
            raise StoreError(
                f"The saved {self._name} does not fit: {name} is {found.get(name)}, here it is {wanted.get(name)} "
                f"({len(wrong)} such tensors).",
                remedy="Resume with the same model and lora settings, or start a run under another name.",
            )
        self.copy_in({name.removeprefix("model."): state.tensors[name] for name in wanted})
        updates = state.values["updates"]
        assert isinstance(updates, int)
        self._load_moments(state.tensors if updates else {}, updates)
        self.updates = updates

    def copy_in(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Overwrites parameters by name; moments and the number of updates stay as they are."""
        for name, tensor in tensors.items():
            parameter, value = self._parameters[name], tensor.to(self._base.device, torch.float32)
            # The passes read one copy, the optimizer steps another: ZeRO brings them together in the next update only.
            with GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(value)
            safe_set_full_fp32_param(parameter, value)

    def _load_moments(self, tensors: Mapping[str, torch.Tensor], updates: int) -> None:
        adamw: torch.optim.Optimizer = self._engine.basic_optimizer
        if not self._has_moments:
            if not updates:
                return
            # The moments come to be, under every ZeRO stage, in an update at rate 0 that moves nothing.
            self._engine.set_gradient_accumulation_boundary(True)
            with self._base.use(self._adapter):
                self._engine.backward(self._nothing(), scale_wrt_gas=False)
                self._apply(0.0)
        for moment in MOMENTS:
            for name, parameter in self._parameters.items():
                saved = tensors.get(f"{moment}.{name}")
                value = torch.zeros(_shape(parameter)) if saved is None else saved
                self._set_moment(parameter, moment, value.to(self._base.device))
        for entry in adamw.state.values():
            entry["step"].fill_(updates)

    def _apply(self, lr: float) -> float:
        """The norm of the whole gradient, once it is applied at this rate."""
        for group in self._engine.basic_optimizer.param_groups:
            group["lr"] = lr
        if self._engine.zero_optimization():
            self._engine.step()  # it leaves out an update that is not finite
            norm = float(self._engine.get_global_grad_norm())
        else:
            gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
            norm = float(nn.utils.get_total_norm(gradients))
            self._engine.step() if math.isfinite(norm) else self._engine.zero_grad()
        self._has_moments = True
        if not math.isfinite(norm):
            raise ModelError(
                f"The gradient of {self._name} at update {self.updates + 1} has the norm {norm}.",
                limit="It must be finite; the update was not applied.",
                remedy=f"Lower the learning rate ({self._optimizer.lr}) or look at scores and logprobs of this step.",
            )
        return norm

    def _scaled(
        self, micro_batch: MicroBatch | None, loss: Loss, scale: float, reported: dict[str, float]
    ) -> torch.Tensor:
        if micro_batch is None:
            return self._nothing()
        inside = micro_batch.to(self._base.device)

        def body() -> torch.Tensor:
            value, sums = loss(inside)
            _add(reported, sums)
            return value * scale

        return self._engine(body)

    def _nothing(self) -> torch.Tensor:
        """A loss of 0 that reaches every parameter, so that hooks and ranks which wait for its gradient go on."""
        micro_batch, model, head = self._smallest.to(self._base.device), self._base.model, self._head
        if head is None:
            return self._engine(lambda: token_logprobs(model, micro_batch, 1.0)[0].sum() * 0.0)
        return self._engine(lambda: token_values(model, head, micro_batch).sum() * 0.0)

    def _copies(self, read: Callable[[nn.Parameter], torch.Tensor], prefix: str, keep: bool) -> dict[str, torch.Tensor]:
        """What `read` gives of each parameter, float32 on the CPU; one at a time, for it may be spread."""
        copies: dict[str, torch.Tensor] = {}
        for name, parameter in self._parameters.items():
            value = read(parameter)
            if keep:
                copies[f"{prefix}{name}"] = value.detach().to("cpu", torch.float32, copy=True)
        return copies

    def _read(self, parameter: nn.Parameter) -> torch.Tensor:
        value = safe_get_full_fp32_param(parameter) if self._spread else parameter
        assert value is not None
        return value

    def _moment(self, parameter: nn.Parameter, moment: str) -> torch.Tensor:
        if not self._engine.zero_optimization():
            return self._engine.basic_optimizer.state[parameter][moment]
        value = safe_get_full_optimizer_state(parameter, moment)
        assert value is not None
        return value

    def _set_moment(self, parameter: nn.Parameter, moment: str, value: torch.Tensor) -> None:
        if self._engine.zero_optimization():
            safe_set_full_optimizer_state(parameter, value, moment)
        else:
            self._engine.basic_optimizer.state[parameter][moment].copy_(value)


def _shape(parameter: nn.Parameter) -> torch.Size:
    """The whole shape, also where ZeRO 3 left only a part of the tensor here."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _add(total: dict[str, float], part: Mapping[str, float]) -> None:
    for name, value in part.items():
        if name.endswith("_max"):
            total[name] = max(total.get(name, -math.inf), value)
        else:
            total[name] = total.get(name, 0.0) + value
