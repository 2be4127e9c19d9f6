"""All that a trained role needs, as a folder: role.safetensors and role.json."""

from __future__ import annotations

import json
from pathlib import Path

from rlhf.disk import damage, read_tensors, to_json, write_folder
from rlhf.errors import StoreError
from rlhf.records import RoleState

TENSORS, VALUES = "role.safetensors", "role.json"


def write_role(folder: Path, state: RoleState) -> None:
    """Replaces the folder, whole or not at all. Raises StoreError."""
    write_folder(folder, {TENSORS: state.tensors, VALUES: to_json(dict(state.values))})


def read_role(folder: Path) -> RoleState | None:
    """The role in the folder, or None. Raises StoreError for one that was altered."""
    if not folder.exists():
        return None
    if problem := damage(folder):
        raise StoreError(
            f"{folder} is damaged: {problem}.",
            remedy="Restore it from a copy, or start again: the stage that made it goes on from its checkpoint.",
        )
    return RoleState(read_tensors(folder / TENSORS), json.loads((folder / VALUES).read_bytes()))
