"""Files and folders that are there whole or not at all: temporary name, fsync, rename, fsync of the folder."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import numbers
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from rlhf.errors import StoreError

if TYPE_CHECKING:
    import torch  # which takes seconds: commands that only look at a run do without

Tensors = Mapping[str, "torch.Tensor"]
TMP, OLD = ".tmp-", ".old-"
MANIFEST, FORMAT = "manifest.json", 1


@contextmanager
def disk_errors(path: Path, doing: str) -> Iterator[None]:
    """A block in which an error of the disk becomes a StoreError with path and remedy."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        code = error.errno if isinstance(error, OSError) else None
        text = str(error).lower()
        if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or "no space" in text or "too large" in text:
            remedy = (
                "Free some disk space, or set `runs` to a folder on another disk, and start again: "
                "what was committed is kept."
            )
        elif code in (errno.EACCES, errno.EPERM, errno.EROFS) or "permission" in text or "read-only" in text:
            remedy = "Set `runs` to a folder that you may write to."
        else:
            remedy = "Set `runs` to another folder, or mend this one."
        raise StoreError(f"{path} cannot be {doing}: {error}.", remedy=remedy) from error


def write_file(path: Path, data: bytes) -> None:
    """Replaces one file: afterwards it holds the old bytes or the new ones, whatever happens in between."""
    temporary = path.with_name(f"{TMP}{path.name}")
    with disk_errors(path, "written"):
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)


def write_folder(path: Path, files: Mapping[str, bytes | Tensors], **about: object) -> None:
    """Replaces one folder with these files: bytes as they are, tensors as safetensors; manifest.json comes last."""
    with replacing(path, **about) as folder:
        for name, content in files.items():
            if isinstance(content, bytes):
                (folder / name).write_bytes(content)
            else:
                from safetensors.torch import save_file

                save_file(_separate(content), folder / name, metadata={"format": "pt"})


@contextmanager
def replacing(path: Path, **about: object) -> Iterator[Path]:
    """A folder beside `path`, to be filled; it takes the place of `path` when the block ends well, else it vanishes.

    It gets a manifest.json with the checksum of each file and what is said `about` it. When the process dies in
    between, `tidy` of the parent brings back the old folder or keeps the new one.
    """
    temporary, old = path.with_name(f"{TMP}{path.name}"), path.with_name(f"{OLD}{path.name}")
    with disk_errors(path, "written"):
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            sums: dict[str, object] = {}
            for file in sorted(temporary.iterdir()):
                file.chmod(0o644)  # some libraries make their files private
                _sync_file(file)
                sums[file.name] = {"sha256": file_hash(file), "bytes": file.stat().st_size}
            (temporary / MANIFEST).write_bytes(to_json({"format": FORMAT, **about, "files": sums}))
            _sync_file(temporary / MANIFEST)
            sync_folder(temporary)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        if path.exists():
            path.rename(old)
        temporary.rename(path)
        sync_folder(path.parent)
        shutil.rmtree(old, ignore_errors=True)


def damage(path: Path) -> str | None:
    """What is wrong with a folder that `write_folder` wrote; None if every byte is as it was.

    Raises StoreError for a folder that a newer Tenfold wrote.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        files, version = dict(manifest["files"]), int(manifest["format"])
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except OSError as error:
        return f"{MANIFEST} cannot be read: {error}"
    except (ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} is not readable: {error}"
    check_format(path / MANIFEST, version, FORMAT)
    with disk_errors(path, "read"):
        for name, wanted in files.items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != wanted["bytes"]:
                return f"{name} has {file.stat().st_size} bytes instead of {wanted['bytes']}"
            if file_hash(file) != wanted["sha256"]:
                return f"{name} was altered: its checksum differs"
    return None


def check_format(path: Path, version: int, newest: int) -> None:
    """Raises StoreError for a format that only a newer Tenfold can read."""
    if version > newest:
        raise StoreError(
            f"{path} has format {version}.",
            limit=f"This Tenfold reads formats up to {newest}.",
            remedy="Update Tenfold.",
        )


def tidy(parent: Path) -> None:
    """Ends what a dead process left half done: half-written things go, a folder moved aside comes back."""
    if not parent.is_dir():
        return
    with disk_errors(parent, "tidied"):
        for path in sorted(parent.iterdir()):
            if path.name.startswith(OLD) and not (home := path.with_name(path.name.removeprefix(OLD))).exists():
                path.rename(home)
            elif path.name.startswith((TMP, OLD)):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def check_room(path: Path, num_bytes: int) -> None:
    """Raises StoreError where the disk has no room for so many bytes more."""
    with disk_errors(path, "written"):
        folder = next(parent for parent in (path, *path.parents) if parent.is_dir())
        free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise StoreError(
            f"{path} takes {num_bytes / 2**20:.1f} MiB.",
            limit=f"The disk has {free / 2**20:.1f} MiB left.",
            remedy="Free some disk space, or set `runs` to a folder on another disk, and start again: "
            "what was committed is kept.",
        )


def read_tensors(path: Path, *, mapped: bool = False) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, in memory of their own or, `mapped`, in the file's."""
    from safetensors.torch import load_file

    with disk_errors(path, "read"):
        return {name: tensor if mapped else tensor.clone() for name, tensor in load_file(path).items()}


def to_json(value: object) -> bytes:
    """Readable JSON. Floats come back exactly; tuples and sets come back as lists; keys must be texts."""
    return (json.dumps(value, indent=2, ensure_ascii=False, default=_plain) + "\n").encode()


def finite(value: Any) -> Any:
    """The value with plain numbers, those that are not finite as None, all the way down: what JSON can hold."""
    if isinstance(value, Mapping):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if math.isfinite(value) else None


def file_hash(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(path: Path) -> None:
    """Makes the names in a folder last."""
    _sync_file(path)


def _sync_file(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _separate(tensors: Tensors) -> dict[str, torch.Tensor]:
    """The tensors on CPU, each with storage of its own: safetensors refuses shared memory."""
    separate: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.nbytes() != tensor.nbytes or storage.data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        separate[name] = tensor
    return separate


def _plain(value: object) -> object:
    if isinstance(value, set | frozenset):
        return sorted(str(item) for item in value)
    raise TypeError(f"a {type(value).__name__} cannot be kept in JSON: {value!r}")
