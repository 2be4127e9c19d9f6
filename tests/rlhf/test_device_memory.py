"""Memory that torch keeps on an accelerator."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from rlhf.device_memory import give_back


class Cycle:
    """Lives until the garbage collector finds it."""

    def __init__(self) -> None:
        self.itself = self


def test_unused_memory_is_given_back_once_what_nobody_uses_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    gc.disable()
    try:
        gone = weakref.ref(Cycle())
        found: list[object] = []
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: found.append(gone()))
        assert give_back("cuda")
    finally:
        gc.enable()
    assert found == [None]


def test_on_a_cpu_there_is_nothing_to_give_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: pytest.fail("no device was named"))
    assert not give_back("cpu")
