"""The mirror's side: files put, moved and read through fsspec, with errors in words."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, TypedDict
from urllib.parse import unquote

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from rlhf.disk import MANIFEST, TMP, check_format
from rlhf.errors import StoreError

HOME, FORMAT = ".mirror", 1
INDEX = f"{HOME}/index.json"
OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "az"}  # a put is whole or not there, and folders need not be made
_USER = re.compile(r"(?<=://)(?:[^\s/]*:\S*|[^\s/@]*)(?=@)")


class Entry(TypedDict):
    """A file as the mirror holds it."""

    bytes: int
    sha256: str


class Index(TypedDict):
    """What .mirror/index.json holds."""

    format: int
    begun: str  # when the run was begun: another run of the same name is another run
    push: str
    files: dict[str, Entry]  # path in the run folder -> entry


def is_url(text: str) -> bool:
    """Whether it is a URL such as s3://bucket/runs/NAME rather than a path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.:-]*://", text) is not None


def masked(text: str) -> str:
    """The text without the user and password of the URLs in it."""
    return _USER.sub("***", text)


class Remote:
    """The files of one run on an fsspec file system, by their paths in the run folder."""

    def __init__(self, url: str) -> None:
        self.shown = masked(url)
        user = _USER.search(url)
        password = user[0].partition(":")[2] or user[0] if user else ""
        self._secrets = [text for text in (password, unquote(password)) if text]
        with self.errors("used"):
            self.fs, self.root = url_to_fs(url)
        protocol = self.fs.protocol
        self.is_store = bool(OBJECT_STORES & set((protocol,) if isinstance(protocol, str) else protocol))

    @contextmanager
    def errors(self, doing: str) -> Iterator[None]:
        """A block in which what a file system raises becomes a StoreError with URL and remedy, without a password."""
        try:
            yield
        except StoreError:
            raise
        except Exception as error:  # each backend has exceptions of its own
            text = masked(str(error) or type(error).__name__)
            for secret in self._secrets:
                text = text.replace(secret, "***")
            limit, remedy = _limit_and_remedy(error, text)
            problem = f"The mirror {self.shown} cannot be {doing}: {text.rstrip('.')}."
            # A chain would print the password that the text no longer has.
            raise StoreError(problem, limit=limit, remedy=remedy) from (None if self._secrets else error)

    def index(self) -> Index | None:
        """What the mirror says that it holds, or None. Raises StoreError for what cannot be read."""
        self.fs.invalidate_cache()
        try:
            data = self.fs.cat_file(self._at(INDEX))
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            index: Index = json.loads(data)
            version, _, _ = int(index["format"]), str(index["begun"]), str(index["push"])
            paths = [PurePosixPath(path) for path in index["files"]]
            if any(path.is_absolute() or ".." in path.parts for path in paths):
                raise ValueError("it names files outside the run")
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"{self.shown}/{INDEX} cannot be read: {error}.", remedy="Move this mirror away, or mirror elsewhere."
            ) from error
        check_format(Path(INDEX), version, FORMAT)
        return index

    def find(self, folder: str = "") -> dict[str, int]:
        """Sizes in bytes by path of all files in a folder; none where there is no such folder."""
        self.fs.invalidate_cache()
        try:
            found: Any = self.fs.find(self._at(folder), detail=True)
        except FileNotFoundError:
            return {}
        return {name.removeprefix(f"{self.root}/"): about["size"] for name, about in found.items()}

    def siblings(self) -> list[str]:
        """The names beside the run: other runs."""
        try:
            names: Any = self.fs.ls(self.root.rpartition("/")[0], detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(name.rstrip("/").rpartition("/")[2] for name in names)

    def put(self, source: Path, path: str) -> None:
        """Copies a local file there."""
        self._make_parent(path)
        self.fs.put_file(str(source), self._at(path))
        self._flush(path)

    def get(self, path: str, to: Path) -> bool:
        """Whether it was there to be copied from there."""
        try:
            self.fs.get_file(self._at(path), str(to))
        except FileNotFoundError:
            return False
        return True

    def write(self, path: str, data: bytes) -> None:
        """Replaces a file, whole or not at all."""
        first = path if self.is_store else f"{path}{TMP}"
        self._make_parent(path)
        self.fs.pipe_file(self._at(first), data)
        self._flush(first)
        if first != path:
            self.fs.mv(self._at(first), self._at(path))

    def place(self, push: str, paths: Collection[str]) -> None:
        """Moves what a push staged to its place; manifests come after files, and the run's comes last."""
        for path in sorted(paths, key=rank):
            source, target = self._at(f"{HOME}/{push}/{path}"), self._at(path)
            self._make_parent(path)
            if self.is_store:
                self.fs.cp_file(source, target)
            else:
                self.fs.mv(source, target)
        if paths:
            self.remove(f"{HOME}/{push}")

    def remove(self, folder: str) -> None:
        """Deletes a folder, or a file, if it is there."""
        with suppress(FileNotFoundError):
            self.fs.rm(self._at(folder), recursive=True)

    def _flush(self, path: str) -> None:
        if isinstance(self.fs, LocalFileSystem):
            with Path(self._at(path)).open("rb") as file:
                os.fsync(file.fileno())

    def _make_parent(self, path: str) -> None:
        if not self.is_store:
            self.fs.makedirs(self._at(path).rpartition("/")[0], exist_ok=True)

    def _at(self, path: str) -> str:
        return f"{self.root}/{path}" if path else self.root


def _limit_and_remedy(error: Exception, text: str) -> tuple[str, str]:
    code = error.errno if isinstance(error, OSError) else None
    lower = f"{type(error).__name__} {text}".lower()
    if isinstance(error, ImportError):
        return "", "Install the package: `pip install s3fs` (or tenfold[s3]) for s3://, another one for another store."
    if isinstance(error, ValueError) and "protocol" in lower:
        return "It is a folder or a URL that fsspec knows.", "Set it to a folder such as /mnt/nfs/runs, or to s3://..."
    if code in (errno.EACCES, errno.EPERM, errno.EROFS) or "credential" in lower or "denied" in lower:
        return "", "See that you may write there: the folder's owner, or the credentials in the environment (AWS_...)."
    if code == errno.ENOSPC or "no space" in lower:
        return "", "Free some space there; what was mirrored before is kept."
    if isinstance(error, FileNotFoundError) or "bucket" in lower:
        return "", "Make the bucket or the folder first, or mend the URL."
    return "", "See that it can be reached; what was mirrored before is kept."


def rank(path: str) -> tuple[bool, bool, str]:
    """The order in which files are written: manifests after files, the run's own at the end."""
    return path == MANIFEST, path.endswith(f"/{MANIFEST}"), path
