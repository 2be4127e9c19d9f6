"""A second copy of a run on an fsspec URL (`s3://bucket/runs`, a folder on NFS) from which alone it can go on.

The mirror at URL/NAME is laid out as the run folder is, and holds at every moment one whole state of the run: the one
before a push or the one after it, wherever the push dies. No order of writes alone can give that. Files are replaced
under their names (metrics, rankings, a role that was trained again, a checkpoint that is written again after a
fallback), and a half-replaced folder fits neither its old checksums nor its new ones. So a push is a transaction:

1. What replaces a file goes to `.mirror/PUSH/` first, under a name that only this push has. On an object store, where
   a put is whole or not there, a file that is new goes to its place at once: nothing refers to it yet. In a folder its
   manifest.json goes last.
2. One put of `.mirror/index.json` commits. It names the push and every file of the run with size and SHA-256.
3. What was staged is moved to its place, manifest.json of the run last, and then checkpoints that are gone are deleted.

A reader goes by the index: it takes a file from the stage of the push that the index names, else from its place. So
before 2 it finds the old state, after 2 the new one. The next push begins with ending step 3.

The copied files are not of one instant, for the run goes on meanwhile, but of an order that a killed process could
have left as well: manifest.json is read first, so it records nothing that is not there; journals before checkpoints,
since a checkpoint drops what it replaces from them; metrics last, since a checkpoint comes after its row.

URLs may hold a password: it is masked in all messages, and nothing of the URL is kept on the mirror.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Collection
from pathlib import Path, PurePosixPath

from rlhf.disk import MANIFEST, OLD, TMP, damage, disk_errors, file_hash, sync_folder, to_json
from rlhf.errors import StoreError
from rlhf.mirror_push import RANKINGS, Push
from rlhf.mirror_pushes import read_pushes, write_pushes
from rlhf.mirror_remote import FORMAT, HOME, INDEX, Entry, Index, Remote, rank

# Each with a manifest that was written last.
FOLDERS = ("checkpoints/*/step-*", "roles/*", "models/*", "tokenizer")
MAX_FETCHES = 5  # of a mirror that is written meanwhile


class Mirror:
    """The mirror of one run. Reads the run's files only, so a thread beside the run may push; one push at a time."""

    def __init__(self, url: str, folder: Path, warn: Callable[[str], None] | None = None) -> None:
        """`url` is the parent: the run is kept at URL/NAME. Raises StoreError for a URL that cannot be used."""
        self._folder = folder
        self._warn = warn or logging.getLogger("tenfold").warning
        self._remote = Remote(f"{url.rstrip('/')}/{folder.name}")
        self.url = self._remote.shown
        if not self._remote.is_store and Path(self._remote.root).resolve() == folder.resolve():
            raise StoreError(
                f"The mirror {self.url} is the run folder itself.",
                remedy="Set `checkpoints.mirror` to a folder on another disk, or to an URL.",
            )
        self._index: Index | None = None  # of the mirror; None until it was read, and after a push that failed
        self._there: set[str] = set()  # paths on the mirror, some of which the index may not know
        self._seen: dict[str, object] = {}  # path -> what the local file looked like when it was last sent

    def push(self) -> int:
        """Bytes that were sent to bring the mirror to what the run folder holds now.

        Raises StoreError: it cannot be reached or written, or it holds another run of this name. What the mirror held
        before is then whole.
        """
        done = False
        scratch = self._folder / f"{TMP}mirror"
        try:
            with self._remote.errors("written"):
                num_bytes = self._push(scratch)
            done = True
            return num_bytes
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            if not done:
                self._index, self._seen = None, {}

    def bring_back(self, names: Collection[str]) -> list[str]:
        """Which of these folders (checkpoints/STAGE/step-N) were missing or damaged here and are whole again.

        To be called before the first push, which would drop from the mirror what is lost here. Raises StoreError.
        """
        lost = [name for name in sorted(names) if damage(self._folder / name) is not None]
        if not lost:
            return []
        with self._remote.errors("read"):
            self._index = self._index or self._connect(self._begun())
            back: list[str] = []
            for name in lost:
                files = {path: entry for path, entry in self._index["files"].items() if path.startswith(f"{name}/")}
                partial, home = self._folder / f"{TMP}back", self._folder / name
                shutil.rmtree(partial, ignore_errors=True)
                if not files or _fetch(self._remote, {**self._index, "files": files}, partial):
                    continue
                with disk_errors(home, "written"):
                    home.parent.mkdir(parents=True, exist_ok=True)
                    shutil.rmtree(home, ignore_errors=True)
                    (partial / name).rename(home)
                    sync_folder(home.parent)
                shutil.rmtree(partial, ignore_errors=True)
                back.append(name)
        return back

    def _begun(self) -> str:
        with disk_errors(self._folder, "read"):
            return str(json.loads((self._folder / MANIFEST).read_bytes()).get("created"))

    def _push(self, scratch: Path) -> int:
        with disk_errors(self._folder, "read"):
            manifest = (self._folder / MANIFEST).read_bytes()
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
        begun = self._begun()
        if self._index is None:
            self._index = self._connect(begun)
        push = Push(self._remote, self._folder, scratch, self._index, self._seen, self._warn)
        for path in self._plain("journal/*"):
            push.send_file(path)
        for pattern in FOLDERS:
            while not all([push.send_folder(path) for path in self._folders(pattern)]):
                pass  # one was replaced or dropped under way: look again
        for path in [*self._plain("samples/*"), *self._plain(RANKINGS), *self._plain("metrics.jsonl")]:
            push.send_file(path)
        for path in [*self._plain("prompts.jsonl"), *self._plain("recipe.yaml")]:
            push.send_file(path)
        push.send_bytes(MANIFEST, manifest)
        index = Index(format=FORMAT, begun=begun, push=push.name, files=push.files)
        if index["files"] != self._index["files"]:
            self._check_turn(self._remote.index())
            # Before the commit: if this process dies after it, the next one must know the push as its own.
            write_pushes(self._folder, [*read_pushes(self._folder), push.name])
            self._remote.write(INDEX, to_json(index))
            self._remote.place(push.name, push.staged)
            self._index = index
        self._there |= push.placed
        self._drop_checkpoints()
        return push.num_bytes

    def _connect(self, begun: str) -> Index:
        """The index of the mirror, with a push that died after its commit brought to its end."""
        index = self._remote.index()
        self._there = set(found := self._remote.find())
        if index is None and MANIFEST in found:
            raise StoreError(
                f"The mirror {self.url} holds a run that no mirror wrote.",
                remedy="Move it away, or set `checkpoints.mirror` to another place.",
            )
        if index is not None and index["begun"] != begun:
            raise StoreError(
                f"The mirror {self.url} holds another run of this name, begun {index['begun']}.",
                limit=f"This one was begun {begun}.",
                remedy=f"Go on with that one (`tenfold resume {self.url}`, in another folder), give this run another "
                "name (name=...), or set checkpoints.mirror to another place.",
            )
        self._check_turn(index)
        index = index or Index(format=FORMAT, begun=begun, push="", files={})
        stage = f"{HOME}/{index['push']}/"
        staged = [path.removeprefix(stage) for path in found if path.startswith(stage)]
        self._remote.place(index["push"], staged)
        stages = {path.split("/")[1] for path in found if path.startswith(f"{HOME}/") and path != INDEX}
        for dead in sorted(stages - {index["push"]}):
            self._remote.remove(f"{HOME}/{dead}")
        # What somebody else deleted or cut is sent again.
        sizes = found | {path: found[stage + path] for path in staged}
        index["files"] = {path: entry for path, entry in index["files"].items() if sizes.get(path) == entry["bytes"]}
        return index

    def _check_turn(self, index: Index | None) -> None:
        """Raises StoreError where the newest push was made from another folder: this one is behind it."""
        known = read_pushes(self._folder)
        if index is not None and index["push"] and index["push"] not in known:
            raise StoreError(
                f"The mirror {self.url} holds a later state of this run than {self._folder}, from another folder.",
                limit="A mirror follows one folder at a time.",
                remedy=f"Move this folder away and go on with `tenfold resume {self.url}`, or leave the mirror as it "
                "is with checkpoints.mirror=null.",
            )

    def _drop_checkpoints(self) -> None:
        assert self._index is not None
        kept = {str(PurePosixPath(path).parent) for path in self._index["files"]}
        there = {str(PurePosixPath(path).parent) for path in self._there if path.startswith("checkpoints/")}
        for gone in sorted(there - kept):
            self._remote.remove(gone)
        self._there = set(self._index["files"])

    def _plain(self, pattern: str) -> list[str]:
        found = sorted(path for path in self._folder.glob(pattern) if path.is_file() and not _is_passing(path.name))
        return [_name(path, self._folder) for path in found]

    def _folders(self, pattern: str) -> list[str]:
        found = sorted(path.parent for path in self._folder.glob(f"{pattern}/{MANIFEST}"))
        names = [_name(path, self._folder) for path in found]
        return [name for name in names if not _is_passing(PurePosixPath(name).name)]


