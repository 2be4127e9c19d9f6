"""The frozen decoder that a worker's roles stand on: loaded once, with LoRA adapters attached and switched."""

from __future__ import annotations

import difflib
import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

# peft imports DeepSpeed, which otherwise warns on every start that it found no accelerator.
if not torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cpu"

from deepspeed.runtime.zero import GatheredParameters
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from actors.adapters import check_start
from actors.load import load, load_spread, zero3_known
from configs.schema import Dtype, LoraConfig, ModelConfig
from rlhf.errors import ModelError
from rlhf.records import Adapter
from rlhf.rows import MicroBatch

T = TypeVar("T")
Parameters = dict[str, nn.Parameter]


class Head(nn.Linear):
    """A scalar head, kept outside the decoder so that adapters travel without it."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[…, 1] float32, whatever the decoder's dtype is (and the head's own: ZeRO 3 makes it the decoder's)."""
        return super().forward(hidden.to(self.weight.dtype)).float()


class Base:
    """One frozen decoder and the adapters on it; several roles may stand on the same one.

    Always in evaluation mode with dropout off, so that two passes over the same tokens agree. Not thread-safe: one
    adapter is active at a time.

    Args:
        config: the decoder's folder and dtype.
        lora: of all adapters.
        seed: of adapters and heads that begin fresh.
        device: None: CUDA where there is one.
        spread: cut its weights over the ranks of the process group that exists, for a learner with ZeRO 3. It is then
            loaded, merged and used by all ranks together, and none holds it whole.

    Raises ModelError for a folder that is missing or does not load, and for LoRA targets that the model lacks.
    """

    def __init__(
        self,
        config: ModelConfig,
        lora: LoraConfig,
        *,
        seed: int,
        device: torch.device | str | None = None,
        spread: bool = False,
    ) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.seed = seed
        self._lora = lora
        self.spread = spread
        self.model: Any = load_spread(config) if spread else load(config).to(self.device)
        self.hidden_size: int = self.model.config.hidden_size
        self._targets = _targets(self.model, lora)
        self._peft: PeftModel | None = None
        self._dtype: torch.dtype = self.model.dtype
        self._autocast = False  # weights are float32 and passes are not
        self._active: str | None = None
        self._adapters: dict[str, Parameters] = {}
        self._frozen: set[str] = set()

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters, in the order in which they were attached."""
        return tuple(self._adapters)

    def attach(self, name: str, start: Adapter | None = None, *, frozen: bool = False) -> None:
        """Attaches an adapter that can be trained, unless `frozen`: a fresh one, or one that begins as `start`.

        A fresh one changes nothing yet: its B matrices are zero. Its A matrices depend on the seed and the name only,
        so that all ranks and repeats agree. Raises ModelError for a `start` of other settings or of another base.
        """
        assert name not in self._adapters, f"the adapter {name!r} is attached already"
        config = _peft_config(self._lora, self._targets)
        with _seeded(self.seed, name):
            if self._peft is None:
                peft = get_peft_model(self.model, config, adapter_name=name)
                assert isinstance(peft, PeftModel)
                self._peft = peft
            else:
                self._peft.add_adapter(name, config)
        self._adapters[name] = {
            key.replace(f".{name}.", "."): parameter
            for key, parameter in self._peft.named_parameters()
            if f".{name}." in key and "lora_" in key
        }
        for parameter in self._adapters[name].values():
            parameter.data = parameter.data.float()
        if start is not None:
            check_start(start, {key: tuple(p.shape) for key, p in self._adapters[name].items()}, self._lora)
            for key, parameter in self._adapters[name].items():
                parameter.data.copy_(start.tensors[key])
        if frozen:
            self._frozen.add(name)
        self._peft.eval()
        self._switch(self._active)

    def train_all(self) -> Parameters:
        """All parameters of the decoder by their names in its checkpoint, float32; they can be trained from now on.

        The decoder is then no frozen base any more: no adapter is on it, and no other role may stand on it.
        """
        assert self._peft is None, f"the base has adapters: {', '.join(self._adapters)}"
        assert not self.spread or self.model.dtype == torch.float32, (
            "a spread decoder stays in the dtype it was loaded in"
        )
        self._autocast = self._dtype != torch.float32
        self.model.float().requires_grad_(True)
        return dict(self.model.named_parameters())

    def pass_in(self, dtype: Dtype) -> None:
        """Lets passes over a whole model that is trained be in this dtype, whatever its weights are."""
        self._dtype = getattr(torch, dtype)

    def grow(self, num_embeddings: int) -> None:
        """Makes room for so many tokens; a new one starts as the mean of those that were there."""
        before = self.model.get_input_embeddings().num_embeddings
        if num_embeddings <= before:
            return
        assert self._peft is None and not self.model.get_input_embeddings().weight.requires_grad
        with zero3_known(self.spread):
            self.model.resize_token_embeddings(num_embeddings, mean_resizing=False)
        layers = {
            id(layer.weight): layer for layer in (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        }
        with torch.no_grad():
            for layer in layers.values():
                layer.weight[before:] = layer.weight[:before].float().mean(0).to(layer.weight.dtype)
        self.model.requires_grad_(False)

    def merged(self, name: str, *, keep: bool = True) -> dict[str, torch.Tensor]:
        """The decoder's weights with this adapter added to them, on the CPU, by their names in its checkpoint.

        Empty on a rank that does not `keep` them. One layer at a time, so that a spread decoder is never whole on a
        device.
        """
        layers = {
            f"{key}.base_layer.weight": module
            for key, module in self.model.named_modules()
            if isinstance(module, LoraLayer)
        }
        of_adapters = {id(parameter) for adapter in self._adapters.values() for parameter in adapter.values()}
        tensors: dict[str, torch.Tensor] = {}
        for key, weight in self.model.named_parameters():
            if id(weight) in of_adapters:
                continue
            layer: Any = layers.get(key)
            parts = [] if layer is None else [layer.lora_A[name].weight, layer.lora_B[name].weight]
            with torch.no_grad(), GatheredParameters([weight, *parts]):
                if keep:
                    value = weight if layer is None else weight + layer.get_delta_weight(name).to(weight.dtype)
                    tensors[key.replace(".base_layer.", ".")] = value.detach().to("cpu", copy=self.spread)
        return tensors

    def parameters(self, name: str) -> Parameters:
        """The adapter's parameters, float32, by PEFT's names as in adapter_model.safetensors."""
        return dict(self._adapters[name])

    def adapter_config(self, name: str) -> dict[str, Any]:
        """PEFT's adapter_config.json for this adapter: only what JSON can hold, in a fixed order."""
        assert self._peft is not None
        return {key: _jsonable(value) for key, value in sorted(self._peft.peft_config[name].to_dict().items())}

    @contextmanager
    def training(self, adapter: str | None, *, checkpointing: bool) -> Iterator[None]:
        """The adapter on (None: the whole model), for passes with a backward.

        Where `checkpointing`, activations are computed again there.
        """
        # transformers checkpoints in training mode only, which changes nothing else: there is no dropout.
        self.model.train(checkpointing)
        try:
            with self.use(adapter):
                yield
        finally:
            self.model.eval()

    @contextmanager
    def use(self, adapter: str | None) -> Iterator[Any]:
        """The decoder with this adapter active (None: adapters off, the base as it was loaded).

        Keep a backward pass inside, too: gradient checkpointing computes the forward pass again.
        """
        before = self._active
        self._switch(adapter)
        try:
            with torch.autocast(self.device.type, self._dtype, enabled=self._autocast):
                yield self.model
        finally:
            self._switch(before)

    def run(
        self, adapter: str | None, micro_batches: Sequence[MicroBatch], forward: Callable[[MicroBatch], T]
    ) -> list[T]:
        """What `forward` gives for each micro-batch (moved to the device), with this adapter and without gradients."""
        with torch.no_grad(), self.use(adapter):
            return [forward(micro_batch.to(self.device)) for micro_batch in micro_batches]

    def reward_head(self, name: str) -> Head:
        """A scalar head [H] -> [1], float32, no bias, normal with standard deviation 1/√(H+1).

        As in "Learning to summarize from human feedback" (Stiennon et al. 2020, arXiv:2009.01325, appendix B.1).
        """
        head = Head(self.hidden_size, 1, bias=False, dtype=torch.float32)
        with torch.no_grad(), _seeded(self.seed, f"{name}.head"):
            head.weight.normal_(0.0, 1.0 / math.sqrt(self.hidden_size + 1))
        return head.to(self.device)

    def value_head(self) -> Head:
        """A scalar head [H] -> [1], float32, all zero; its bias takes the reward model's when it starts from that."""
        head = Head(self.hidden_size, 1, dtype=torch.float32)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        return head.to(self.device)

    def enable_checkpointing(self) -> None:
        """Makes training passes compute activations again in backward instead of keeping them."""
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def _switch(self, adapter: str | None) -> None:
        if self._peft is None:
            assert adapter is None, f"no adapter {adapter!r} is attached"
            return
        tuner: Any = self._peft.base_model
        if adapter is None:
            tuner.disable_adapter_layers()
        else:
            tuner.enable_adapter_layers()
            self._peft.set_adapter(adapter)
        self._active = adapter
        # peft leaves only the active adapter trainable, and another role's gradients would be lost without a word.
        for name, parameters in self._adapters.items():
            for parameter in parameters.values():
                parameter.requires_grad_(name not in self._frozen)


