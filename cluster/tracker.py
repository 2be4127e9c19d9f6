"""Where metrics go: the run store's metrics.jsonl, and Weights & Biases. The only file that imports wandb."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlhf.errors import TenfoldError
from rlhf.ports import Console

if TYPE_CHECKING:
    from configs.schema import Recipe, TrackerConfig
    from rlhf.store import RunStore

Mode = Literal["online", "offline", "disabled"]
ONLINE_S = 60  # for W&B to answer at the start


class TrackerError(TenfoldError):
    """W&B cannot be used as the recipe asks."""


class WandbTracker:
    """Metrics into the run store, and into one W&B run that goes on after a restart.

    Each call of `log` is one row, with its stage's step as `step`; a table belongs to the row that was logged last.
    W&B's own step is the row's number in metrics.jsonl, so that a row that is written again after a resume is the
    same row to W&B.
    """

    def __init__(
        self, recipe: Recipe, store: RunStore, console: Console, environ: Mapping[str, str] = os.environ
    ) -> None:
        self._store, self._console = store, console
        self._run: Any = None
        self._place = self.sync_command = ""
        mode = choose_mode(recipe.tracker, environ)
        if mode != "disabled":
            if store.wandb_run_id is None:
                store.wandb_run_id = uuid.uuid4().hex[:12]
            self._run = self._start(recipe, store.wandb_run_id, mode)

    @property
    def place(self) -> str:
        """Where the W&B run is: its address, or its folder; empty without one. Known after `close` too."""
        return self._place

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Writes one row to metrics.jsonl and to W&B."""
        self._store.log(stage, step, metrics)
        if self._run is not None:
            self._run.log({**metrics, "step": step}, step=self._num_rows())

    def table(self, stage: str, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Adds a table to the row that was logged last. W&B only: the run store keeps the answers themselves."""
        if self._run is not None and rows:
            import wandb

            table = wandb.Table(columns=list(columns), data=[list(row) for row in rows])
            self._run.log({name: table}, step=self._num_rows())

    def close(self) -> None:
        """Ends the W&B run; a later start of the command goes on with it."""
        if self._run is not None:
            self._run.finish()
            self._run = None

    def _num_rows(self) -> int:
        """Rows of metrics.jsonl: counted each time, since a resume cuts the file back."""
        with (self._store.folder / "metrics.jsonl").open("rb") as file:
            return sum(1 for _ in file)

    def _start(self, recipe: Recipe, run_id: str, mode: Mode) -> Any:
        with self._console.task("W&B"):
            try:
                run = _init(recipe, self._store, run_id, mode)
            except Exception as error:  # wandb raises many kinds: no key, no network, no permission
                if recipe.tracker.mode == "online":
                    raise TrackerError(
                        f"W&B cannot be reached: {error}.",
                        limit="tracker.mode=online wants it.",
                        remedy="Check WANDB_API_KEY and the network, or set tracker.mode=offline.",
                    ) from error
                if mode == "offline":
                    raise
                self._console.warn(f"W&B cannot be reached ({error}); the run is kept offline")
                mode, run = "offline", _init(recipe, self._store, run_id, "offline")
        if mode == "offline":
            self.sync_command = sync_command(self._store.folder, run_id)
            self._place = run.settings.sync_dir
            self._console.say(f"W&B: kept offline in {self._place}; upload it with `{self.sync_command}`")
        else:
            self._place = run.url or ""
            self._console.say(f"W&B: {self._place}")
        return run


def sync_command(folder: Path, run_id: str) -> str:
    """What uploads all offline segments of a run: each start makes one, numbered where two began in one second."""
    return f"wandb sync --include-synced {folder}/wandb/offline-run-*-{run_id}*"


def choose_mode(config: TrackerConfig, environ: Mapping[str, str]) -> Mode:
    """The mode of the recipe; for `auto` that of WANDB_MODE, else online with an API key and offline without one.

    Raises TrackerError: WANDB_MODE is not one of W&B's modes, or online is asked for without a key.
    """
    asked = config.mode if config.mode != "auto" else environ.get("WANDB_MODE", "auto")
    has_key = bool(environ.get("WANDB_API_KEY"))
    if asked == "auto":
        return "online" if has_key else "offline"
    if asked in ("disabled", "dryrun", "offline"):
        return "disabled" if asked == "disabled" else "offline"
    if asked not in ("online", "run", "shared"):
        raise TrackerError(
            f"WANDB_MODE={asked} is no mode of W&B.",
            limit="Modes are online, offline, disabled.",
            remedy="Set one of them.",
        )
    if not has_key:
        raise TrackerError(
            "W&B is to be online, but WANDB_API_KEY is not set.",
            remedy="Set it in the environment (never in a recipe), or use tracker.mode=offline.",
        )
    return "online"


def _init(recipe: Recipe, store: RunStore, run_id: str, mode: Mode) -> Any:
    import wandb

    run = wandb.init(
        project=recipe.tracker.project,
        entity=recipe.tracker.entity,
        name=recipe.name,
        id=run_id,
        resume="allow",
        mode=mode,
        dir=str(store.folder),
        config=recipe.model_dump(mode="json"),
        # Silent: the console says what there is to say, and prints by others would tear its bars.
        settings=wandb.Settings(silent=True, console="off", disable_code=True, init_timeout=ONLINE_S),
    )
    run.define_metric("*", step_metric="step")  # stages count their own steps
    return run
