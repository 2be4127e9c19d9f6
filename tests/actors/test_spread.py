"""A decoder that is spread over two ranks while it loads: the same model, and no rank holds it whole."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed.comm
import pytest
import torch
import torch.distributed
from deepspeed.runtime.zero import GatheredParameters
from transformers import AutoModelForCausalLM, LlamaConfig

from actors.base import Base
from actors.learner import Learner
from actors.load import load, load_spread
from configs.schema import Dtype, LearnerConfig, LoraConfig, ModelConfig, OptimizerConfig
from rlhf.errors import ModelError
from tests.actors.ranks import EPS, distance, make_groups, num_tokens, own_mib, run_ranks
from tests.actors.test_learner import cut, loss_of

pytestmark = pytest.mark.engine

LORA = LoraConfig(rank=4, alpha=8)
DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16")
MIB = 2**20
NUM_LAYERS = 12
Results = dict[str, Any]


def scenario(rank: int, world_size: int, model: Path) -> Results:
    """What the tests below look at; collective."""
    return {
        "memory": _memory(model.parent / "large"),  # first, while the process is small
        "loaded": {name: _loaded(model.parent / name, dtype) for name in (model.name, "tied") for dtype in DTYPES},
        "grown": _grown(model, rank),
        "merged": _merged(model, rank),
        "update": {stage: _update(model, rank, world_size, stage) for stage in (0, 3)},
        "logits": _logits(model, rank, world_size),
        "errors": [_error(model.parent / ("gone" if rank == 1 else model.name)), _error(_by_rank(model, rank))],
    }


def _config(model: Path, dtype: Dtype = "float32") -> ModelConfig:
    return ModelConfig(path=str(model), dtype=dtype)


def _loaded(folder: Path, dtype: Dtype) -> Results:
    """How the spread decoder differs from the whole one, and what lies here of it."""
    whole, spread = load(_config(folder, dtype)), load_spread(_config(folder, dtype))
    held = [p.numel() for p in spread.parameters()]
    shares = sum(p.ds_tensor.numel() for p in spread.parameters()) / sum(p.numel() for p in whole.parameters())
    same: list[bool] = []
    for (name, ours), (their_name, theirs) in zip(spread.named_parameters(), whole.named_parameters(), strict=True):
        with GatheredParameters([ours]):
            same.append(name == their_name and ours.dtype == theirs.dtype and torch.equal(ours, theirs))
    for ours, theirs in zip(spread.buffers(), whole.buffers(), strict=True):
        same.append(ours.dtype == theirs.dtype and torch.equal(ours, theirs))
    return {
        "same": all(same),
        "held": sum(held),
        "share": shares,
        "trained": any(p.requires_grad for p in spread.parameters()),
    }


def _grown(model: Path, rank: int) -> bool:
    """Whether new tokens begin as they do in a whole decoder."""
    whole, spread = (Base(_config(model), LORA, seed=0, spread=spread) for spread in (False, True))
    for base in (whole, spread):
        base.grow(270)
        base.attach("sft")
    learner = Learner(spread, "sft", None, OptimizerConfig(), LearnerConfig(zero_stage=3), rank, 2)
    ours, theirs = spread.merged("sft"), whole.merged("sft")
    said = [base.model.config.vocab_size for base in (whole, spread)] + [len(ours["lm_head.weight"])]
    del learner
    return said == [270] * 3 and distance(ours, theirs) == 0


def _merged(model: Path, rank: int) -> Results:
    whole, spread = (Base(_config(model), LORA, seed=0, spread=spread) for spread in (False, True))
    for base in (whole, spread):
        base.attach("sft")
        torch.manual_seed(1)
        for parameter in base.parameters("sft").values():
            parameter.data.normal_()
    Learner(spread, "sft", None, OptimizerConfig(), LearnerConfig(zero_stage=3), rank, 2)
    expected = whole.merged("sft")
    plain = load(_config(model)).state_dict()
    return {
        "kept": spread.merged("sft", keep=rank == 0),
        "expected": expected,
        "moved": distance(expected, {name: plain[name] for name in expected}),
    }


def _update(model: Path, rank: int, world_size: int, stage: int) -> Results:
    """A learner's state after two updates on a bfloat16 base."""
    base = Base(_config(model, "bfloat16"), LORA, seed=0, spread=stage == 3)
    base.attach("policy")
    adam = OptimizerConfig(lr=1e-2, eps=EPS)
    learner = Learner(base, "policy", None, adam, LearnerConfig(zero_stage=stage), rank, world_size)
    groups = make_groups()
    first = learner.tensors()
    mine = cut(groups, indices=range(6 * rank, 6 * rank + 6))
    metrics = [learner.step(mine, loss_of(base), num_tokens(groups)) for _ in range(2)]
    dtypes = {parameter.dtype for parameter in base.parameters("policy").values()}
    return {"first": first, "metrics": metrics, "tensors": learner.tensors(), "dtypes": dtypes}


