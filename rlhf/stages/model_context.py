"""What a stage that makes a model is given, and how it follows the workers that train."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from configs.schema import Recipe
from rlhf.errors import StoreError
from rlhf.lineage import base_of
from rlhf.ports import Console, Tracker
from rlhf.stages.context import StageLeft, stay
from rlhf.store import RunStore
from rlhf.training import Job, Report, Samples

SHOWN = 60  # characters of a sample that the console shows


class Crew(Protocol):
    """Workers that train a model together."""

    def train(self, job: Job, heard: Callable[[Report], None]) -> None:
        """Returns when the job is done; `heard` is called here with what rank 0 reports, in order.

        Workers that die are started again, from the newest checkpoint. Raises what a worker raises.
        """
        ...

    def stop(self) -> None:
        """Lets the workers save after the step that they are at, and leave, so that `train` returns. From `heard`."""
        ...


@dataclass(frozen=True, slots=True)
class ModelContext:
    """A run as a stage that makes a model sees it."""

    recipe: Recipe
    crew: Crew
    store: RunStore
    tracker: Tracker
    console: Console
    round: int = 0  # of none: a model is made once
    is_to_leave: Callable[[], bool] = stay  # asked between two steps

    @property
    def base(self) -> Path:
        """The model that `sft` begins with. Raises StoreError where `pretrain` is to make it and has not."""
        if "pretrain" in self.recipe.stages and not self.store.done("pretrain"):
            raise StoreError(
                "sft: the recipe's model comes from `pretrain`, which has not run.",
                remedy="Run the stage `pretrain` first, or name a model (model.path) and leave pretrain out of stages.",
            )
        return base_of(self.store.folder, self.recipe, "sft")


@dataclass(slots=True)
class Followed:
    """What was heard of a training."""

    figures: dict[str, float] = field(default_factory=dict[str, float])  # the newest of each name
    samples: Samples = field(default_factory=Samples)  # the newest
    is_written: bool = False


def follow(context: ModelContext, job: Job, headline: str) -> Followed:
    """What was heard of the job, once it is done; `headline` names the figure that the console shows.

    Raises StageLeft once the workers have saved, where the stage is to leave before.
    """
    followed, stage = Followed(), job.stage
    optimizer = context.recipe.pretrain.optimizer if stage == "pretrain" else context.recipe.sft.optimizer
    if optimizer.warmup_steps >= job.num_steps:
        context.console.warn(
            f"{stage}: with {stage}.optimizer.warmup_steps={optimizer.warmup_steps} and {job.num_steps} steps in all "
            f"the rate never comes to lr={optimizer.lr:g}. Lower the warm-up, or train for longer."
        )
    context.store.open_checkpoints(stage)
    with context.console.task(stage, total=job.num_steps, unit="steps") as task:
        at, leaves = 0, False

        def heard(report: Report) -> None:
            nonlocal at, leaves
            if report.kind == "start":
                context.store.cut_metrics(stage, report.step)
                known = {row["step"] for row in context.store.metrics(stage)}
                for step, metrics in report.rows:
                    if step not in known:
                        context.tracker.log(stage, step, metrics)
                if report.step:
                    context.console.say(f"{stage}: going on from the checkpoint of step {report.step}")
                task.begin(report.step)  # the workers are there
                at = report.step
            elif report.kind == "row":
                context.tracker.log(stage, report.step, report.metrics)
                followed.figures |= report.metrics
                _show_samples(context, stage, report, followed)
                speed = report.metrics.get("time/tokens_per_s", math.nan)
                loss = report.metrics.get(f"{stage}/{headline}", math.nan)
                task.advance(report.step - at, f"{headline} {loss:.3f}, {speed:.0f} tokens/s")
                at = report.step
                if not leaves and at < job.num_steps and context.is_to_leave():
                    leaves = True
                    context.crew.stop()
            elif report.kind == "saved":
                context.store.adopt_checkpoint(stage, report.step)
            elif report.kind == "warning":
                context.console.warn(report.text)
            elif report.kind == "written":
                followed.is_written = True

        context.crew.train(job, heard)
    if leaves and not followed.is_written:
        raise StageLeft
    return followed


def _show_samples(context: ModelContext, stage: str, report: Report, followed: Followed) -> None:
    measured = [f"{name.partition('/')[2]} {report.metrics[name]:.4f}" for name in report.metrics if "held_out" in name]
    measured += [f"bits per byte {report.metrics[n]:.4f}" for n in report.metrics if n.endswith("/bits_per_byte")]
    if measured:
        context.console.say(f"{stage}: step {report.step}, {', '.join(measured)}")
    if report.samples:
        followed.samples = report.samples
        rows = [[report.step, given, written] for given, written in report.samples]
        context.tracker.table(stage, report.step, f"{stage}/samples", ["step", "given", "written"], rows)
        given, written = report.samples[0]
        context.console.say(f"{stage}: {_short(given)} ... {_short(written)}")


def _short(text: str) -> str:
    line = " / ".join(text.split("\n"))
    return line if len(line) <= SHOWN else f"{line[: SHOWN - 3]}..."
