"""The loop of pretrain and sft, on a learner that only counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.schema import Recipe
from rlhf.checkpoints import Checkpoints
from rlhf.errors import StoreError
from rlhf.packing import Batch
from rlhf.records import RoleState
from rlhf.rows import MicroBatch
from rlhf.training import ROLE, Job, Opening, Place, Report, Samples, train

ALONE = Place(0, 1)


class CountingLearner:
    """Its one parameter is the number of updates; an update costs as many nats as there were updates before."""

    def __init__(self) -> None:
        self.updates = 0
        self.kept: list[bool] = []

    def step(self, micro_batches: Sequence[Any], loss: Callable[..., Any], global_count: float) -> dict[str, float]:
        self.updates += 1
        return {"nats": float(self.updates), "tokens": 7.0, "grad_norm": 1.0, "lr": 0.1}

    def run(self, micro_batches: Sequence[Any], forward: Callable[..., float]) -> list[float]:
        return [float(self.updates) for _ in micro_batches]

    def pad(self, micro_batches: Sequence[Any]) -> list[Any]:
        return list(micro_batches)

    def combine(self, reported: Mapping[str, float]) -> dict[str, float]:
        return dict(reported)

    def state(self, *, keep: bool = True) -> RoleState:
        self.kept.append(keep)
        return RoleState({"model.w": torch.tensor([float(self.updates)])}, {"updates": self.updates})

    def load_state(self, state: RoleState) -> None:
        self.updates = int(state.tensors["model.w"])


class CountingStream:
    """Counts the batches."""

    def __init__(self) -> None:
        self.taken = 0

    @property
    def epoch(self) -> float:
        return self.taken / 10

    def take(self, *, rank: int, world_size: int) -> Batch:
        self.taken += 1
        return Batch((), 2, 1)

    def state(self) -> dict[str, object]:
        return {"taken": self.taken}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.taken = state["taken"]


class NoData:
    """Nothing is held out."""

    prompts: Sequence[Opening] = (Opening("once", (1,)),)

    def stream(self) -> CountingStream:
        return CountingStream()

    def held_out(self, rank: int, world_size: int) -> list[MicroBatch]:
        return []

    def figures(self, nats: float, num_targets: float) -> dict[str, float]:
        return {}


def make_job(folder: Path, **changes: Any) -> Job:
    recipe = Recipe.model_validate(
        {"name": "x", "stages": ["sft"], "model": {"path": "m"}, "sft": {"sources": [{"path": "p"}]}}
    )
    job = Job(
        stage="sft",
        recipe=recipe,
        folder=folder,
        start=Path("m"),
        tokenizer=Path("m"),
        result=folder / "models" / "sft",
        data=NoData(),
        num_steps=6,
        num_sample_tokens=3,
        evaluate_every=None,
        save_every=2,
    )
    return replace(job, **changes)


def sample(openings: Sequence[Opening], num_tokens: int) -> Samples:
    return [(opening.text, "upon a time") for opening in openings]


def run(job: Job, stop_after: int = 100) -> tuple[bool, list[Report]]:
    """(whether it was done, what was reported)."""
    reports: list[Report] = []

    def tell(report: Report) -> bool:
        reports.append(report)
        return report.kind == "row" and report.step >= stop_after

    return train(job, CountingLearner(), None, ALONE, tell, sample), reports


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_first_rank_keeps_a_state_to_save(tmp_path: Path, rank: int):
    learner = CountingLearner()
    train(make_job(tmp_path), learner, None, Place(rank, 2), lambda report: False, sample)
    assert learner.kept == [rank == 0] * 3
    assert (tmp_path / "checkpoints" / "sft" / "step-6").is_dir() == (rank == 0)


def test_each_step_is_reported_with_the_loss_over_all_targets(tmp_path: Path):
    done, reports = run(make_job(tmp_path))
    rows = [report for report in reports if report.kind == "row"]
    assert done and [row.step for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row.metrics["sft/loss"] for row in rows] == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]
    assert {"sft/grad_norm", "sft/lr", "sft/epoch", "time/tokens_per_s"} <= rows[0].metrics.keys()


def test_checkpoints_are_told_after_they_are_written(tmp_path: Path):
    _, reports = run(make_job(tmp_path))
    assert [report.step for report in reports if report.kind == "saved"] == [2, 4, 6]
    assert Checkpoints(tmp_path / "checkpoints" / "sft", print).steps == [2, 4, 6]


def test_texts_are_written_at_each_evaluation_and_at_the_end(tmp_path: Path):
    _, reports = run(make_job(tmp_path, evaluate_every=4))
    written = {report.step: report.samples for report in reports if report.kind == "row" and report.samples}
    assert written == {4: [("once", "upon a time")], 6: [("once", "upon a time")]}


def test_a_killed_run_goes_on_from_the_newest_checkpoint_to_the_same_figures(tmp_path: Path):
    _, undisturbed = run(make_job(tmp_path / "a"))
    with pytest.raises(ZeroDivisionError):
        train(
            make_job(tmp_path / "b"), CountingLearner(), None, ALONE, lambda report: 1 // (5 - report.step) < 0, sample
        )
    done, reports = run(make_job(tmp_path / "b"))
    assert done and reports[0].step == 4 and [step for step, _ in reports[0].rows] == [1, 2, 3, 4]
    losses = {r.step: r.metrics["sft/loss"] for r in undisturbed if r.kind == "row"}
    assert {r.step: r.metrics["sft/loss"] for r in reports if r.kind == "row"} == {s: losses[s] for s in (5, 6)}


def test_a_stop_saves_what_is_done_and_the_next_call_goes_on(tmp_path: Path):
    done, reports = run(make_job(tmp_path), stop_after=3)
    assert not done and [report.kind for report in reports[-2:]] == ["row", "saved"] and reports[-1].step == 3
    done, reports = run(make_job(tmp_path))
    assert done and (reports[0].kind, reports[0].step) == ("start", 3)


def test_a_damaged_checkpoint_is_passed_over_and_said(tmp_path: Path):
    run(make_job(tmp_path))
    shard = tmp_path / "checkpoints" / "sft" / "step-6" / f"{ROLE}.safetensors"
    shard.write_bytes(shard.read_bytes()[:-3])
    _, reports = run(make_job(tmp_path))
    assert "damaged" in reports[0].text and reports[1].step == 4


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path):
    Checkpoints(tmp_path / "checkpoints" / "sft", print).save(2, {"policy": RoleState({}, {})}, {})
    with pytest.raises(StoreError, match="no position in the data"):
        run(make_job(tmp_path))
