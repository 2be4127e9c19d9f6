"""Our side of `benchmarks/sft.py`: the steps of the stage `sft`, timed, in a process of its own and without Ray.

    python -m benchmarks.our_sft WORK.json

It does what a worker of the stage does (actors/model_trainer.py), in the loop of rlhf/training.py, up to the last step
and before the checkpoint that would follow. What was measured goes to the file that WORK.json names as `result`.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from actors.base import Base
from actors.learner import Learner
from benchmarks.sft_work import data_of, load_examples
from configs.schema import Recipe
from rlhf.training import Job, Opening, Place, Report, Samples, TextData, train

ADAPTER = "sft"


class Enough(Exception):
    """All steps are measured."""


class Clock:
    """Hears what the loop reports: what each step took from the end of the one before, its loss and its tokens."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.tokens: list[float] = []
        self._last = 0.0

    def __call__(self, report: Report) -> bool:
        """Whether the loop is to stop and save: never. Raises Enough after the last step."""
        now = time.perf_counter()
        if report.kind == "row":
            self.seconds.append(now - self._last)
            self.losses.append(report.metrics["sft/loss"])
            self.tokens.append(report.metrics["sft/num_tokens"])
            speed = self.tokens[-1] / self.seconds[-1]
            print(f"  ours: step {report.step}, loss {self.losses[-1]:.4f}, {speed:.0f} tokens/s", flush=True)
        elif report.kind == "warning":
            print(f"  ours: {report.text}", flush=True)
        if report.step == self.num_steps:
            raise Enough
        self._last = now
        return False


def main(work: dict[str, Any]) -> None:
    """Writes seconds, losses and tokens of each step, and the peak memory, to `work["result"]`."""
    recipe, num_steps = Recipe.model_validate(work["recipe"]), work["num_steps"]
    assert recipe.cluster.threads is not None
    torch.set_num_threads(recipe.cluster.threads)
    low, high = work["lengths"]
    data = data_of(recipe, load_examples(recipe, (low, high))[: work["num_texts"]])
    job = make_job(recipe, data, num_steps)
    clock = Clock(num_steps)
    with alone():
        base = Base(recipe.model, recipe.lora, seed=recipe.seed, device="cpu")
        if job.adapter is not None:
            base.attach(job.adapter)
        learner = Learner(
            base, job.adapter, None, recipe.sft.optimizer, recipe.learner, 0, 1, num_updates=job.num_steps
        )
        num_trained = sum(parameter.numel() for parameter in base.model.parameters() if parameter.requires_grad)
        with suppress(Enough):
            train(job, learner, base.model, Place(0, 1), clock, no_samples)
    measured = {
        "seconds": clock.seconds,
        "losses": clock.losses,
        "tokens": clock.tokens,
        "num_trained": num_trained,
        "peak_gib": peak_gib(),
    }
    Path(work["result"]).write_text(json.dumps(measured))


def make_job(recipe: Recipe, data: TextData, num_steps: int) -> Job:
    """One step more than is measured, since the last one would evaluate and save."""
    folder, model = Path(recipe.runs) / recipe.name, Path(recipe.model.path)
    return Job(
        stage="sft",
        recipe=recipe,
        folder=folder,
        start=model,
        tokenizer=model,
        adapter=ADAPTER if recipe.sft.train == "lora" else None,
        result=folder / "models" / "sft",
        data=data,
        num_steps=num_steps + 1,
        num_sample_tokens=1,
        evaluate_every=None,
        save_every=num_steps + 1,
    )


@contextmanager
def alone() -> Iterator[None]:
    """A process group of this process only."""
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            yield
        finally:
            torch.distributed.destroy_process_group()


def no_samples(openings: Sequence[Opening], num_tokens: int) -> Samples:
    """Nothing is written for people to see."""
    return []


def peak_gib() -> float:
    """The most memory that this process ever had resident."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(one.split()[1]) for one in lines if one.startswith("VmHWM:")) / 2**20


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
