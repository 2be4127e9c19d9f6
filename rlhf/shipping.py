"""Tensors on their way to other processes: as buffers that pickle hands over as they lie, where it can (PEP 574)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Packed = dict[str, tuple[Any, str, tuple[int, ...]]]  # name -> bytes (a numpy array), dtype, shape


def packed(tensors: Mapping[str, torch.Tensor]) -> Packed:
    """Plain data for the tensors, which lie on the CPU; nothing is copied but what is not contiguous."""
    import torch

    return {
        name: (
            tensor.detach().contiguous().view(-1).view(torch.uint8).numpy(),
            str(tensor.dtype).removeprefix("torch."),
            tuple(tensor.shape),
        )
        for name, tensor in tensors.items()
    }


def unpacked(data: Packed) -> dict[str, torch.Tensor]:
    """The tensors, in the memory that the data lies in. They are to be read only."""
    import torch

    with warnings.catch_warnings():  # the memory may be shared; torch has no tensors that refuse to be written to
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable", category=UserWarning)
        return {
            name: torch.from_numpy(array).view(getattr(torch, dtype)).view(shape)
            for name, (array, dtype, shape) in data.items()
        }
