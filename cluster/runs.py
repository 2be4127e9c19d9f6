"""Runs on this machine: found by name, listed, and read for going on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from configs.errors import ConfigError
from configs.load import load_recipe
from configs.schema import STAGES, Recipe, Stage
from rlhf.errors import StoreError, TenfoldError
from rlhf.events import last_event
from rlhf.lock import is_locked
from rlhf.manifest import Manifest, read_manifest
from rlhf.mirror import holds_mirror, is_of, pull
from rlhf.mirror_remote import is_url
from rlhf.ports import Console
from rlhf.rounds import key, schedule

RunRow = dict[str, object]


def find_run(name: str, runs: Path = Path("runs"), console: Console | None = None) -> Path:
    """The folder of a run, given by its path, by its name in `runs`, or by the URL of its mirror, which is fetched.

    Raises StoreError where there is none; the runs that there are are named.
    """
    if is_url(name):
        return _fetched(name, runs / name.rstrip("/").rpartition("/")[2], console)
    if holds_mirror(Path(name)):
        return _fetched(str(Path(name).resolve()), runs / Path(name).resolve().name, console)
    folder = Path(name) if (Path(name) / "manifest.json").exists() else runs / name
    if not (folder / "manifest.json").exists():
        known = sorted(str(path.parent) for path in runs.glob("*/manifest.json"))
        raise StoreError(
            f"There is no run {name}.",
            remedy=f"There are {', '.join(known)}." if known else "Give the path of a run folder.",
        )
    return folder


def _fetched(url: str, folder: Path, console: Console | None) -> Path:
    """The run folder of a mirror: the one that is there, or a new one."""
    if (folder / "manifest.json").exists():
        if not is_of(folder, url):
            raise StoreError(
                f"{folder} holds another run than {url}.",
                remedy="Move it away, or name another folder for runs with --into.",
            )
        return folder
    if console is None:
        raise StoreError(f"{url} is not here.", remedy=f"Fetch it and go on with `tenfold resume {url}`.")
    with console.task(f"fetch {url}"):
        return pull(url, folder, console.warn)


def load_run(folder: Path, overrides: Sequence[str] = ()) -> tuple[Recipe, tuple[Stage, ...]]:
    """(the recipe of the run in this folder, the stages to go on with).

    Those are what it was last asked for or, once they are done or `stages` is set anew, all of the recipe.
    """
    manifest = read_manifest(folder)
    recipe = load_recipe(folder / "recipe.yaml", overrides)
    home = folder.resolve()
    recipe = recipe.model_copy(update={"runs": str(home.parent), "name": home.name})
    session = manifest["session"]
    asked = cast(Sequence[Stage], tuple(session["stages"]) if session else ())
    named = any(override.partition("=")[0].strip() == "stages" for override in overrides)
    under_way = not named and any(key(*step) not in manifest["stages"] for step in schedule(asked, recipe.rounds))
    return recipe, tuple(asked) if under_way else recipe.stages


def is_done(folder: Path) -> bool:
    """Whether all stages of the run's recipe are done, so that there is nothing to go on with."""
    done = read_manifest(folder)["stages"]
    recipe, stages = load_run(folder)
    return all(key(*step) in done for step in schedule(stages, recipe.rounds))


def list_runs(runs: Path) -> list[RunRow]:
    """What each run of a folder is at, oldest first; read without taking any run's lock."""
    folders = [path.parent for path in runs.glob("*/manifest.json")]
    rows = [_row(folder) for folder in folders]
    return sorted(rows, key=lambda row: str(row["created"]))


def table(rows: Sequence[RunRow]) -> RenderableType:
    """The rows for rich to print."""
    if not rows:
        return Text("There are no runs here.")
    grid = Table("run", "state", "stage", "step", "newest checkpoint", "", box=SIMPLE_HEAD, show_edge=False)
    for row in rows:
        grid.add_row(*(Text(_shown(row[key])) for key in ("run", "state", "stage", "step", "checkpoint", "why")))
    return grid


def _row(folder: Path) -> RunRow:
    row: RunRow = {"run": str(folder), "state": "", "stage": None, "step": None, "checkpoint": None, "created": ""}
    try:
        manifest = read_manifest(folder)
        recipe, stages = load_run(folder)
    except (TenfoldError, ConfigError, ValueError, KeyError, TypeError) as error:
        return row | {"state": "unreadable", "why": str(error)}
    event = last_event(folder)
    left = [step for step in schedule(stages, recipe.rounds) if key(*step) not in manifest["stages"]]
    open_stages = [stage for stage, _ in left]
    stage = event["stage"] if event and event["stage"] in open_stages else next(iter(open_stages or stages[-1:]), None)
    newest = [(name, manifest["checkpoints"][name]) for name in STAGES if name in manifest["checkpoints"]]
    state, why = _state(folder, manifest, open_stages)
    return row | {
        "state": state,
        "stage": stage,
        "step": event.get("step") if event and event["stage"] == stage and open_stages else None,
        "checkpoint": " ".join(f"{name} {step}" for name, step in newest[-1:]) or None,
        "created": manifest["created"],
        "why": why,
    }


def _state(folder: Path, manifest: Manifest, open_stages: Sequence[str]) -> tuple[str, str]:
    """(running, done, stopped, failed or killed; what it was ended by)."""
    if is_locked(folder):
        return "running", ""
    session = manifest["session"]
    if not open_stages:
        return "done", ""
    if session is None or session["ended"] is None:
        return "killed", f"go on with `tenfold resume {folder}`"
    return ("stopped" if session["how"] == "done" else session["how"]), session["why"]


def _shown(value: object) -> str:
    return "" if value is None else str(value)
