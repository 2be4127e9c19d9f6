"""The run store: all that lasts of a run, in one folder that is consistent at every moment."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sqlalchemy import URL

from configs.schema import Recipe
from rlhf.adapters import read_adapter, write_adapter
from rlhf.checkpoints import Checkpoint, Checkpoints
from rlhf.copier import Copier
from rlhf.disk import damage, disk_errors, finite, tidy, to_json
from rlhf.errors import TenfoldError
from rlhf.events import Events
from rlhf.journal import Journal, group_from_row, group_to_row
from rlhf.kept_roles import read_role, write_role
from rlhf.lock import take_lock
from rlhf.manifest import (
    JOURNALS,
    Change,
    Manifest,
    end_session,
    now,
    open_manifest,
    record,
    resize,
    session,
    take_change,
)
from rlhf.rankings_db import RankingsDB
from rlhf.records import Adapter, AnswerGroup, Ranking, RoleState
from rlhf.rounds import key
from rlhf.saver import Saver
from rlhf.step_journal import StepJournal


class RunStore:
    """A run folder, held by one process at a time.

    runs/NAME/: recipe.yaml (resolved), manifest.json (stages done, newest checkpoints, W&B run id, how it ended),
    prompts.jsonl, metrics.jsonl, events.jsonl, samples/ (answers, a journal per stage and round), journal/ (what the
    steps since the newest checkpoint finished, phase by phase), rankings.db, checkpoints/STAGE/step-N/, roles/NAME/
    (all that a trained role needs), models/NAME/ (what others load). Only safetensors, JSON, YAML and SQLite are read:
    never a pickle.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        lock: int,
        warn: Callable[[str], None],
        recipe: Recipe,
        stages: Sequence[str] = (),
        change: Change | None = None,
    ) -> None:
        self.folder, self._change = folder, change
        self.events = Events(folder)
        self._manifest, self._lock, self._warn, self._config = manifest, lock, warn, recipe.checkpoints
        for part in (folder, folder / "models", folder / "roles", folder / "samples", folder / JOURNALS):
            tidy(part)
        self._metrics = Journal(folder / "metrics.jsonl", durable=False)
        self._journals: dict[str, Journal] = {}
        self._steps: dict[str, StepJournal] = {}
        self._checkpoints: dict[str, Checkpoints] = {}
        self._database: RankingsDB | None = None
        self._saver = Saver()
        self._copier = Copier(self._config.mirror, folder, warn, self.events)
        # A checkpoint that is lost here comes back from the mirror, before the mirror is made like this folder.
        self._copier.begin({f"checkpoints/{stage}/step-{step}" for stage, step in manifest["checkpoints"].items()})
        self._manifest["session"] = session(stages)
        self.events.add("start", pid=os.getpid())
        record(folder, manifest)

    @classmethod
    def open(
        cls,
        root: str | Path,
        recipe: Recipe,
        warn: Callable[[str], None] | None = None,
        *,
        stages: Sequence[str] = (),
        accept: Sequence[str] = (),
    ) -> Self:
        """The store of the recipe's run in the folder `root`: a new one, or the one that is there.

        `stages` are those that this process is asked for. `accept` names keys of the recipe that may differ from those
        that the run was begun with: `take_change` makes them the run's.

        Raises StoreError: the folder cannot be written, another process holds the run, the run was begun with
        another recipe (the differences are shown), or another version wrote it.
        """
        folder = Path(root) / recipe.name
        with disk_errors(folder, "made"):
            folder.mkdir(parents=True, exist_ok=True)
        lock = take_lock(folder)
        warn = warn or logging.getLogger("tenfold").warning
        try:
            manifest, change = open_manifest(folder, recipe, accept)
            return cls(folder, manifest, lock, warn, recipe, stages, change)
        except BaseException:
            os.close(lock)
            raise

    def take_change(self) -> None:
        """Makes the recipe that the run was opened with the run's own, once it is known to be of use.

        What was journaled of unfinished steps is dropped, unless only the cutting up of the work differs.
        """
        if self._change is None:
            return
        change, self._change = self._change, None
        assert not self._steps, "journals are opened after the change"
        take_change(self.folder, self._manifest, change)
        if change.lines:
            told = [f"  {line}" for line in change.lines]
            self._warn("\n".join(["From here on the run has another recipe:", *told]))

    def resize(self, recipe: Recipe) -> None:
        """Makes what this recipe says of the run's size the run's own."""
        resize(self.folder, self._manifest, recipe)

    def close(self, error: BaseException | None = None) -> None:
        """Commits what is being saved and lets another process open the run; `error` is what ended this session."""
        if self._lock < 0:
            return
        try:
            # What ended the session is told, not what it may have led to: a full disk fails more than once.
            with suppress(*(() if error is None else (TenfoldError,))):
                self.settle()
                self._metrics.sync()
                if self._database is not None:
                    self._database.close()
                self._end_session(error)
            self._copier.close(in_a_hurry=error is not None and not isinstance(error, Exception))
        finally:
            if not self._saver.busy:  # else the lock goes with the process: nobody may tidy what is being written
                os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(error)

    # Stages

    def done(self, stage: str, round: int = 0) -> bool:
        """Whether the stage was finished."""
        return key(stage, round) in self._manifest["stages"]

    def num_rounds(self, stage: str) -> int:
        """In how many rounds the stage was finished."""
        return next(round for round in itertools.count() if not self.done(stage, round))

    def results(self, stage: str, round: int = 0) -> dict[str, Any]:
        """What the finished stage reported; empty if it is not done."""
        results: Any = self._manifest["stages"].get(key(stage, round), {}).get("results", {})
        return dict(results)

    def finish(self, stage: str, results: Mapping[str, object], round: int = 0) -> None:
        """Records the stage as done, with its results as JSON holds them."""
        self.settle()
        self._metrics.sync()
        if stage == "ppo":
            self._manifest["stages"].pop("evaluate", None)  # it was of the policy before
        self._manifest["stages"][key(stage, round)] = {
            "finished": now(),
            "results": json.loads(to_json(finite(results))),
        }
        record(self.folder, self._manifest)
        self._copier.start()

    def reopen(self, *steps: tuple[str, int]) -> None:
        """Records stages (of rounds) as not done, all at once; checkpoints are kept, and they go on from the newest."""
        if done := [(stage, round) for stage, round in steps if self.done(stage, round)]:
            for stage, round in done:
                del self._manifest["stages"][key(stage, round)]
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

    def steps(self, stage: str) -> StepJournal:
        """What the stage's steps since its newest checkpoint finished, phase by phase."""
        if stage not in self._steps:
            self._steps[stage] = StepJournal(self.folder / JOURNALS / f"{stage}.jsonl")
        return self._steps[stage]

    def mirror(self) -> None:
        """Begins to bring the mirror up to date, where the run has one."""
        self._copier.start()

    # Checkpoints and models

    def save_checkpoint(
        self, stage: str, step: int, states: Mapping[str, RoleState], values: Mapping[str, object]
    ) -> None:
        """Begins to write the state after `step` steps of a stage, beside the work that goes on.

        `settle` commits it: records it in the manifest, and only then drops what it replaces. A process that dies in
        between leaves a whole checkpoint or none. States and values must not change meanwhile. `values` and the values
        of states are what JSON can hold; tuples come back as lists.

        Raises StoreError for the one before, if it could not be written, and where the disk has no room for this one;
        older checkpoints are then untouched.
        """
        self.settle()
        self._metrics.sync()
        checkpoints = self._checkpoints_of(stage)
        checkpoints.check_room(states)

        def write() -> None:
            with self.events.around(stage, step, "write"):
                checkpoints.save(step, states, values)

        to_json(dict(values))  # what JSON cannot hold is a mistake to be told here and now
        self._saver.start(write, lambda: self._commit(stage, step))

    def open_checkpoints(self, stage: str) -> None:
        """Ends what a dead process left half written; call it before others write checkpoints of this stage."""
        self._checkpoints_of(stage)

    def adopt_checkpoint(self, stage: str, step: int) -> None:
        """Commits a checkpoint that the stage's own workers have written, whole, into this folder."""
        self.settle()
        self._metrics.sync()
        self._commit(stage, step)

    def settle(self, *, wait: bool = True) -> float:
        """Seconds that writing took of a checkpoint that is committed now; 0 if there was none to commit.

        Without `wait`, one that is still being written is left for later. Raises StoreError if it could not be written.
        """
        if self._saver.idle or not (wait or self._saver.ready):
            return 0.0
        self._saver.wait()
        return self._saver.seconds

    @property
    def progress(self) -> str:
        """How far the run is: another text after a stage or a checkpoint was committed."""
        return to_json([sorted(self._manifest["stages"]), self._manifest["checkpoints"]]).decode()

    def rewind(self) -> None:
        """Commits what can be; the stage that was broken off can then be begun again, as in a new process."""
        self.settle()
        self._metrics.sync()
        self._steps.clear()  # read again, they hold what was finished

    def load_checkpoint(self, stage: str) -> Checkpoint | None:
        """(step, states, values) of the newest whole checkpoint, or None. Passing over a damaged one is said."""
        self.settle()
        found = self._checkpoints_of(stage).load()
        recorded = self._manifest["checkpoints"].get(stage)
        if recorded is not None and (found is None or found[0] < recorded):
            goes_on = f"goes on from step {found[0]}" if found else "starts again, since none is left"
            if self._manifest["accepted"]:
                self.steps(stage).clear()  # some of it may be of steps after a change that are now done before it
            self._warn(f"The checkpoint of step {recorded} that the manifest records is lost: {stage} {goes_on}.")
        if found is not None:
            self.steps(stage).drop_below(found[0])
        return found

    def save_role(self, name: str, state: RoleState) -> None:
        """Commits all that a role needs, as roles/NAME/: role.safetensors and role.json."""
        write_role(self.folder / "roles" / name, state)

    def load_role(self, name: str) -> RoleState | None:
        """The role that was saved, or None. Raises StoreError for one that was altered."""
        return read_role(self.folder / "roles" / name)

    def damage_of_role(self, name: str) -> str | None:
        """What is wrong with a role that was saved; None if every byte is as it was."""
        return damage(self.folder / "roles" / name)

    def save_adapter(self, name: str, adapter: Adapter) -> Path:
        """The folder models/NAME/, which now holds the adapter in PEFT's layout."""
        write_adapter(self.folder / "models" / name, adapter)
        return self.folder / "models" / name

    def load_adapter(self, name: str) -> Adapter | None:
        """The adapter that was saved, or None. Raises StoreError for one that was altered."""
        folder = self.folder / "models" / name
        return read_adapter(folder) if folder.exists() else None

    def _commit(self, stage: str, step: int) -> None:
        self._manifest["checkpoints"][stage] = step
        record(self.folder, self._manifest)
        self._checkpoints_of(stage).prune(self._config.keep, self._config.keep_every)
        self.steps(stage).drop_below(step)
        self.events.add("checkpoint", stage=stage, step=step)
        self._copier.start()

    def _end_session(self, error: BaseException | None) -> None:
        how = end_session(self._manifest, error)
        self.events.add("end", how=how)
        record(self.folder, self._manifest)

    def _checkpoints_of(self, stage: str) -> Checkpoints:
        if stage not in self._checkpoints:
            self._checkpoints[stage] = Checkpoints(self.folder / "checkpoints" / stage, self._warn)
        return self._checkpoints[stage]

    def _samples(self, stage: str, round: int) -> Journal:
        name = f"{stage}-{round}"
        if name not in self._journals:
            self._journals[name] = Journal(self.folder / "samples" / f"{name}.jsonl", durable=True)
        return self._journals[name]

    def _rankings(self) -> RankingsDB:
        if self._database is None:
            self._database = RankingsDB(URL.create("sqlite", database=str(self.folder / "rankings.db")))
        return self._database