def pull(url: str, dest: Path, warn: Callable[[str], None] | None = None) -> Path:
    """The run folder `dest`, made from the mirror of a run (its own URL, not the parent's); it is there whole or not.

    What an earlier pull that died has fetched is used. A file whose checksum differs is said and left as it is: a
    store passes over a damaged checkpoint. Raises StoreError: no such run, `dest` is taken, or the mirror cannot be
    read.
    """
    remote = Remote(url.rstrip("/"))
    if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
        raise StoreError(f"{dest} is there already.", remedy=f"Go on with it, or move it away to fetch {remote.shown}.")
    partial = dest.with_name(f"{TMP}{dest.name}")
    with remote.errors("read"):
        index = remote.index() or _no_run(remote)
        for _ in range(MAX_FETCHES):
            problems = _fetch(remote, index, partial)
            before, index = index, remote.index() or _no_run(remote)
            if index["push"] == before["push"]:
                break
        else:
            raise StoreError(f"The mirror {remote.shown} is written all the time.", remedy="Stop the run that does.")
    if MANIFEST in problems:
        raise StoreError(f"{remote.shown}/{MANIFEST} {problems[MANIFEST]}.", remedy="Restore it from a copy.")
    for path, problem in problems.items():
        (warn or logging.getLogger("tenfold").warning)(f"{remote.shown}/{path} {problem}: it is fetched as it is.")
    write_pushes(partial, [index["push"]])
    with disk_errors(dest, "written"):
        os.sync()  # once for all files, before the name says that they are whole
        partial.rename(dest)
        sync_folder(dest.parent)
    return dest


