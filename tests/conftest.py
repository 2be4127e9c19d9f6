"""Fixtures that every test may use."""

from __future__ import annotations

import os

# Before any import that reads them: no test may reach for a hub, and W&B keeps its runs on the disk.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"

from pathlib import Path

import pytest
import torch

from tests.tiny import make_tiny_model

torch.set_num_threads(1)  # a tiny model loses more by waiting for a second thread than it gains


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model; tests only read it."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips `gpu` tests where there is no GPU; puts those that start vLLM in this process at the end."""
    # vLLM leaves its process without a process group, and with an environment in which nothing is compiled.
    items.sort(key=lambda item: bool(item.get_closest_marker("vllm")) and not item.get_closest_marker("ray"))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no GPU"))