def _targets(model: Any, lora: LoraConfig) -> list[str]:
    """Names of the layers that get LoRA: the last part of the module's name, the output layer never among "all"."""
    output = model.get_output_embeddings()
    linear = {
        name.rpartition(".")[2]: module is output
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    if lora.targets == "all-linear":
        return sorted(name for name, is_output in linear.items() if not is_output)
    for target in lora.targets:
        if target not in linear:
            near = difflib.get_close_matches(target, sorted(linear), n=2)
            raise ModelError(
                f"lora.targets: the model has no linear layer {target!r}.",
                limit=f"It has {', '.join(sorted(linear))}.",
                remedy=f"Did you mean {' or '.join(near)}?" if near else "Choose among these, or all-linear.",
            )
        if linear[target] and output.weight is model.get_input_embeddings().weight:
            raise ModelError(
                f"lora.targets: {target!r} is the output layer, whose weights are the embedding's in this model.",
                limit="An adapter on one of the two could not be merged into both.",
                remedy="Leave it out, or take all-linear, which never has it.",
            )
    return sorted(lora.targets)


def _peft_config(lora: LoraConfig, targets: list[str]) -> PeftLoraConfig:
    return PeftLoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType] - a fraction is allowed, peft says int
        target_modules=targets,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )


@contextmanager
def _seeded(seed: int, name: str) -> Iterator[None]:
    digest = hashlib.sha256(f"{seed}|{name}".encode()).digest()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        yield


def _jsonable(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    return value.value if hasattr(value, "value") else value
