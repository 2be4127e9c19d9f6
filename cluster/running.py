"""One stage run and recorded, and what is said when it is stopped."""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from configs.schema import Stage
from rlhf.ports import Console

if TYPE_CHECKING:
    from rlhf.stages.context import Context
    from rlhf.stages.model_context import ModelContext


def run_stage(stage: Stage, round: int, context: Context | ModelContext) -> None:
    """Runs one stage and records it as done, with its time and the peak of the memory of all processes."""
    from cluster.memory import PeakMemory

    began = time.perf_counter()
    with PeakMemory() as memory, context.store.events.around(stage, round, "stage"):
        results = importlib.import_module(f"rlhf.stages.{stage}").run(context)
    about = {"time_s": time.perf_counter() - began, "peak_memory_gib": memory.peak_gib}
    context.store.finish(stage, results | about, round)


@contextmanager
def stopping_is_said(console: Console) -> Iterator[None]:
    """Says that the run is being stopped, before the closing that takes a moment."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        console.say("stopping: closing the team (once more to leave at once)")
        raise