def holds_mirror(folder: Path) -> bool:
    """Whether a folder is a mirror, and not a run folder that can be worked in."""
    return (folder / INDEX).is_file()


def is_of(folder: Path, url: str) -> bool:
    """Whether the run folder and the mirror at this URL are of one run. Raises StoreError."""
    remote = Remote(url.rstrip("/"))
    with remote.errors("read"):
        index = remote.index()
    with disk_errors(folder, "read"):
        return index is not None and index["begun"] == json.loads((folder / MANIFEST).read_bytes()).get("created")


def _fetch(remote: Remote, index: Index, partial: Path) -> dict[str, str]:
    """What is wrong by path, after all files of the index were brought; manifest.json comes last."""
    with disk_errors(partial, "written"):
        partial.mkdir(parents=True, exist_ok=True)
        for path in [path for path in partial.rglob("*") if path.is_file()]:
            if _name(path, partial) not in index["files"] or path == partial / MANIFEST:
                path.unlink()
        for path in sorted((path for path in partial.rglob("*") if path.is_dir()), reverse=True):
            if not any(path.iterdir()):
                path.rmdir()
    stage = f"{HOME}/{index['push']}/"
    staged = {path.removeprefix(stage) for path in remote.find(stage.rstrip("/"))}
    problems: dict[str, str] = {}
    for path in sorted(index["files"], key=rank):
        wanted, file = index["files"][path], partial / path
        if file.is_file() and _matches(file, wanted):
            continue
        with disk_errors(file, "written"):
            file.parent.mkdir(parents=True, exist_ok=True)
        # Both places: a push may be moving it at this moment.
        places = [stage + path, path] if path in staged else [path]
        if not any(remote.get(place, file) for place in places):
            file.unlink(missing_ok=True)
            problems[path] = "is missing"
        elif not _matches(file, wanted):
            problems[path] = "is damaged: its checksum differs"
    return problems


def _no_run(remote: Remote) -> Index:
    others = remote.siblings()
    raise StoreError(
        f"There is no run at {remote.shown}.",
        limit=f"There are {', '.join(others)}." if others else "",
        remedy="Give the URL of the run itself: the mirror's, then the name of the run.",
    )


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _is_passing(name: str) -> bool:
    return name.startswith((TMP, OLD)) or name.endswith(".damaged")


def _matches(file: Path, wanted: Entry) -> bool:
    with disk_errors(file, "read"):
        return file.stat().st_size == wanted["bytes"] and file_hash(file) == wanted["sha256"]
