"""Which model stands on which, and what a run trained last."""

from pathlib import Path
from typing import Any

import pytest

from configs.schema import Recipe
from rlhf.errors import StoreError
from rlhf.lineage import Trained, base_of, trained_last
from rlhf.store import RunStore
from tests.rlhf.runs import recipe

RUN = Path("runs/run")
PAIRS: dict[str, Any] = {"sft": {"sources": [{"path": "pairs.jsonl"}]}}
TEXT: dict[str, Any] = {"pretrain": {"sources": [{"path": "corpus.txt"}]}}


def of(*stages: str, **sections: Any) -> Recipe:
    return recipe(stages=stages, **PAIRS, **TEXT, **sections)


@pytest.mark.parametrize(
    ("made", "of_sft", "of_ppo"),
    [
        (of("ppo"), "m", "m"),
        (of("sft", "ppo"), "m", "runs/run/models/sft"),
        (of("sft", "ppo", adapter="law"), "m", "m"),
        (of("pretrain", "ppo"), "runs/run/models/base", "runs/run/models/base"),
        (of("pretrain", "sft", "ppo"), "runs/run/models/base", "runs/run/models/sft"),
        (of("pretrain", "sft", "ppo", adapter="law"), "runs/run/models/base", "runs/run/models/base"),
        (of("ppo", adapter="law"), "m", "m"),
    ],
)
def test_a_stage_stands_on_what_the_stages_before_it_left(made: Recipe, of_sft: str, of_ppo: str):
    assert base_of(RUN, made, "sft") == Path(of_sft)
    assert base_of(RUN, made) == base_of(RUN, made, "ppo") == Path(of_ppo)


def run_of(tmp_path: Path, made: Recipe, *done: str) -> Path:
    """A run with these stages done, and an empty folder for each model."""
    with RunStore.open(tmp_path, made) as store:
        for stage in done:
            store.finish(stage, {})
        for name in ("base", "sft", "law", "policy"):
            (store.folder / "models" / name).mkdir(parents=True)
        return store.folder


@pytest.mark.parametrize(
    ("adapter", "done", "stage", "model", "is_adapter", "base"),
    [
        ("law", ("pretrain", "sft", "ppo"), "ppo", "policy", True, "models/base"),
        ("law", ("pretrain", "sft", "sample"), "sft", "law", True, "models/base"),
        (None, ("pretrain", "sft", "ppo", "evaluate"), "ppo", "policy", True, "models/sft"),
        (None, ("pretrain", "sft"), "sft", "sft", False, "models/base"),
        (None, ("pretrain",), "pretrain", "base", False, "/m"),
    ],
)
def test_what_was_trained_last_is_that_of_the_last_training_stage_done(
    tmp_path: Path, adapter: str | None, done: tuple[str, ...], stage: str, model: str, is_adapter: bool, base: str
):
    made = of("pretrain", "sft", "ppo", adapter=adapter, model={"path": "/m"})
    folder = run_of(tmp_path, made, *done)
    assert trained_last(folder, made) == Trained(stage, folder / "models" / model, is_adapter, folder / base)


def test_a_model_that_was_made_from_nothing_has_no_base(tmp_path: Path):
    sizes = {"hidden_size": 64, "num_layers": 1, "num_heads": 1}
    nothing = recipe(stages=("pretrain",), model={}, pretrain={"sources": [{"path": "c.txt"}], "sizes": sizes})
    assert trained_last(run_of(tmp_path, nothing, "pretrain"), nothing).base is None


def test_a_run_that_trained_nothing_says_what_is_done(tmp_path: Path):
    folder = run_of(tmp_path, of("ppo"), "sample", "rank")
    with pytest.raises(
        StoreError, match=r"has trained no model yet\. Done are: sample, rank\. Run pretrain, sft or ppo"
    ):
        trained_last(folder, of("ppo"))


def test_a_model_that_is_lost_is_told(tmp_path: Path):
    folder = run_of(tmp_path, of("ppo"), "ppo")
    (folder / "models" / "policy").rmdir()
    with pytest.raises(StoreError, match="models/policy is gone, although ppo is done"):
        trained_last(folder, of("ppo"))
