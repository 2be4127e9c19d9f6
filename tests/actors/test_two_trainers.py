"""Two workers of pretrain or sft write what one writes, whatever the ZeRO stage; checkpoints too, and they resume."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed
from safetensors.torch import load_file

from actors.model_trainer import work
from rlhf.training import Job, Place
from tests.actors.ranks import distance, run_ranks
from tests.actors.test_model_trainer import job

pytestmark = pytest.mark.engine

KINDS: dict[str, tuple[str | None, int]] = {
    "LoRA": ("sft", 0),
    "LoRA, spread": ("sft", 3),
    "whole, moments cut": (None, 2),
    "whole, spread": (None, 3),
}
Results = dict[str, Any]


def made(model: Path, folder: Path, adapter: str | None, stage: int) -> Job:
    plain = job(model, folder, adapter)
    values = plain.recipe.model_dump()
    values["learner"]["zero_stage"] = stage
    # The adapter's matrices get gradients that differ by noise; see EPS of the ranks.
    values["sft"]["optimizer"] |= {"lr": 1e-3, "eps": 1e-4}
    return replace(plain, recipe=type(plain.recipe).model_validate(values))


def scenario(rank: int, world_size: int, model: Path) -> Results:
    """Trains each kind to its end, and again from the checkpoint before the last."""
    again: Results = {}
    for name, (adapter, stage) in KINDS.items():
        folder = model.parent / name
        place, task = Place(rank, world_size), made(model, folder, adapter, stage)
        work(task, place, "cpu", lambda report: False)
        if rank == 0:
            first = _written(folder)
            shutil.rmtree(folder / "checkpoints" / "sft" / "step-4")
            shutil.rmtree(folder / "models")
        torch.distributed.barrier()
        work(task, place, "cpu", lambda report: False)
        if rank == 0:
            again[name] = distance(first, _written(folder))
    return again


def _written(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "models" / "sft" / "model.safetensors")


def _saved(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / "sft" / "step-4" / "model.safetensors")


@pytest.fixture(scope="module")
def two(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Results]]:
    folder = tmp_path_factory.mktemp("trainers")
    (folder / "model").symlink_to(tiny_model)
    yield folder, run_ranks(2, scenario, folder / "model", folder)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_two_workers_write_the_model_and_the_checkpoint_of_one(
    two: tuple[Path, Results], tiny_model: Path, process_group: None, tmp_path: Path, kind: str
) -> None:
    folder, _ = two
    work(made(tiny_model, tmp_path, KINDS[kind][0], 0), Place(0, 1), "cpu", lambda report: False)
    assert distance(_written(folder / kind), _written(tmp_path)) < 1e-5
    assert distance(_saved(folder / kind), _saved(tmp_path)) < 1e-5
    assert distance(_written(tmp_path), load_file(tiny_model / "model.safetensors")) > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_two_workers_that_resume_write_the_same_bits(two: tuple[Path, Results], kind: str) -> None:
    assert two[1][kind] == 0
