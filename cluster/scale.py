"""Another size asked of a run: by a file in its folder, at which the controller looks between two steps."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Self, cast

from pydantic import Field, ValidationError, model_validator

from cluster.placement import Resources
from cluster.replan import Planner, Size
from configs.load import load_recipe
from configs.schema import GroupName, Recipe
from configs.section import Section
from rlhf.disk import write_file
from rlhf.errors import PlacementError, StoreError
from rlhf.events import EVENTS
from rlhf.lock import is_locked, take_lock
from rlhf.manifest import RECIPE, read_manifest, resize
from rlhf.ports import Console
from rlhf.store import RunStore

REQUEST = "scale.json"  # in the run folder, as long as it is not answered
TAKEN, REFUSED = "taken", "refused"
MOST_SHOWN = 1 << 16  # bytes of events that are read for an answer
MOST = 4096  # GPUs, or workers of a group, as for `tenfold plan`
Number = Annotated[int, Field(gt=0, le=MOST)]


class Request(Section):
    """What the file holds."""

    id: str
    gpus: Number | None = None
    workers: Number | None = None  # of every group
    by_group: Annotated[dict[GroupName, Number], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if sum(value is not None for value in (self.gpus, self.workers, self.by_group)) != 1:
            raise ValueError("one of gpus, workers, by_group is asked for")
        return self

    @property
    def size(self) -> Size:
        return Size(self.gpus, self.workers, cast(Mapping[str, int] | None, self.by_group))


def parse(gpus: int | None, workers: str | None) -> Request:
    """The request of the command line: `--gpus 8`, `--workers 2` or `--workers trainer=2,generator=1`.

    Raises PlacementError for anything else.
    """
    if (gpus is None) == (workers is None):
        raise PlacementError(
            "No size was given." if gpus is None else "A run is scaled to one size.",
            remedy="Give --gpus N, or --workers N or GROUP=N,... where there are no GPUs.",
        )
    asked: dict[str, object] = {"gpus": gpus}
    if workers is not None:
        parts = [part.partition("=") for part in workers.split(",")]
        alone = len(parts) == 1 and not parts[0][1]
        names = [name for name, _, _ in parts]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise PlacementError(f"--workers {workers} gives {', '.join(twice)} two sizes.", remedy="Name it once.")
        asked = {"workers": parts[0][0]} if alone else {"by_group": {name: number for name, _, number in parts}}
    try:
        return Request.model_validate({"id": uuid.uuid4().hex, **asked})
    except ValidationError as error:
        given = f"--gpus {gpus}" if workers is None else f"--workers {workers}"
        raise PlacementError(
            f"{given} is no size of a run: {error.errors()[0]['msg']}.",
            limit=f"Numbers are 1 to {MOST}.",
            remedy="Write --gpus 8, --workers 2 or --workers trainer=2,generator=1.",
        ) from error


def ask(folder: Path, request: Request) -> None:
    """Puts the request before the run; one that was not answered yet is replaced."""
    write_file(folder / REQUEST, request.model_dump_json(exclude_none=True).encode())


def pending(folder: Path) -> Request | None:
    """The request that is not answered yet. Raises StoreError for a file that is none."""
    path = folder / REQUEST
    try:
        return Request.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValidationError, OSError) as error:
        raise StoreError(f"{path} is no request of `tenfold scale`: {error}.", remedy="Delete it.") from error


def withdraw(folder: Path, request: Request) -> bool:
    """Whether the request was still there; it is not any more."""
    try:
        found = pending(folder)
    except StoreError:
        return False
    if found is None or found.id != request.id:
        return False
    (folder / REQUEST).unlink(missing_ok=True)
    return True


def answer_to(request: Request, folder: Path) -> tuple[str, str] | None:
    """(taken or refused, why), once the run has answered."""
    try:
        with (folder / EVENTS).open("rb") as file:
            file.seek(max(os.fstat(file.fileno()).st_size - MOST_SHOWN, 0))
            lines = file.read().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        if request.id.encode() in line:
            event = json.loads(line)
            return event["answer"], event["why"]
    return None


def change_at_rest(folder: Path, request: Request, planner: Planner) -> Recipe:
    """The recipe that the run, which nobody holds, will go on with. Raises PlacementError, StoreError."""
    lock = take_lock(folder)
    try:
        manifest = read_manifest(folder)
        recipe = planner.scaled(load_recipe(folder / RECIPE), request.size, None)
        resize(folder, manifest, recipe)
        (folder / REQUEST).unlink(missing_ok=True)  # an older one, that no process took
        return recipe
    finally:
        os.close(lock)


def is_running(folder: Path) -> bool:
    """Whether a process holds the run, so that it must be asked."""
    return is_locked(folder)


class Requests:
    """Those that a run which is under way is asked, and its answers."""

    def __init__(
        self, store: RunStore, console: Console, planner: Planner, look: Callable[[], Resources] | None
    ) -> None:
        self._store, self._console, self._planner, self._look = store, console, planner, look
        self._open: Request | None = None

    def wanted(self, recipe: Recipe) -> Recipe | None:
        """The recipe in the size that is asked for; None if nothing is, or nothing that the cluster can give."""
        folder = self._store.folder
        try:
            request = pending(folder)
        except StoreError as error:
            self._console.warn(f"{error} It is put aside.")
            (folder / REQUEST).replace(folder / f"{REQUEST}.damaged")
            return None
        if request is None or self._look is None:
            return None
        try:
            found = self._planner.scaled(recipe, request.size, self._look())
        except PlacementError as error:
            self._console.warn(f"another size was asked for, and cannot be had: {error}")
            self._answer(request, REFUSED, str(error))
            return None
        self._open = request
        return found

    def take(self, recipe: Recipe) -> None:
        """Makes the recipe that was wanted the run's own, and says so to whoever asked."""
        assert self._open is not None, "wanted comes first"
        self._store.resize(recipe)
        self._answer(self._open, TAKEN, "")
        self._open = None

    def _answer(self, request: Request, answer: str, why: str) -> None:
        self._store.events.add("scale", id=request.id, answer=answer, why=why)
        withdraw(self._store.folder, request)
