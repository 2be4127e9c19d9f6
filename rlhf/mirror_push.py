"""One push to a mirror: what of a run folder is sent, while the run goes on."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import sqlite3
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path

from rlhf.disk import MANIFEST, disk_errors, file_hash, write_file
from rlhf.errors import StoreError
from rlhf.mirror_remote import HOME, Entry, Index, Remote

RANKINGS = "rankings.db"


class Push:
    """One push on its way: what it has sent, and which files the mirror will then hold."""

    def __init__(
        self,
        remote: Remote,
        folder: Path,
        scratch: Path,
        before: Index,
        seen: dict[str, object],
        warn: Callable[[str], None],
    ) -> None:
        self._remote, self._folder, self._scratch, self._warn = remote, folder, scratch, warn
        self._held, self._seen = before["files"], seen
        self.name = secrets.token_hex(8)
        self.files: dict[str, Entry] = {}
        self.staged: set[str] = set()
        self.placed: set[str] = set()  # at once, though a folder that vanished under way may have no use for it
        self.num_bytes = 0

    def send_bytes(self, path: str, data: bytes) -> None:
        """Sends a file of which the bytes are given."""
        copy = self._scratch / "bytes"
        write_file(copy, data)
        self._send(path, copy, Entry(bytes=len(data), sha256=hashlib.sha256(data).hexdigest()))

    def send_file(self, path: str) -> None:
        """Sends a file that may be written at this moment: a database whole, JSON lines up to a whole one."""
        source, copy = self._folder / path, self._scratch / "file"
        with disk_errors(source, "read"):
            looks = [_looks(source), _looks(source.with_name(f"{source.name}-wal"))]
            if path in self._held and self._seen.get(path) == looks:
                self.files[path] = self._held[path]
                return
            if path == RANKINGS:
                _copy_database(source, copy)
            else:
                _copy_lines(source, copy, to_the_end=not path.endswith(".jsonl"))
            entry = Entry(bytes=copy.stat().st_size, sha256=file_hash(copy))
        self._send(path, copy, entry)
        self._seen[path] = looks

    def send_folder(self, path: str) -> bool:
        """Whether it stayed as it was while it was sent; if not, nothing of it counts."""
        folder, about = self._folder / path, f"{path}/{MANIFEST}"
        manifest = _read(folder / MANIFEST)
        if manifest is None:
            return False
        entry, files = Entry(bytes=len(manifest), sha256=hashlib.sha256(manifest).hexdigest()), _files(manifest)
        if entry == self.files.get(about):
            return True
        held = {p: e for p, e in self._held.items() if p.startswith(f"{path}/")}
        if entry == held.get(about) and all(f"{path}/{name}" in held for name in files):
            self.files |= held
            return True
        try:
            for name, wanted in files.items():
                self._send(f"{path}/{name}", folder / name, wanted)
        except FileNotFoundError:
            if _read(folder / MANIFEST) == manifest and _is_whole(folder, files):
                raise  # what is missing is on the mirror's side
        if _read(folder / MANIFEST) != manifest:
            self._forget(path)
            return False
        if not _is_whole(folder, files):
            self._warn(f"{folder} is damaged, so it is not mirrored.")
            self._forget(path)
            self.files |= held
            return True
        self.send_bytes(about, manifest)
        return True

    def _forget(self, folder: str) -> None:
        """Takes back what was sent of a folder: what lies in the stage counts, whatever the index says of it."""
        self.files = {path: entry for path, entry in self.files.items() if not path.startswith(f"{folder}/")}
        self.staged = {path for path in self.staged if not path.startswith(f"{folder}/")}
        self._remote.remove(f"{HOME}/{self.name}/{folder}")

    def _send(self, path: str, source: Path, entry: Entry) -> None:
        self.files[path] = entry
        if self._held.get(path) == entry:
            return
        if self._remote.is_store and path not in self._held and path != MANIFEST:
            self._remote.put(source, path)
            self.placed.add(path)
        else:
            self._remote.put(source, f"{HOME}/{self.name}/{path}")
            self.staged.add(path)
        self.num_bytes += entry["bytes"]


def _read(path: Path) -> bytes | None:
    with disk_errors(path, "read"):
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None


def _files(manifest: bytes) -> dict[str, Entry]:
    """The files of a folder that `write_folder` wrote; none if its manifest cannot be read."""
    try:
        files = json.loads(manifest)["files"].items()
        return {name: Entry(bytes=wanted["bytes"], sha256=wanted["sha256"]) for name, wanted in files}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _is_whole(folder: Path, files: Mapping[str, Entry]) -> bool:
    """Whether files of these sizes are there."""
    looks = {name: _looks(folder / name) for name in files}
    return bool(files) and all(look and look[1] == files[name]["bytes"] for name, look in looks.items())


def _looks(path: Path) -> tuple[int, int, int] | None:
    """What changes when the file is written or replaced."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _copy_lines(source: Path, copy: Path, *, to_the_end: bool) -> None:
    """Copies what the file holds now, up to its last whole line; others go on writing it."""
    with source.open("rb") as reader, copy.open("wb") as writer:
        left, end, done = os.fstat(reader.fileno()).st_size, 0, 0
        while left and (data := reader.read(min(left, 1 << 20))):
            writer.write(data)
            if b"\n" in data:
                end = done + data.rfind(b"\n") + 1
            done, left = done + len(data), left - len(data)
        writer.truncate(done if to_the_end else end)


def _copy_database(source: Path, copy: Path) -> None:
    """Copies a database as it is between two transactions."""
    copy.unlink(missing_ok=True)
    try:
        with closing(sqlite3.connect(source)) as reader, closing(sqlite3.connect(copy)) as writer:
            reader.backup(writer)
    except sqlite3.Error as error:
        raise StoreError(f"{source} cannot be read: {error}.", remedy="Restore the database from a copy.") from error