def _logits(model: Path, rank: int, world_size: int) -> Results:
    """Rows of logits that exist at once, in passes of very different lengths on the ranks; of LoRA and of all."""
    seen: Results = {}
    for adapter in ("policy", None):
        base = Base(_config(model), LORA, seed=0, spread=True)
        if adapter:
            base.attach(adapter)
        head = base.model.get_output_embeddings()
        plain, rows = head.forward, []

        def forward(hidden: torch.Tensor, plain: Any = plain, rows: list[int] = rows) -> torch.Tensor:
            rows.append(len(hidden))
            return plain(hidden)

        head.forward = forward
        learner = Learner(base, adapter, None, OptimizerConfig(), LearnerConfig(zero_stage=3), rank, world_size)
        groups = make_groups(1 if rank else 8, num_answers=10)
        loss = loss_of(base, chunk=32)
        learner.step(learner.pad(cut(groups, max_tokens=100_000)), loss, 100)
        learner.run(cut(groups), lambda inside, loss=loss: loss(inside)[0])
        seen[adapter or "all"] = rows
    return seen


def _by_rank(model: Path, rank: int) -> Path:
    return model.parent / "tied" if rank == 1 else model


def _error(folder: Path) -> str:
    with pytest.raises(ModelError) as error:
        load_spread(_config(folder))
    return str(error.value)


def _memory(folder: Path) -> Results:
    """MiB of this process's own memory over the loading: at its peak, and when it is done.

    Looked at whenever a parameter is about to travel, when this process holds as much as it ever does.
    """
    peaks: list[float] = []
    plain = deepspeed.comm.broadcast

    def broadcast(*values: Any, **keywords: Any) -> Any:
        result = plain(*values, **keywords)
        peaks.append(own_mib())
        return result

    start = own_mib()
    deepspeed.comm.broadcast = broadcast
    try:
        model = load_spread(_config(folder, "bfloat16"))
    finally:
        deepspeed.comm.broadcast = plain
    num_bytes = sum(2 * p.ds_numel for p in model.parameters())
    return {"whole": num_bytes / MIB, "peak": max(peaks) - start, "end": own_mib() - start, "seen": len(peaks)}


def mean_distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The mean difference over all elements."""
    return float(torch.cat([(a[name] - b[name]).abs().flatten() for name in a]).mean())


@pytest.fixture(scope="module")
def two(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Results]]:
    folder = tmp_path_factory.mktemp("spread")
    model = folder / "tiny"
    model.symlink_to(tiny_model)
    settings = LlamaConfig.from_pretrained(tiny_model)
    for name, changes in {
        "tied": {"tie_word_embeddings": True},
        "large": {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": NUM_LAYERS, "vocab_size": 4096},
    }.items():
        other = copy.deepcopy(settings)
        for key, value in changes.items():
            setattr(other, key, value)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(other, dtype=torch.bfloat16).save_pretrained(folder / name)
    yield run_ranks(2, scenario, model, folder)


def test_a_spread_decoder_is_the_decoder_and_half_of_it_lies_on_each_rank(two: list[Results]) -> None:
    for results in two:
        for name, found in results["loaded"].items():
            assert found == {"same": True, "held": 0, "share": pytest.approx(0.5, abs=0.001), "trained": False}, name


def test_while_it_loads_a_rank_holds_its_share_and_no_more_than_a_layer_beside_it(two: list[Results]) -> None:
    for results in two:
        memory = results["memory"]
        assert memory["seen"] > 7 * NUM_LAYERS
        layer = memory["whole"] / NUM_LAYERS
        assert memory["peak"] < memory["whole"] / 2 + layer + 5, memory  # MiB that loading takes anyhow


def test_new_tokens_of_a_spread_decoder_begin_as_those_of_a_whole_one(two: list[Results]) -> None:
    assert [results["grown"] for results in two] == [True, True]


def test_a_spread_decoder_is_merged_layer_by_layer_and_rank_0_alone_keeps_it(two: list[Results]) -> None:
    merged = two[0]["merged"]
    assert merged["moved"] > 0.1
    assert distance(merged["kept"], merged["expected"]) == 0
    assert two[1]["merged"]["kept"] == {}


def test_on_a_bfloat16_base_adapters_are_float32_and_learn_what_they_learn_unspread(two: list[Results]) -> None:
    for results in two:
        whole, spread = results["update"][0], results["update"][3]
        assert distance(spread["first"], whole["first"]) == 0
        assert spread["dtypes"] == {torch.float32}
        # The first update is the same; its last bits may then round an activation of the second to another bfloat16.
        assert spread["metrics"][0] == pytest.approx(whole["metrics"][0], rel=1e-6)
        assert spread["metrics"][1] == pytest.approx(whole["metrics"][1], rel=5e-3)
        moved, apart = (
            mean_distance(whole["tensors"], whole["first"]),
            mean_distance(spread["tensors"], whole["tensors"]),
        )
        assert apart < 0.01 * moved


@pytest.mark.parametrize("trained", ["policy", "all"])
def test_logits_are_formed_in_chunks_and_ranks_may_have_different_numbers_of_them(
    two: list[Results], trained: str
) -> None:
    rows = [results["logits"][trained] for results in two]
    assert max(map(max, rows)) == 32
    assert len(rows[0]) > 2 * len(rows[1])


def test_an_error_of_one_rank_is_raised_on_all(two: list[Results]) -> None:
    for results in two:
        assert "no such folder" in results["errors"][0]
        assert "rank 1 finds another model" in results["errors"][1]
        assert "lm_head.weight" in results["errors"][1]
