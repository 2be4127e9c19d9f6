"""Training a model on text: the loop that every worker of the stages `pretrain` and `sft` runs, all in step."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from configs.schema import Recipe
from rlhf.checkpoints import Checkpoints
from rlhf.errors import StoreError
from rlhf.packing import Batch
from rlhf.records import RoleState
from rlhf.rows import MicroBatch
from rlhf.text_loss import text_loss

ROLE = "model"  # under which a checkpoint holds the model
Loss = Callable[[MicroBatch], tuple[torch.Tensor, dict[str, float]]]
Rows = list[tuple[int, dict[str, float]]]  # step, metrics
KEPT_ROWS = 1000  # that a checkpoint carries, so that none is lost where the controller dies after it
Samples = list[tuple[str, str]]  # what the model was given, and what it wrote


class TextLearner(Protocol):
    """The optimizer of a model, or of an adapter on it; every call is collective."""

    def step(self, micro_batches: Sequence[MicroBatch | None], loss: Loss, global_count: float) -> dict[str, float]: ...

    def run(self, micro_batches: Sequence[MicroBatch], forward: Callable[[MicroBatch], float]) -> list[float]: ...

    def pad(self, micro_batches: Sequence[MicroBatch]) -> list[MicroBatch | None]: ...

    def combine(self, reported: Mapping[str, float]) -> dict[str, float]: ...

    def state(self, *, keep: bool = True) -> RoleState:
        """Without tensors on a rank that does not `keep` them."""
        ...

    def load_state(self, state: RoleState) -> None: ...


class Stream(Protocol):
    """Batches in an order that hangs on the seed alone."""

    def take(self, *, rank: int, world_size: int) -> Batch:
        """The next batch, of which it holds this rank's share."""
        ...

    @property
    def epoch(self) -> float:
        """Epochs that were taken so far."""
        ...

    def state(self) -> dict[str, object]: ...

    def load_state(self, state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True, slots=True)
class Opening:
    """The beginning of a text."""

    text: str  # as people see it
    token_ids: tuple[int, ...]  # as the model gets it


class TextData(Protocol):
    """What a stage trains on and measures with; it travels to the workers."""

    def stream(self) -> Stream: ...

    def held_out(self, rank: int, world_size: int) -> list[MicroBatch]:
        """This rank's share of what is measured; may be empty."""
        ...

    def figures(self, nats: float, num_targets: float) -> dict[str, float]:
        """What the held-out texts cost, `nats` over `num_targets` predicted tokens, as metrics."""
        ...

    @property
    def prompts(self) -> Sequence[Opening]:
        """What the model goes on with at every evaluation."""
        ...


@dataclass(frozen=True, slots=True)
class Job:
    """All that a worker needs to train."""

    stage: Literal["pretrain", "sft"]
    recipe: Recipe
    folder: Path  # of the run
    start: Path  # the model to begin with, in Hugging Face layout
    tokenizer: Path  # the folder of its tokenizer, which goes with the trained model
    result: Path  # where the trained model goes
    data: TextData
    num_steps: int
    num_sample_tokens: int
    evaluate_every: int | None
    save_every: int
    num_embeddings: int | None = None  # the embedding grows to so many tokens; None: it stays
    adapter: str | None = None  # LoRA under this name; None: the whole model
    adapter_from: Path | None = None  # an adapter to begin with


@dataclass(frozen=True, slots=True)
class Report:
    """What rank 0 tells the controller."""

    kind: Literal["start", "row", "saved", "warning", "failed", "written"]
    step: int = 0  # steps that are done
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    rows: Sequence[tuple[int, Mapping[str, float]]] = ()  # of a start: the newest that the checkpoint has
    samples: Samples = field(default_factory=Samples)
    text: str = ""
    error: Exception | None = None


Sample = Callable[[Sequence[Opening], int], Samples]  # (openings, at most so many tokens more)
Tell = Callable[[Report], bool]  # True: the controller wants the work to stop


@dataclass(frozen=True, slots=True)
class Place:
    """A worker's place among all."""

    rank: int
    world_size: int

    @property
    def leads(self) -> bool:
        return self.rank == 0


