"""A reference whose base is spread over two ranks: the logprobs of the whole one, and less memory on each rank."""

from __future__ import annotations

import copy
import ctypes
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from actors.base import Base
from actors.reference import Reference
from cluster.roles import make_reference
from cluster.worker import Site
from configs.schema import Recipe
from tests.actors.ranks import make_groups, own_mib, run_ranks
from tests.actors.test_continued_adapter import make_start
from tests.recipes import tiny_recipe

pytestmark = pytest.mark.engine

NUM_LAYERS = 6
M_MMAP_THRESHOLD = -3  # of mallopt(3)
TOLERANCE = 1e-5  # nats, of float32
Results = dict[str, Any]


def scenario(rank: int, world_size: int, model: Path) -> Results:
    """What the tests below look at; collective."""
    folder = model.parent
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)  # what is freed goes back at once, and is not measured
    return {
        "memory": {stage: _memory(_recipe(folder / "large", stage), rank, world_size) for stage in (3, 0)},
        "base": _compared(_recipe(model, 3), rank, world_size),
        "adapter": _compared(_recipe(model, 3, adapter_from=str(folder / "law")), rank, world_size),
    }


def _recipe(model: Path, stage: int, **changes: Any) -> Recipe:
    learner = {"zero_stage": stage, "micro_batch_tokens": 100}
    return tiny_recipe(model, model.parent, learner=learner, cluster={"placement": "separate"}, **changes)


def _compared(recipe: Recipe, rank: int, world_size: int) -> Results:
    """How a worker's reference differs from one on a whole base, where ranks have unequal work or none."""
    spread = make_reference(Site(rank, world_size, "cpu", 1), recipe)
    whole = Reference(Base(recipe.model, recipe.lora, seed=recipe.seed), recipe)
    work = [make_groups(5 if rank else 2, seed=rank), [] if rank else make_groups(3), make_groups(1, seed=2)]
    gaps: list[float] = []
    for groups in work:
        gaps.append(_gap(spread.logprobs(groups), whole.logprobs(groups)))
        gaps.append(_gap(spread.base_logprobs(groups, 0.7), whole.base_logprobs(groups, 0.7)))
    first = work[0]
    return {"gaps": gaps, "moved": _gap(whole.logprobs(first), whole.base_logprobs(first))}


def _gap(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max()) if ours.numel() else 0.0


def _memory(recipe: Recipe, rank: int, world_size: int) -> Results:
    """MiB of this process's own memory over what it had: at the fullest moment of a pass, and when three are done.

    Looked at in every layer, while its last weights are there; in the first pass, since DeepSpeed fetches ahead once it
    knows the order of the layers, and up to 5 * 10^7 numbers: more than there are here.
    """
    start, seen = own_mib(), [0.0]
    site = Site(rank, world_size, "cpu", 1)
    reference = make_reference(site, recipe)
    model = site.made["base"].model
    looks = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda *_: seen.append(own_mib() - start))
        for layer in model.model.layers
    ]
    reference.logprobs(make_groups(1))
    for look in looks:
        look.remove()
    for seed in (0, 1):
        reference.logprobs(make_groups(seed=seed))
    end = own_mib() - start
    whole = sum(4 * getattr(p, "ds_numel", p.numel()) for p in model.parameters()) / 2**20
    del reference, model, site
    gc.collect()
    return {"whole": whole, "peak": max(seen), "end": end, "seen": len(seen) - 1}


@pytest.fixture(scope="module")
def two(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Results]]:
    folder = tmp_path_factory.mktemp("spread_reference")
    model = folder / "tiny"
    model.symlink_to(tiny_model)
    make_start(tiny_model, folder / "law")
    large = copy.deepcopy(LlamaConfig.from_pretrained(tiny_model))
    large.hidden_size, large.intermediate_size, large.num_hidden_layers = 512, 2048, NUM_LAYERS
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(large, dtype=torch.bfloat16).save_pretrained(folder / "large")
    yield run_ranks(2, scenario, model, folder)


@pytest.mark.parametrize("start", ["base", "adapter"])
def test_a_spread_reference_says_what_a_whole_one_says(two: list[Results], start: str) -> None:
    for results in two:
        assert max(results[start]["gaps"]) < TOLERANCE
    moved = [results[start]["moved"] for results in two]
    assert min(moved) > 0.1 if start == "adapter" else moved == [0.0, 0.0]


def test_under_zero_3_no_rank_holds_the_base_whole(two: list[Results]) -> None:
    for results in two:
        spread, whole = results["memory"][3], results["memory"][0]
        base = whole["whole"]
        layer = base / NUM_LAYERS
        assert spread["seen"] >= NUM_LAYERS
        assert whole["peak"] > 0.9 * base, results["memory"]
        assert spread["peak"] < base / 2 + 2 * layer + 5, results["memory"]  # MiB that passes take anyhow
        assert spread["end"] < base / 2 + layer + 5, results["memory"]
