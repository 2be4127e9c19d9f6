"""What Tenfold adds to a vLLM worker: adapters from memory, proof of what is held, plain matmuls for LoRA on CPUs.

vLLM loads this class by its dotted name (`worker_extension_cls`) and mixes it into its own worker class.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.utils import parse_fine_tuned_lora_name

from rlhf.checksum import checksum

NOTHING = ""


class LoraWorker:
    """The methods that the generator calls in every worker, by `collective_rpc`."""

    model_runner: Any  # of vLLM's own worker class

    def hold_adapter(self, lora_id: int, tensors: Mapping[str, torch.Tensor], config: Mapping[str, object]) -> None:
        """Puts an adapter into the slot of the forward pass, and drops all others.

        Does what vLLM does for an adapter on the disk. The tensors are copied: vLLM scales B in place.
        """
        outer = self.model_runner.lora_manager
        manager = outer._adapter_manager
        mapper = getattr(manager.model, "hf_to_vllm_mapper", None)
        mapper = mapper.get_rename_mapper() if mapper is not None else None
        helper = PEFTHelper.from_dict(
            {**config, "vllm_max_position_embeddings": outer.max_position_embeddings}  # as from_local_dir adds it
        )
        helper.validate_legal(outer.lora_config)
        lora = LoRAModel.from_lora_tensors(
            lora_model_id=lora_id,
            tensors={name: tensor.clone() for name, tensor in tensors.items()},
            peft_helper=helper,
            device="cpu",
            dtype=outer.lora_config.lora_dtype,
            model_vocab_size=outer.vocab_size,
            weights_mapper=mapper,
        )
        self.peft_names = {parse_fine_tuned_lora_name(name, mapper)[0]: _layer(name) for name in tensors}
        for old in outer.list_adapters():
            outer.remove_adapter(old)
        manager.add_adapter(lora)
        manager.activate_adapter(lora_id)

    def held_checksum(self, lora_id: int) -> str:
        """The checksum of the adapter that the forward pass uses; "" where it does not use this one.

        It is made from what vLLM holds and from nothing that the caller says: first, the slot of every layer must equal
        the registered adapter (this worker's shard of it), bit for bit, and be zero where the adapter has nothing;
        then the registered tensors are named as PEFT names them and summed.
        """
        manager = self.model_runner.lora_manager._adapter_manager
        lora = manager._registered_adapters.get(lora_id)
        if lora is None or lora_id not in manager.lora_index_to_id:
            return NOTHING
        slot = manager.lora_index_to_id.index(lora_id)
        tensors: dict[str, torch.Tensor] = {}
        for name, module in manager.modules.items():
            weights = manager._get_lora_layer_weights(lora, name)
            if not _slot_holds(module, slot, weights):
                return NOTHING
            if weights is None:
                continue
            parts = manager.packed_modules.get(name, [name])
            for part, a, b in zip(parts, _parts(weights.lora_a), _parts(weights.lora_b), strict=True):
                if a is not None and b is not None:
                    tensors[f"{self.peft_names[part]}.lora_A.weight"] = a
                    tensors[f"{self.peft_names[part]}.lora_B.weight"] = b
        return checksum(tensors)

    def drop_adapters(self) -> int:
        """How many adapters are still held, after all were dropped: 0."""
        manager = self.model_runner.lora_manager
        for lora_id in manager.list_adapters():
            manager.remove_adapter(lora_id)
        return len(manager.list_adapters())

    def use_plain_matmuls(self) -> None:
        """Makes LoRA on a CPU two matmuls per layer, for an engine with one adapter slot.

        vLLM's CPU code copies the adapter's matrices once per token. It also takes the last slot for tokens without an
        adapter when they share a batch with others, since it uses -1 as an index; here such tokens are masked.
        """
        for wrapper in self.model_runner.lora_manager._adapter_manager.punica_wrapper_mapping.values():
            wrapper.add_lora_linear = types.MethodType(_add_lora_linear, wrapper)


def _add_lora_linear(
    wrapper: Any,
    y: torch.Tensor,
    x: torch.Tensor,
    lora_a_stacked: Sequence[torch.Tensor],
    lora_b_stacked: Sequence[torch.Tensor],
    scale: float,
    output_slices: Sequence[int],
    **_: Any,
) -> None:
    """Adds scale · x Aᵀ Bᵀ to each slice of y, in place. x [T, in], y [T, out], A [1, 1, r, in], B [1, 1, slice, r]."""
    if wrapper.no_lora:
        return
    x, y = x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1])
    mixed = wrapper.batch_size > 1  # runs of tokens with and without an adapter
    adapted = (wrapper.token_lora_indices >= 0).unsqueeze(1) if mixed else None
    start = 0
    for a, b, size in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
        # The narrow middle is float32, as in vLLM: it costs little, and half precision loses most there.
        narrow = x.to(torch.float32) @ a[0, 0].to(torch.float32).T
        if adapted is not None:
            narrow = narrow * adapted
        y[:, start : start + size].addmm_(narrow.to(y.dtype), b[0, 0].to(y.dtype).T, alpha=scale)
        start += size


def _slot_holds(module: Any, slot: int, weights: Any) -> bool:
    """Whether a layer's slot holds these weights (None: nothing) and no more."""
    held = list(zip(module.lora_a_stacked, module.lora_b_stacked, strict=True))
    if weights is None:
        return not any(bool(b[slot].any()) for _, b in held)
    lora_a, lora_b = weights.lora_a, weights.lora_b
    if module.tp_size > 1:
        lora_a, lora_b = module.slice_lora_a(lora_a), module.slice_lora_b(lora_b)
    return all(
        _equal(held_a[slot, 0], a) and _equal(held_b[slot, 0], b)
        for (held_a, held_b), a, b in zip(held, _parts(lora_a), _parts(lora_b), strict=True)
    )


def _equal(held: torch.Tensor, tensor: torch.Tensor | None) -> bool:
    """Whether the slot has the tensor in its upper left corner; a slot is wider than an adapter of lower rank."""
    if tensor is None:
        return not bool(held.any())
    return torch.equal(held[: tensor.shape[0], : tensor.shape[1]].cpu(), tensor.cpu())


def _parts(weights: Any) -> Iterator[torch.Tensor | None]:
    """The weights of a layer, one by one: a fused layer (q, k, v) has a list of them."""
    return iter(weights if isinstance(weights, list) else [weights])


def _layer(name: str) -> str:
    return name.rpartition(".lora_")[0]