def train(
    job: Job,
    learner: TextLearner,
    model: Any,
    place: Place,
    tell: Tell,
    sample: Sample,
) -> bool:
    """Whether all steps are done; False if the controller asked to stop, and then a checkpoint is there.

    Collective: every rank runs it alike. What a checkpoint holds decides all that follows, bit for bit.

    Args:
        model: what `learner` trains, for its forward passes.
        tell: called on rank 0 alone.
        sample: collective, too; what it gives counts on rank 0.
    """
    stream = job.data.stream()
    checkpoints = Checkpoints(job.folder / "checkpoints" / job.stage, lambda text: _warn(tell, place, text))
    start, rows = _restore(checkpoints, learner, stream, place)
    if place.leads:
        tell(Report("start", start, rows=tuple(rows)))

    def loss(micro_batch: MicroBatch) -> tuple[torch.Tensor, dict[str, float]]:
        nats = text_loss(model, micro_batch)
        return nats, {"nats": float(nats.detach()), "tokens": float(micro_batch.num_tokens)}

    for step in range(start, job.num_steps):
        began = time.perf_counter()
        batch = stream.take(rank=place.rank, world_size=place.world_size)
        sums = learner.step(learner.pad(batch.micro_batches), loss, batch.num_targets)
        took = time.perf_counter() - began
        metrics = {
            "loss": sums["nats"] / batch.num_targets,
            "grad_norm": sums["grad_norm"],
            "lr": sums["lr"],
            "epoch": stream.epoch,
            "num_tokens": sums["tokens"],
            "time/update": took,
            "time/tokens_per_s": sums["tokens"] / took,
        }
        done, last = step + 1, step + 1 == job.num_steps
        samples: Samples = []
        if last or (job.evaluate_every and done % job.evaluate_every == 0):
            metrics |= measure(job.data, learner, model, place)
            samples = sample(job.data.prompts, job.num_sample_tokens)
        metrics = named(job.stage, metrics)
        rows = [*rows[1 - KEPT_ROWS :], (done, metrics)]
        stop = place.leads and tell(Report("row", done, metrics, samples=samples))
        stops = bool(learner.combine({"stop_max": float(stop)})["stop_max"])
        if last or stops or done % job.save_every == 0:
            _save(checkpoints, done, learner, {"stream": stream.state(), "rows": rows}, place)
            if place.leads:
                tell(Report("saved", done))
        if stops and not last:
            return False
    return True


def measure(data: TextData, learner: TextLearner, model: Any, place: Place) -> dict[str, float]:
    """What the held-out texts cost the model now; the same on every rank."""

    def nats(micro_batch: MicroBatch) -> float:
        return float(text_loss(model, micro_batch))

    mine = data.held_out(place.rank, place.world_size)
    began = time.perf_counter()
    costs = learner.run(mine, nats)
    sums = learner.combine({"nats": sum(costs), "targets": float(sum(len(m.predict) for m in mine))})
    if not sums["targets"]:
        return {}
    return data.figures(sums["nats"], sums["targets"]) | {"time/evaluate": time.perf_counter() - began}


def named(stage: str, metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics under the stage's prefix; `time/…` keeps its own."""
    return {name if name.startswith("time/") else f"{stage}/{name}": value for name, value in metrics.items()}


def _restore(checkpoints: Checkpoints, learner: TextLearner, stream: Stream, place: Place) -> tuple[int, Rows]:
    """(the steps that are done, the newest rows of them); learner and stream are as they were then."""
    found = checkpoints.load(mapped=True) if place.leads else None
    learner.combine({})  # rank 0 moves damaged ones aside before the others look
    found = found if place.leads else checkpoints.load(mapped=True)
    if found is None:
        return 0, []
    step, states, values = found
    position = values.get("stream")
    if not isinstance(position, dict) or ROLE not in states:
        raise StoreError(
            f"The checkpoint of step {step} holds no {ROLE} or no position in the data.",
            remedy="Delete it, so that the one before is used, or start a run with another name.",
        )
    learner.load_state(states[ROLE])
    stream.load_state(position)
    rows: Any = values.get("rows", [])
    return step, [(int(number), dict(metrics)) for number, metrics in rows]


def _save(
    checkpoints: Checkpoints, step: int, learner: TextLearner, values: Mapping[str, object], place: Place
) -> None:
    state = learner.state(keep=place.leads)  # a whole model and its moments: one copy, not one on each rank
    problem: Exception | None = None
    if place.leads:
        try:
            checkpoints.check_room({ROLE: state})
            checkpoints.save(step, {ROLE: state}, values)
        except StoreError as error:
            problem = error
    # All ranks hear of it: those that went on would wait for one that is gone.
    failed = learner.combine({"failed_max": float(problem is not None)})["failed_max"]
    if problem is not None:
        raise problem
    if failed:
        raise StoreError(f"Rank 0 could not save the checkpoint of step {step}.")


def _warn(tell: Tell, place: Place, text: str) -> None:
    if place.leads:
        tell(Report("warning", text=text))
