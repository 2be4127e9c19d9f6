"""manifest.json of a run, and the lock that keeps the run to one process."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import TypedDict

from configs.errors import ConfigError
from configs.load import difference, dump_recipe, load_recipe
from configs.schema import Recipe
from rlhf.disk import FORMAT, MANIFEST, check_format, disk_errors, to_json, write_file
from rlhf.errors import StoreError

RECIPE = "recipe.yaml"
# Where a run is and how it is watched: these keys may differ when it is opened again, since no result hangs on them.
MAY_DIFFER = ("runs:", "cluster.address:", "cluster.wait_s:", "cluster.call_s:", "tracker.")


class Manifest(TypedDict):
    """What manifest.json holds."""

    format: int
    tenfold: str  # the version that began the run
    created: str  # ISO 8601, UTC
    stages: dict[str, dict[str, object]]  # of the stages done: when, and their results
    checkpoint: int | None  # the step of the newest
    wandb_run_id: str | None


def open_manifest(folder: Path, recipe: Recipe) -> Manifest:
    """The manifest of the run in `folder`, which is begun if there is none. Call it with the lock held.

    Raises StoreError: it cannot be read, a newer Tenfold wrote it, or the run has another recipe.
    """
    path = folder / MANIFEST
    if not path.exists():
        return _begin(folder, recipe)
    try:
        manifest: Manifest = json.loads(path.read_bytes())
        version = int(manifest["format"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{path} cannot be read: {error}.", remedy="Restore it from a copy, or start a run with another name."
        ) from error
    check_format(path, version)
    _check_recipe(folder, recipe)
    return manifest


def record(folder: Path, manifest: Manifest) -> None:
    """Replaces manifest.json."""
    write_file(folder / MANIFEST, to_json(manifest))


def now() -> str:
    """The time, ISO 8601, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def take_lock(folder: Path) -> int:
    """A file descriptor that holds the run's lock until it is closed, or the process is gone, however it dies."""
    path = folder / "lock"
    with disk_errors(path, "written"):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.truncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
    except BlockingIOError:
        holder = os.pread(handle, 32, 0).decode().strip() or "unknown"
        os.close(handle)
        raise StoreError(
            f"The run {folder} is in use by another process (pid {holder}).",
            limit="A run belongs to one process at a time.",
            remedy="Wait for it, end it, or give this run another name.",
        ) from None
    except OSError as error:
        os.close(handle)
        raise StoreError(
            f"The run {folder} cannot be locked: {error}.", remedy="Set `runs` to a folder on a local disk."
        ) from error
    return handle


def _begin(folder: Path, recipe: Recipe) -> Manifest:
    if strays := [name for name in ("checkpoints", "samples", "metrics.jsonl") if (folder / name).exists()]:
        raise StoreError(
            f"{folder} has {', '.join(strays)} but no {MANIFEST}.",
            remedy=f"Restore {MANIFEST} from a copy, or start a run with another name.",
        )
    manifest = Manifest(format=FORMAT, tenfold=_version(), created=now(), stages={}, checkpoint=None, wandb_run_id=None)
    write_file(folder / RECIPE, dump_recipe(recipe).encode())
    record(folder, manifest)  # last: a run with a manifest has its recipe
    return manifest


def _check_recipe(folder: Path, recipe: Recipe) -> None:
    try:
        before = load_recipe(folder / RECIPE)
    except ConfigError as error:
        raise StoreError(
            f"The recipe that the run {folder} was begun with cannot be read: {error}",
            remedy="Restore it from a copy, or start a run with another name.",
        ) from error
    differences = [line for line in difference(before, recipe) if not line.startswith(MAY_DIFFER)]
    if differences:
        raise StoreError(
            "\n".join([f"The run {folder} was begun with another recipe:", *(f"  {line}" for line in differences)])
            + "\n",
            remedy="Start a run with another name (name=...), or take the recipe that the run was begun with.",
        )


def _version() -> str:
    try:
        return importlib.metadata.version("tenfold")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
