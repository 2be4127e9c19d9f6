"""The working directory as one file to upload: without junk, and small enough."""

from __future__ import annotations

import fnmatch
import os
import subprocess
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from cluster.jobs import JobError
from rlhf.ports import Console

# Never packed unless the recipe or --include names it: at the top, in any folder, and what holds secrets.
TOP = ("runs", "models", "wandb")
JUNK = (
    ".git", ".hg", ".svn", "__pycache__", "*.pyc", ".venv*", "venv", ".tox", ".nox", "node_modules", "*.egg-info",
    ".*_cache", ".cache", ".hypothesis", ".ipynb_checkpoints", ".idea", ".vscode", ".DS_Store",
)  # fmt: skip
SECRET = (".env", ".env.*", ".netrc", "auth_token", "*.pem", "id_rsa*", "id_ed25519*", ".aws", ".ssh", ".kube")
NUM_NAMED = 5  # of the biggest files, where it is too much
EPOCH = (1980, 1, 1, 0, 0, 0)  # of every file: what is the same has the same name on the cluster, and goes up once
MIB = 1024**2


@dataclass(frozen=True, slots=True)
class Packed:
    """A file that goes along."""

    name: str  # as it is seen from the working directory
    num_bytes: int  # before it is packed


def files_of(folder: Path, include: Iterable[str] = ()) -> list[Packed]:
    """The files of a working directory that go along, in order of names.

    In a git checkout those that git does not ignore, elsewhere all; without junk and files of secrets. `include` names
    files and folders, seen from the folder, that go along whatever they are called.
    """
    names = {name for name in _listed(folder) if not is_left_out(name)}
    for wanted in include:
        path = folder / wanted
        found = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
        names |= {each.relative_to(folder).as_posix() for each in found if not _is_junk(each.relative_to(path).parts)}
    return [Packed(name, (folder / name).stat().st_size) for name in sorted(names)]


def is_left_out(name: str) -> bool:
    """Whether a file, seen from the working directory, is junk or holds secrets by its name."""
    parts = PurePosixPath(name).parts
    return parts[0] in TOP or _is_junk(parts)


def pack(
    folder: Path,
    files: Sequence[Packed],
    written: Mapping[str, bytes],
    dest: Path,
    limit_bytes: int,
    console: Console,
) -> int:
    """The size in bytes of the ZIP file `dest`: these files of `folder`, and the contents `written` by their names.

    Raises JobError as soon as it would not be smaller than `limit_bytes`; the biggest files are named.
    """
    with console.task("pack the working directory", len(files), "files") as work:
        with zipfile.ZipFile(dest, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in written.items():
                archive.writestr(_entry(name, 0o644), content)
            for file in files:
                if file.name not in written:
                    _add(archive, folder / file.name, file.name)
                work.advance()
                if archive.fp is not None and archive.fp.tell() >= limit_bytes:
                    raise too_big(folder, files, limit_bytes)
        size = dest.stat().st_size
        if size >= limit_bytes:
            raise too_big(folder, files, limit_bytes)
        return size


def too_big(folder: Path, files: Sequence[Packed], limit_bytes: int) -> JobError:
    """The error for a working directory that does not fit through the door."""
    biggest = sorted(files, key=lambda file: file.num_bytes, reverse=True)[:NUM_NAMED]
    total = sum(file.num_bytes for file in files)
    named = ", ".join(f"{file.name} ({mib(file.num_bytes)})" for file in biggest)
    return JobError(
        f"The working directory {folder.resolve()} is too big to be uploaded: {len(files)} files, {mib(total)}. "
        f"The biggest: {named}.",
        limit=f"Packed, Ray takes less than {mib(limit_bytes)}.",
        remedy="Put big files on storage that the cluster's nodes see and name them in the recipe by their absolute "
        "paths there; or keep them out by .gitignore, or by another --working-dir.",
    )


def mib(num_bytes: int) -> str:
    """A size in MiB, with a digit where it is small."""
    size = num_bytes / MIB
    return f"{size:.0f} MiB" if size >= 10 else f"{size:.1f} MiB"


def _listed(folder: Path) -> list[str]:
    """All files, or those that git does not ignore, seen from the folder."""
    try:
        said = subprocess.run(
            ["git", "-C", str(folder), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            capture_output=True,
            check=True,
        ).stdout
        names = [os.fsdecode(name) for name in said.split(b"\0") if name]
        return [name for name in names if (folder / name).is_file()]  # not what was deleted, nor a submodule
    except (OSError, subprocess.CalledProcessError):
        return list(_walked(folder))


def _walked(folder: Path) -> Iterable[str]:
    for parent, folders, files in os.walk(folder):
        here = Path(parent).relative_to(folder)
        folders[:] = [name for name in folders if not is_left_out((here / name).as_posix())]
        yield from ((here / name).as_posix() for name in files if (Path(parent) / name).is_file())


def _is_junk(parts: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(part, pattern) for part in parts for pattern in (*JUNK, *SECRET))


def _add(archive: zipfile.ZipFile, path: Path, name: str) -> None:
    entry = _entry(name, path.stat().st_mode & 0o777)
    entry.file_size = path.stat().st_size
    with path.open("rb") as source, archive.open(entry, "w") as target:
        while block := source.read(MIB):
            target.write(block)


def _entry(name: str, mode: int) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, EPOCH)
    entry.compress_type = zipfile.ZIP_DEFLATED
    entry.external_attr = (0o100000 | mode) << 16
    return entry
