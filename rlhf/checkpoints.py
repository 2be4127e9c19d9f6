"""Checkpoints: each a folder of safetensors and JSON, with a manifest of checksums that is written last."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from rlhf.disk import TMP, Tensors, check_room, damage, disk_errors, read_tensors, tidy, to_json, write_folder
from rlhf.errors import StoreError
from rlhf.records import RoleState

Checkpoint = tuple[int, dict[str, RoleState], dict[str, object]]
ROOM = 1 << 20  # bytes that a checkpoint takes beside its tensors, at most


class Checkpoints:
    """The checkpoints of a stage in one folder, `step-N` each."""

    def __init__(self, folder: Path, warn: Callable[[str], None]) -> None:
        self._folder, self._warn = folder, warn
        tidy(folder)

    @property
    def steps(self) -> list[int]:
        """The steps that have a checkpoint, oldest first."""
        names = [path.name for path in self._folder.iterdir()] if self._folder.is_dir() else []
        return sorted(int(match[1]) for name in names if (match := re.fullmatch(r"step-(\d+)", name)))

    def check_room(self, states: Mapping[str, RoleState]) -> None:
        """Raises StoreError where the disk has no room for these states."""
        num_bytes = sum(tensor.nbytes for state in states.values() for tensor in state.tensors.values())
        check_room(self._folder, num_bytes + ROOM)

    def save(self, step: int, states: Mapping[str, RoleState], values: Mapping[str, object]) -> None:
        """Writes the checkpoint of a step, whole or not at all. Raises StoreError; what was there before stays."""
        files: dict[str, bytes | Tensors] = {f"{role}.safetensors": state.tensors for role, state in states.items()}
        plain = {"values": dict(values), "roles": {role: dict(state.values) for role, state in states.items()}}
        write_folder(self._path(step), {**files, "values.json": to_json(plain)}, step=step)

    def load(self, *, mapped: bool = False) -> Checkpoint | None:
        """(step, states, values) of the newest whole checkpoint; None where there is none.

        Where `mapped`, tensors are read from the file as they are used, and take no memory of their own.

        A torn or altered one is moved aside (`step-N.damaged`) and the one before is used, which is said. Raises
        StoreError for one that a newer Tenfold wrote.
        """
        for step in reversed(self.steps):
            path = self._path(step)
            problem = damage(path)
            if problem is None:
                return self._read(step, mapped)
            aside = path.with_name(f"{path.name}.damaged")
            self._warn(f"The checkpoint {path} is damaged ({problem}): it is now {aside.name}; the one before is used.")
            with disk_errors(aside, "written"):
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
        return None

    def prune(self, keep: int, keep_every: int | None = None) -> None:
        """Deletes all but the newest `keep`, and those whose step is a multiple of `keep_every`."""
        assert keep > 0
        for step in self.steps[:-keep]:
            if keep_every and step % keep_every == 0:
                continue
            path = self._path(step)
            gone = path.with_name(f"{TMP}{path.name}")  # so that a half-deleted one never looks like a damaged one
            with disk_errors(path, "deleted"):
                path.rename(gone)
                shutil.rmtree(gone)

    def _read(self, step: int, mapped: bool) -> Checkpoint:
        path = self._path(step)
        try:
            plain = json.loads((path / "values.json").read_bytes())
        except (OSError, ValueError) as error:
            raise StoreError(f"{path} cannot be read: {error}.", remedy="Restore it from a copy.") from error
        states = {
            role: RoleState(read_tensors(path / f"{role}.safetensors", mapped=mapped), values)
            for role, values in plain["roles"].items()
        }
        return step, states, plain["values"]

    def _path(self, step: int) -> Path:
        return self._folder / f"step-{step}"
