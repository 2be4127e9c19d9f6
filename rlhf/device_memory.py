"""Memory that torch keeps for itself on an accelerator, and that another process there could use."""

from __future__ import annotations

import gc

import torch


def give_back(device: str) -> bool:
    """Whether torch's unused memory on this kind of device ("cuda") was given back; it keeps none on a CPU.

    Torch keeps what was freed for its own next tensors. To any other process on the device that memory is taken.
    """
    if device == "cpu":
        return False
    gc.collect()
    torch.get_device_module(device).empty_cache()
    return True
