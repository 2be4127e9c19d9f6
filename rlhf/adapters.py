"""Adapters on the disk, in PEFT's layout: `peft`, `transformers` and `vllm` load them without this project."""

from __future__ import annotations

import json
from pathlib import Path

from rlhf.checksum import checksum
from rlhf.disk import damage, read_tensors, to_json, write_folder
from rlhf.errors import StoreError
from rlhf.records import Adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def write_adapter(folder: Path, adapter: Adapter) -> None:
    """Replaces a folder with an adapter: adapter_config.json, adapter_model.safetensors, and our manifest.json."""
    files = {CONFIG: to_json(dict(adapter.config)), WEIGHTS: adapter.tensors}
    write_folder(folder, files, version=adapter.version, checksum=adapter.checksum)


def read_adapter(folder: Path) -> Adapter:
    """The adapter that `write_adapter` put there. Raises StoreError for one that was altered."""
    if problem := damage(folder):
        raise StoreError(f"The adapter {folder} is damaged: {problem}.", remedy="Run the stage again, or restore it.")
    about = json.loads((folder / "manifest.json").read_bytes())
    tensors = read_tensors(folder / WEIGHTS)
    if checksum(tensors) != about["checksum"]:
        raise StoreError(
            f"The tensors of the adapter {folder} are not those of its checksum {about['checksum'][:12]}.",
            remedy="Run the stage that wrote it again.",
        )
    return Adapter(about["version"], tensors, json.loads((folder / CONFIG).read_bytes()), about["checksum"])
