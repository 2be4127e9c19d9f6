"""The run store: all that lasts of a run, in one folder that is consistent at every moment."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from sqlalchemy import URL

from configs.schema import Recipe
from rlhf.adapters import read_adapter, write_adapter
from rlhf.checkpoints import Checkpoint, Checkpoints
from rlhf.disk import damage, disk_errors, finite, read_tensors, tidy, to_json, write_folder
from rlhf.errors import StoreError
from rlhf.journal import Journal, group_from_row, group_to_row
from rlhf.manifest import Manifest, now, open_manifest, record, take_lock
from rlhf.rankings_db import RankingsDB
from rlhf.records import Adapter, AnswerGroup, Ranking, RoleState


class RunStore:
    """A run folder, held by one process at a time.

    runs/NAME/: recipe.yaml (resolved), manifest.json (stages done, newest checkpoint, W&B run id), metrics.jsonl,
    samples/ (answers, a journal per stage and round), rankings.db, checkpoints/step-N/, roles/NAME/ (all that a trained
    role needs), models/NAME/ (what others load). Only safetensors, JSON, YAML and SQLite are read: never a pickle.
    """

    def __init__(self, folder: Path, manifest: Manifest, lock: int, warn: Callable[[str], None]) -> None:
        self.folder = folder
        self._manifest, self._lock, self._warn = manifest, lock, warn
        for part in (folder, folder / "models", folder / "roles", folder / "samples"):
            tidy(part)
        self._checkpoints = Checkpoints(folder / "checkpoints", warn)
        self._metrics = Journal(folder / "metrics.jsonl", durable=False)
        self._journals: dict[str, Journal] = {}
        self._database: RankingsDB | None = None

    @classmethod
    def open(cls, root: str | Path, recipe: Recipe, warn: Callable[[str], None] | None = None) -> Self:
        """The store of the recipe's run in the folder `root`: a new one, or the one that is there.

        Raises StoreError: the folder cannot be written, another process holds the run, the run was begun with
        another recipe (the differences are shown), or a newer Tenfold wrote it.
        """
        folder = Path(root) / recipe.name
        with disk_errors(folder, "made"):
            folder.mkdir(parents=True, exist_ok=True)
        lock = take_lock(folder)
        try:
            return cls(folder, open_manifest(folder, recipe), lock, warn or logging.getLogger("tenfold").warning)
        except BaseException:
            os.close(lock)
            raise

    def close(self) -> None:
        """Lets another process open the run."""
        if self._lock >= 0:
            self._metrics.sync()
            if self._database is not None:
                self._database.close()
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Stages

    def done(self, stage: str) -> bool:
        """Whether the stage was finished."""
        return stage in self._manifest["stages"]

    def results(self, stage: str) -> dict[str, Any]:
        """What the finished stage reported; empty if it is not done."""
        results: Any = self._manifest["stages"].get(stage, {}).get("results", {})
        return dict(results)

    def finish(self, stage: str, results: Mapping[str, object]) -> None:
        """Records the stage as done, with its results as JSON holds them."""
        self._metrics.sync()
        self._manifest["stages"][stage] = {"finished": now(), "results": json.loads(to_json(finite(results)))}
        record(self.folder, self._manifest)

    @property
    def wandb_run_id(self) -> str | None:
        """The W&B run that this run goes on with."""
        return self._manifest["wandb_run_id"]

    @wandb_run_id.setter
    def wandb_run_id(self, run_id: str) -> None:
        self._manifest["wandb_run_id"] = run_id
        record(self.folder, self._manifest)

    # Metrics

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Appends a row to metrics.jsonl: safe from the death of the process, after a checkpoint from the machine's.

        Numbers that are not finite are kept as null: JSON has no others.
        """
        self._metrics.append([finite({"stage": stage, "step": step, **metrics})])

    def metrics(self, stage: str) -> list[dict[str, float]]:
        """The rows of a stage, in order, with their `step`; null comes back as NaN."""
        rows: list[dict[str, Any]] = [row for row in self._metrics.rows() if row["stage"] == stage]
        return [
            {key: math.nan if value is None else value for key, value in row.items() if key != "stage"} for row in rows
        ]

    def cut_metrics(self, stage: str, step: int) -> None:
        """Drops the stage's rows above `step`: those steps are about to be done again."""

        def stays(row: dict[str, Any]) -> bool:
            return row["stage"] != stage or row["step"] <= step

        self._metrics.keep(stays)

    # Answers and rankings

    def append_groups(self, stage: str, round: int, groups: Sequence[AnswerGroup]) -> None:
        """Commits answers: they are on the disk when this returns."""
        self._samples(stage, round).append(group_to_row(group) for group in groups)

    def groups(self, stage: str, round: int) -> list[AnswerGroup]:
        """The committed groups, in order."""
        return [group_from_row(row) for row in self._samples(stage, round).rows()]

    def add_rankings(self, rankings: Sequence[Ranking]) -> None:
        """Commits rankings, all or none. A second one of a prompt by the same judge in the same round replaces it."""
        self._rankings().add(rankings)

    def rankings(self, round: int | None = None) -> list[Ranking]:
        """The rankings that count, of one round or of all."""
        return self._rankings().rankings(round)

    # Checkpoints and models

    def save_checkpoint(
        self, step: int, states: Mapping[str, RoleState], values: Mapping[str, object], *, keep: int = 2
    ) -> None:
        """Commits the state after `step` steps, records it, and only then deletes all but the newest `keep`.

        `values` and the values of states are what JSON can hold; tuples come back as lists. Raises StoreError; older
        checkpoints are then untouched.
        """
        self._metrics.sync()
        self._checkpoints.save(step, states, values)
        self._manifest["checkpoint"] = step
        record(self.folder, self._manifest)
        self._checkpoints.prune(keep)

    def load_checkpoint(self) -> Checkpoint | None:
        """(step, states, values) of the newest whole checkpoint, or None. Passing over a damaged one is said."""
        found = self._checkpoints.load()
        recorded = self._manifest["checkpoint"]
        if recorded is not None and (found is None or found[0] < recorded):
            goes_on = f"the run goes on from step {found[0]}" if found else "none is left, so the run starts again"
            self._warn(f"The checkpoint of step {recorded} that the manifest records is lost: {goes_on}.")
        return found

    def save_role(self, name: str, state: RoleState) -> None:
        """Commits all that a role needs, as roles/NAME/: role.safetensors and role.json."""
        files = {"role.safetensors": state.tensors, "role.json": to_json(dict(state.values))}
        write_folder(self.folder / "roles" / name, files)

    def load_role(self, name: str) -> RoleState | None:
        """The role that was saved, or None. Raises StoreError for one that was altered."""
        folder = self.folder / "roles" / name
        if not folder.exists():
            return None
        if problem := damage(folder):
            raise StoreError(f"{folder} is damaged: {problem}.", remedy=f"Restore it, or run the stage {name} again.")
        values = json.loads((folder / "role.json").read_bytes())
        return RoleState(read_tensors(folder / "role.safetensors"), values)

    def save_adapter(self, name: str, adapter: Adapter) -> Path:
        """The folder models/NAME/, which now holds the adapter in PEFT's layout."""
        write_adapter(self.folder / "models" / name, adapter)
        return self.folder / "models" / name

    def load_adapter(self, name: str) -> Adapter | None:
        """The adapter that was saved, or None. Raises StoreError for one that was altered."""
        folder = self.folder / "models" / name
        return read_adapter(folder) if folder.exists() else None

    def _samples(self, stage: str, round: int) -> Journal:
        name = f"{stage}-{round}"
        if name not in self._journals:
            self._journals[name] = Journal(self.folder / "samples" / f"{name}.jsonl", durable=True)
        return self._journals[name]

    def _rankings(self) -> RankingsDB:
        if self._database is None:
            self._database = RankingsDB(URL.create("sqlite", database=str(self.folder / "rankings.db")))
        return self._database
