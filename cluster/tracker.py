"""Where metrics go: the run store's metrics.jsonl, and Weights & Biases. The only file that imports wandb."""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cluster.segments import Row, Segment, mend, read_segments
from cluster.wandb_service import service_environment
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

    Each call of `log` is one row, with its stage and the stage's step; a table belongs to the row that was logged
    last. A row that is written again after a resume is the same row to W&B: where it stands there already, W&B keeps
    the first values and the first table, also if a recipe that was changed in between gives others. Rows of
    metrics.jsonl that W&B has lost, since a killed process had not written them, are logged to it before the next new
    one, without tables. So over all offline segments of the run each row stands exactly once.

    W&B's own step is the row's number in metrics.jsonl, or a higher one where a row before it was cut for good.
    """

    def __init__(
        self, recipe: Recipe, store: RunStore, console: Console, environ: Mapping[str, str] = os.environ
    ) -> None:
        self._store, self._console = store, console
        self._run: Any = None
        self._file = store.folder / "metrics.jsonl"
        self._num_rows, self._num_bytes = 0, -1  # of the file, as the last call of `log` left it
        self._standing: set[Row] = set()  # what W&B has
        self._taken: set[int] = set()  # W&B's steps of these
        self._last = 0  # W&B's step that was logged last in this process: it takes no lower one
        self._is_filled = False  # W&B has all rows of the file
        self._can_add = False  # a table to the row that was logged last
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
        """Writes one row to metrics.jsonl, and to W&B unless it stands there already."""
        is_as_left = self._size() == self._num_bytes
        self._store.log(stage, step, metrics)
        # Only a stage that begins cuts the file; any other time the number is known without reading it.
        self._num_rows = self._num_rows + 1 if is_as_left else self._count()
        self._num_bytes = self._size()
        if self._run is not None:
            with self._service():
                self._fill(self._num_rows - 1)
                self._send(self._num_rows, (stage, step), metrics)

    def table(self, stage: str, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Adds a table to the row that was logged last, unless W&B has that row from before.

        W&B only: the run store keeps the answers themselves.
        """
        if self._run is not None and rows and self._can_add:
            import wandb

            table = wandb.Table(columns=list(columns), data=[list(row) for row in rows])
            with self._service():
                self._run.log({name: table}, step=self._last)

    def close(self) -> None:
        """Ends the W&B run, which then has all rows of metrics.jsonl; a later start of the command goes on with it."""
        if self._run is not None:
            try:
                with self._service():
                    self._fill(self._count())
            finally:
                run, self._run = self._run, None
                if run is not None:
                    with self._service():
                        run.finish()

    @contextmanager
    def _service(self) -> Iterator[None]:
        """A block that asks W&B's service. If that was ended, as Ray ends all processes of a job, the run goes on."""
        try:
            yield
        except ConnectionError as error:
            self._run = None
            self._console.warn(
                f"W&B's service has ended ({error}); metrics.jsonl has all rows, and the next start of this run logs "
                "to W&B those that it lost"
            )

    def _send(self, number: int, row: Row, metrics: Mapping[str, float]) -> None:
        """Logs a row, the file's `number`-th, to W&B unless it stands there."""
        self._can_add = row not in self._standing
        if self._can_add:
            self._last = number if number > self._last and number not in self._taken else max(self._taken) + 1
            stage, step = row
            self._run.log({**metrics, "stage": stage, "step": step}, step=self._last)
            self._standing.add(row)
            self._taken.add(self._last)

    def _fill(self, num: int) -> None:
        """Logs those of the first `num` rows of the file that W&B does not have: once, since it has the later ones."""
        if not self._is_filled:
            self._is_filled = True
            for number, row in enumerate(self._rows()[:num], 1):
                key = row.pop("stage"), row.pop("step")
                self._send(number, key, {name: math.nan if value is None else value for name, value in row.items()})

    def _rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._file.read_bytes().splitlines()] if self._file.exists() else []

    def _count(self) -> int:
        if not self._file.exists():
            return 0
        with self._file.open("rb") as file:
            return sum(1 for _ in file)

    def _size(self) -> int:
        return self._file.stat().st_size if self._file.exists() else 0

    def _start(self, recipe: Recipe, run_id: str, mode: Mode) -> Any:
        with self._console.task("W&B"):
            segments = _segments(self._store.folder, run_id)
            for segment in segments:
                if segment.is_offline:
                    mend(segment)
            try:
                run = _init(recipe, self._store, run_id, mode)
            except Exception as error:  # wandb raises many kinds: no key, no network, no permission
                if recipe.tracker.mode == "online":
                    raise TrackerError(
                        f"W&B cannot be reached: {error}.",
                        limit="tracker.mode=online wants it.",
                        remedy="Check WANDB_API_KEY and the network, or set tracker.mode=offline.",
                    ) from error
                if mode == "offline" and isinstance(error, OSError):
                    raise TrackerError(
                        f"W&B cannot write to {self._store.folder}: {error}.",
                        remedy="Free some disk space, or set tracker.mode=disabled; metrics.jsonl has the metrics too.",
                    ) from error
                if mode == "offline":
                    raise
                self._console.warn(f"W&B cannot be reached ({error}); the run is kept offline")
                mode, run = "offline", _init(recipe, self._store, run_id, "offline")
        for segment in segments:
            # Online, W&B itself says how much it has of what was logged online.
            if segment.is_offline or mode == "offline":
                self._standing.update(segment.rows.values())
                self._taken.update(segment.rows)
        online = range(1, run.starting_step)
        self._standing.update((row["stage"], row["step"]) for row in self._rows()[: len(online)])
        self._taken.update(online)
        if mode == "offline":
            self.sync_command = sync_command(self._store.folder, run_id)
            self._place = run.settings.sync_dir
            self._console.say(f"W&B: kept offline in {self._place}; upload it with `{self.sync_command}`")
        else:
            self._place = run.url or ""
            self._console.say(f"W&B: {self._place}")
        return run


def sync_command(folder: Path, run_id: str) -> str:
    """What uploads the offline segments of a run: each start makes one, numbered where two began in one second.

    Those that were uploaded are left out, as wandb does by itself: a second time their rows would be added again.
    """
    return f"wandb sync {folder}/wandb/offline-run-*-{run_id}*"


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
    with service_environment():
        return _begin(recipe, store, run_id, mode)


def _begin(recipe: Recipe, store: RunStore, run_id: str, mode: Mode) -> Any:
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


def _segments(folder: Path, run_id: str) -> list[Segment]:
    from wandb.proto import wandb_internal_pb2

    proto: Any = wandb_internal_pb2  # chosen at import by the protobuf version, so that its names have no types
    return read_segments(folder, run_id, proto.Record.FromString)
