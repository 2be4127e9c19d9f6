"""Which model of a run stands on which, and what the run trained last."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from configs.schema import Recipe
from rlhf.errors import StoreError
from rlhf.manifest import read_manifest


@dataclass(frozen=True, slots=True)
class Trained:
    """A model that a stage made."""

    stage: str
    folder: Path  # in Hugging Face layout, or in PEFT's
    is_adapter: bool
    base: Path | None  # what it was trained from; None for a model that was made from nothing


def base_of(folder: Path, recipe: Recipe, stage: Literal["sft", "ppo"] = "ppo") -> Path:
    """The folder of the model that a stage of the run in `folder` stands on; `ppo` speaks for all after `sft`.

    A named adapter of `sft` leaves the base as it is: later stages stand on what `sft` stood on.
    """
    if stage == "ppo" and "sft" in recipe.stages and recipe.adapter is None:
        return folder / "models" / "sft"
    if "pretrain" in recipe.stages:
        return folder / "models" / "base"
    return Path(recipe.model.path)


def trained_last(folder: Path, recipe: Recipe) -> Trained:
    """The last model of the run in `folder` whose stage is done. Raises StoreError where none is, or it is lost."""
    done, models = read_manifest(folder)["stages"], folder / "models"
    if "ppo" in done:
        trained = Trained("ppo", models / "policy", True, base_of(folder, recipe))
    elif "sft" in done:
        trained = Trained(
            "sft", models / (recipe.adapter or "sft"), bool(recipe.adapter), base_of(folder, recipe, "sft")
        )
    elif "pretrain" in done:
        started = Path(recipe.model.path) if recipe.model.path else None
        trained = Trained("pretrain", models / "base", False, started)
    else:
        raise StoreError(
            f"The run {folder} has trained no model yet.",
            limit=f"Done are: {', '.join(done) or 'no stages'}.",
            remedy="Run pretrain, sft or ppo to its end first.",
        )
    if not trained.folder.is_dir():
        raise StoreError(
            f"{trained.folder} is gone, although {trained.stage} is done.",
            remedy="Restore it from a copy (checkpoints.mirror keeps one), or run the stage again.",
        )
    return trained
