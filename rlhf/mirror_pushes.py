"""mirror.json of a run folder: the pushes made from it, by which it knows a mirror that others went on with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rlhf.disk import disk_errors, to_json, write_file

PUSHES = "mirror.json"
KEPT = 1000


def read_pushes(folder: Path) -> list[str]:
    """Names of the pushes that this folder made or was fetched at, oldest first."""
    if not (folder / PUSHES).exists():
        return []
    try:
        with disk_errors(folder / PUSHES, "read"):
            return [str(name) for name in json.loads((folder / PUSHES).read_bytes())["pushes"]]
    except (ValueError, KeyError, TypeError):
        return []  # damaged: the mirror is taken for another folder's, which loses nothing


def write_pushes(folder: Path, pushes: Sequence[str]) -> None:
    """Commits them."""
    write_file(folder / PUSHES, to_json({"pushes": list(pushes)[-KEPT:]}))
