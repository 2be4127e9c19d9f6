"""manifest.json of a run: which recipe it has, what is done, and how it last ended."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from configs.errors import ConfigError
from configs.load import absolute, difference, dump_recipe, load_recipe
from configs.schema import Recipe
from rlhf.disk import MANIFEST, check_format, to_json, write_file
from rlhf.errors import StoreError
from rlhf.fingerprint import adapter_fingerprint, fingerprint

FORMAT = 2
BASE = "model.base"  # stands for the base itself among the differences
START = "adapter_from"
RECIPE, JOURNALS = "recipe.yaml", "journal"
BEGINNINGS = ("start", "tokenizer")  # what `pretrain` and `sft` make of the recipe before their first step
# Where a run is, how it is watched and how often it is saved: no result hangs on these keys, so they may differ when it
# is opened again. (A base that was moved is known by its fingerprint, as is an adapter to start from.)
MAY_DIFFER = (
    *("name", "runs", "model.path", "tracker.", "checkpoints.", "ppo.save_every", "reward.save_every"),
    *("pretrain.save_every", "pretrain.cache", "sft.save_every"),
    *("cluster.address", "cluster.wait_s", "cluster.call_s"),
    *("desk.database", "desk.lease_minutes", "desk.guidelines"),
)
# How the work is cut up: results are the same but for their last bits, so that journaled steps stay of use.
ONLY_BITS = ("cluster.", "learner.")
OF_SIZE = ("cluster", "learner", "generator")  # the sections that hang on how many GPUs there are
# What all that a run holds is made of: another value is another run.
NEVER = ("seed", "data.", "sampling.n", "lora.", "adapter", "pretrain.")
OF_SFT = "sft."  # the same, once `sft` or what stands on it has begun


class Session(TypedDict):
    """One process that held the run."""

    pid: int
    began: str  # ISO 8601, UTC
    stages: list[str]  # that it was asked for
    ended: str | None  # None while it runs, and for ever if it was killed
    how: str  # running, done, stopped or failed
    why: str  # the first line of what ended it


class Manifest(TypedDict):
    """What manifest.json holds."""

    format: int
    tenfold: str  # the version that began the run
    created: str  # ISO 8601, UTC, to the microsecond: a mirror knows the run by it
    base: str | None  # fingerprint of the base
    adapter: NotRequired[str | None]  # fingerprint of the adapter that `adapter_from` names
    stages: dict[str, dict[str, Any]]  # of the stages done: when, and their results
    checkpoints: dict[str, int]  # stage -> the step of the newest
    wandb_run_id: str | None
    accepted: list[dict[str, Any]]  # when, and the differences of a recipe that was taken in mid-run
    session: Session | None  # the newest


@dataclass(frozen=True, slots=True)
class Change:
    """A recipe that an opened run is to have from here on."""

    recipe: Recipe
    lines: tuple[str, ...]  # the differences that were accepted, `key: before -> now`
    base: str | None  # fingerprint
    adapter: str | None = None  # fingerprint of the adapter to start from

    @property
    def spares_journals(self) -> bool:
        """Whether steps that were journaled before are still of use."""
        return all(line.startswith(ONLY_BITS) for line in self.lines)


def open_manifest(folder: Path, recipe: Recipe, accept: Sequence[str] = ()) -> tuple[Manifest, Change | None]:
    """(the manifest of the run in `folder`, what `take_change` will change). A run is begun where there is none.

    Call it with the lock held. `accept` names the keys (or sections) whose difference from the run's recipe is taken
    over. Raises StoreError: it cannot be read, another version wrote it, the run has another recipe or base.
    """
    if not (folder / MANIFEST).exists():
        return _begin(folder, recipe), None
    manifest = read_manifest(folder)
    try:
        before = load_recipe(folder / RECIPE)
    except ConfigError as error:
        raise StoreError(
            f"The recipe that the run {folder} was begun with cannot be read: {error}",
            remedy="Restore it from a copy, or start a run with another name.",
        ) from error
    base, now_is = manifest["base"], fingerprint(recipe.model.path)
    lines = {line.partition(":")[0]: line for line in difference(before, absolute(recipe))}
    wanted = {key: line for key, line in lines.items() if not key.startswith(MAY_DIFFER)}
    if base is not None and now_is not in (None, base):
        wanted[BASE] = f"{BASE}: {base[:12]} -> {str(now_is)[:12]} ({recipe.model.path} holds another base)"
    start, start_is = manifest.get("adapter"), adapter_fingerprint(recipe.adapter_from)
    if start is not None and recipe.adapter_from:
        wanted.pop(START, None)
        if start_is not in (None, start):
            wanted[START] = f"{START}: {start[:12]} -> {start_is[:12]} ({recipe.adapter_from} holds another adapter)"
    start_is = (start_is or start) if recipe.adapter_from else None
    if not _is_empty(folder, manifest):
        never = (*NEVER, OF_SFT) if _has_begun(folder, manifest) else NEVER
        _check(folder, wanted, accept, never)
    if not lines and base == (now_is or base) and start == start_is:
        return manifest, None
    kept = recipe.model_copy(update={"name": before.name, "runs": before.runs})  # the folder may have been renamed
    return manifest, Change(absolute(kept), tuple(wanted.values()), now_is or base, start_is)


def take_change(folder: Path, manifest: Manifest, change: Change) -> None:
    """Gives the run its new recipe, for good."""
    if not change.spares_journals:
        # First: steps that were journaled under the recipe before must not be taken for this one's after a crash.
        for journal in (folder / JOURNALS).glob("*.jsonl"):
            write_file(journal, b"")
    if _is_empty(folder, manifest):  # so they were made of another recipe, and nothing hangs on them
        for name in BEGINNINGS:
            shutil.rmtree(folder / name, ignore_errors=True)
    if any(line.startswith(OF_SFT) for line in change.lines):  # it has not begun
        shutil.rmtree(folder / "start" / "sft", ignore_errors=True)
    write_file(folder / RECIPE, dump_recipe(change.recipe).encode())
    manifest["base"], manifest["adapter"] = change.base, change.adapter
    if change.lines:
        manifest["accepted"].append({"when": now(), "differences": list(change.lines)})
    record(folder, manifest)


def resize(folder: Path, manifest: Manifest, recipe: Recipe) -> None:
    """Gives the run what `recipe` says of its size, and of how the work is cut up for it; all else stays."""
    before = load_recipe(folder / RECIPE)
    after = before.model_copy(update={section: getattr(recipe, section) for section in OF_SIZE})
    change = Change(after, tuple(difference(before, after)), manifest["base"], manifest.get("adapter"))
    take_change(folder, manifest, change)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a run. Raises StoreError for one that cannot be read or that another version wrote."""
    path = folder / MANIFEST
    try:
        manifest: Manifest = json.loads(path.read_bytes())
        version = int(manifest["format"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{path} cannot be read: {error}.", remedy="Restore it from a copy, or start a run with another name."
        ) from error
    check_format(path, version, FORMAT)
    if version < FORMAT:
        raise StoreError(
            f"{path} has format {version}, from before the first release.",
            limit=f"This Tenfold reads format {FORMAT}.",
            remedy="Start a run with another name.",
        )
    return manifest


def record(folder: Path, manifest: Manifest) -> None:
    """Replaces manifest.json."""
    write_file(folder / MANIFEST, to_json(manifest))


def now() -> str:
    """The time, ISO 8601, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def session(stages: Sequence[str]) -> Session:
    """The session of this process, which begins now."""
    return Session(pid=os.getpid(), began=now(), stages=list(stages), ended=None, how="running", why="")


def end_session(manifest: Manifest, error: BaseException | None) -> str:
    """How the session ended (done, failed, stopped), which the manifest then says; `error` is what ended it."""
    current = manifest["session"]
    assert current is not None
    how = "done" if error is None else "failed" if isinstance(error, Exception) else "stopped"
    why = "" if error is None else (str(error).strip() or type(error).__name__).splitlines()[0]
    manifest["session"] = {**current, "ended": now(), "how": how, "why": why}
    return how


def _begin(folder: Path, recipe: Recipe) -> Manifest:
    if strays := [name for name in ("checkpoints", "samples", "metrics.jsonl") if (folder / name).exists()]:
        raise StoreError(
            f"{folder} has {', '.join(strays)} but no {MANIFEST}.",
            remedy=f"Restore {MANIFEST} from a copy, or start a run with another name.",
        )
    manifest = Manifest(
        format=FORMAT,
        tenfold=_version(),
        created=datetime.now(UTC).isoformat(),
        base=fingerprint(recipe.model.path),
        adapter=adapter_fingerprint(recipe.adapter_from),
        stages={},
        checkpoints={},
        wandb_run_id=None,
        accepted=[],
        session=None,
    )
    write_file(folder / RECIPE, dump_recipe(absolute(recipe)).encode())
    record(folder, manifest)  # last: a run with a manifest has its recipe
    return manifest


def _is_empty(folder: Path, manifest: Manifest) -> bool:
    """Whether nothing hangs on the recipe yet: a run that failed before it did anything."""
    held = ("samples/*", f"{JOURNALS}/*", "checkpoints/*/*", "prompts.jsonl", "metrics.jsonl", "rankings.db")
    return not manifest["stages"] and not any(any(folder.glob(pattern)) for pattern in held)


def _has_begun(folder: Path, manifest: Manifest) -> bool:
    """Whether anything but `pretrain` has: then what is there may come of `sft`."""
    held = ("samples/*", f"{JOURNALS}/*", "prompts.jsonl", "rankings.db")
    others = [path for path in folder.glob("checkpoints/*/*") if path.parent.name != "pretrain"]
    return bool(set(manifest["stages"]) - {"pretrain"} or others or any(any(folder.glob(p)) for p in held))


def _check(folder: Path, differences: Mapping[str, str], accept: Sequence[str], never: tuple[str, ...]) -> None:
    """Raises StoreError for differences that are not accepted, or are of keys that can `never` be."""
    fixed = [key for key in differences if key.startswith(never)]
    refused = [key for key in differences if key in fixed or not _names(key, accept)]
    if refused:
        raise StoreError(
            "\n".join([f"The run {folder} was begun with another recipe:"] + [f"  {differences[k]}" for k in refused])
            + "\n",
            limit=f"{', '.join(fixed)} cannot change within a run." if fixed else "",
            remedy="Start a run with another name (name=...), or take the recipe that the run was begun with"
            + ("." if fixed else f", or take the change over: `--accept {' --accept '.join(refused)}`."),
        )


def _names(key: str, accept: Sequence[str]) -> bool:
    """Whether one of these keys is the key itself or a section that holds it."""
    return any(key == name or key.startswith(f"{name}.") for name in accept)


def _version() -> str:
    try:
        return importlib.metadata.version("tenfold")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
