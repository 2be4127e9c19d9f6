"""Where the files that a recipe names are, once it runs on a cluster: in the package, or there already.

A path seen from the working directory travels with the package. Where the job runs, `stage` copies it beside the run
folders, so that it is still there when the run is resumed from another package. An absolute path is the cluster's.
"""

from __future__ import annotations

import filecmp
import glob
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cluster.jobs import JobError
from configs.load import is_elsewhere, map_paths
from configs.schema import Recipe
from rlhf.errors import StoreError

Kind = Literal["packed", "cluster", "elsewhere"]
WRITTEN = ("pretrain.cache", "checkpoints.mirror")  # keys of what the run writes, not reads
INPUTS = "inputs"  # the folder beside the run folders


@dataclass(frozen=True, slots=True)
class Place:
    """A path of the recipe, and where the job finds it."""

    key: str
    path: str
    kind: Kind
    files: tuple[str, ...] = ()  # that are packed for it, as seen from the working directory

    def __str__(self) -> str:
        where = {
            "packed": f"in the package ({len(self.files)} file{'s' if len(self.files) != 1 else ''})",
            "cluster": "on the cluster, under this path on every node; not checked here",
            "elsewhere": "no path; found where it is used",
        }[self.kind]
        return f"{self.key} {self.path}: {where}"


def places_of(recipe: Recipe, folder: Path) -> list[Place]:
    """Where each path of the recipe is for a job whose working directory is `folder`.

    Raises JobError for what the job would not find, or would write where nothing lasts; all problems are told at once.
    """
    found: list[Place] = []
    problems: list[str] = []

    def look(key: str, path: str) -> str:
        if path and is_elsewhere(path):
            found.append(Place(key, path, "elsewhere"))
        elif path and os.path.isabs(path):
            found.append(Place(key, path, "cluster"))
        elif path and key in WRITTEN:
            problems.append(f"{key}={path} is written by the run: name it by an absolute path that lasts")
        elif path:
            files, problem = _packed(path, folder)
            found.append(Place(key, path, "packed", tuple(files)))
            problems.extend([f"{key}={path} {problem}"] if problem else [])
        return path

    map_paths(recipe, look)
    if os.path.isabs(recipe.runs):
        found.append(Place("runs", recipe.runs, "cluster"))
    else:
        problems.append(
            f"runs={recipe.runs} would be deleted with the job's package: name a folder of the cluster that lasts, "
            "which all its nodes see if there are several (runs=/shared/runs)"
        )
    if problems:
        raise JobError(
            f"The recipe {recipe.name!r} does not work as a job: {'; '.join(problems)}.",
            limit=f"A relative path travels with the working directory {folder.resolve()}; an absolute one must be on "
            "the cluster already.",
        )
    return found


def stage(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with the packed files at their lasting place, RUNS/inputs/NAME, where they are copied from `folder`.

    Raises StoreError: a file of that name is there with another content, since the run was begun with that one.
    """
    home = Path(recipe.runs) / INPUTS / recipe.name

    def staged(key: str, path: str) -> str:
        if not path or is_elsewhere(path) or os.path.isabs(path) or key in WRITTEN:
            return path
        for file in _packed(path, folder)[0]:
            _copy(folder / file, home / file)
        return str(home / os.path.normpath(path))

    return map_paths(recipe, staged)


def _packed(path: str, folder: Path) -> tuple[list[str], str]:
    """(the files of a relative path or glob, as seen from the folder; what is wrong with it)."""
    if os.path.normpath(path).startswith(".."):
        return [], f"is outside of the working directory {folder.resolve()}"
    files = list(_files(path, folder))
    return files, "" if files else f"matches no file in {folder.resolve()}"


def _files(path: str, folder: Path) -> Iterator[str]:
    here = folder / path
    found: Sequence[Path] = (
        [here] if here.exists() else [Path(each) for each in sorted(glob.glob(str(here), recursive=True))]
    )
    for each in found:
        for file in sorted(each.rglob("*")) if each.is_dir() else [each]:
            if file.is_file():
                yield os.path.normpath(file.relative_to(folder))


def _copy(source: Path, dest: Path) -> None:
    if dest.exists():
        if not filecmp.cmp(source, dest, shallow=False):
            raise StoreError(
                f"{dest} is of an earlier submission of this run, and the package holds another file of that name.",
                limit="A run keeps the files that it was begun with.",
                remedy="Submit it under another name (name=...), or bring the earlier file back.",
            )
        return
    dest.parent.mkdir(parents=True, exist_ok=True)
    partial = dest.with_name(f".tmp-{os.getpid()}-{dest.name}")
    shutil.copyfile(source, partial)
    os.replace(partial, dest)
