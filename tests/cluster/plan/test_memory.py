"""Parts of memory, worked by hand for a decoder of round numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.plan import memory
from cluster.plan.devices import GIB, GPUS, this_cpu
from cluster.plan.engine_memory import engine_fixed, engine_parts, engine_rank, smallest_cache
from cluster.plan.memory import CONTEXT, NCCL, activations, gib, learner_state, logits, trainer_parts
from cluster.plan.shape import Linear, Shape
from cluster.plan.work import Layout, Work
from tests.recipes import tiny_recipe

MILLION = 10**6
# 2 layers, 100 wide, 10 heads of 10 and 5 key heads, 200 inside; a vocabulary of 1,000.
SHAPE = Shape(
    name="round",
    num_parameters=10 * MILLION,
    num_layers=2,
    hidden=100,
    heads=10,
    key_heads=5,
    head_size=10,
    vocab=1000,
    context=4096,
    norms_per_layer=200,
    largest_module=100_000,
    linears=(
        Linear("q_proj", 100, 100, 2),
        Linear("k_proj", 100, 50, 2),
        Linear("v_proj", 100, 50, 2),
        Linear("o_proj", 100, 100, 2),
        Linear("gate_proj", 100, 200, 2),
        Linear("up_proj", 100, 200, 2),
        Linear("down_proj", 200, 100, 2),
    ),
)
ADAPTER = 2 * 4 * (200 + 150 + 150 + 200 + 300 + 300 + 300)  # at rank 4


@pytest.fixture
def work(tmp_path: Path) -> Any:
    def make(dtype: str = "bfloat16", device: str = "H100", **changes: Any) -> Work:
        recipe = tiny_recipe("m", tmp_path, **changes)
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"dtype": dtype})})
        where = this_cpu(16, 2) if device == "CPU" else GPUS[device]
        return Work.of(recipe, SHAPE, where)

    return make


def layout(**changes: Any) -> Layout:
    return replace(Layout("separate", 0, 256, False, 1, {}, 0.5), **changes)


@pytest.mark.parametrize(
    ("stage", "world", "adapters", "gradients", "optimizer"),
    [
        (0, 1, 4, 4, 8),
        (0, 4, 4, 4 + 4, 8),  # laid together for the sum
        (1, 4, 4, 4 + 8, 12 / 4),  # whole gradients; a bucket of twice all numbers; a copy and two moments of a part
        (2, 4, 4, 4 / 4 + 8, 12 / 4),
        (3, 4, 4 / 4, 8 / 4 + 8, 12 / 4),
    ],
)
def test_a_learners_state_by_zero_stage_in_bytes_a_number(
    stage: int, world: int, adapters: float, gradients: float, optimizer: float
) -> None:
    state = learner_state(MILLION, stage, world)
    assert (state.adapters, state.gradients, state.optimizer) == (
        adapters * MILLION, gradients * MILLION, optimizer * MILLION,
    )  # fmt: skip


def test_a_bucket_has_an_upper_limit() -> None:
    large = 10**9
    assert learner_state(large, 2, 2).gradients == 4 * large // 2 + 4 * (1 << 26)


def test_one_base_serves_all_roles_that_share_it_and_each_has_its_adapter_and_moments(work: Any) -> None:
    parts = trainer_parts(work(), layout(placement="shared"), ("policy", "reference", "reward", "critic"), 1)
    assert parts.weights == 2 * 10 * MILLION
    heads = 2 * 101  # scalar heads of reward and critic
    assert parts.adapters == 4 * (3 * ADAPTER + heads)
    assert parts.optimizer == 8 * (3 * ADAPTER + heads)
    assert parts.gradients == 4 * (ADAPTER + 101)  # roles take turns
    assert parts.overhead == CONTEXT
    assert trainer_parts(work(), layout(), ("policy",), 2).overhead == CONTEXT + NCCL


def test_a_reference_of_its_own_holds_the_base_and_trains_nothing(work: Any) -> None:
    parts = trainer_parts(work(), layout(), ("reference",), 1)
    assert (parts.weights, parts.adapters, parts.gradients, parts.optimizer) == (20 * MILLION, 0, 0, 0)
    assert parts.activations < trainer_parts(work(), layout(), ("policy",), 1).activations


@pytest.mark.parametrize(
    "changes",
    [
        {"adapter_from": "somewhere"},
        {"adapter": "law", "stages": ["sft", "ppo"], "sft": {"sources": [{"path": "x.jsonl"}]}},
    ],
)
def test_a_continued_adapter_lies_frozen_beside_the_reference(work: Any, changes: dict[str, Any]) -> None:
    made = work(**changes)
    assert trainer_parts(made, layout(), ("reference",), 4).adapters == 4 * ADAPTER
    assert trainer_parts(made, layout(zero_stage=3), ("reference",), 4).adapters == ADAPTER  # cut like the base


def test_zero_3_spreads_the_base_of_who_trains_and_of_the_reference(work: Any) -> None:
    spread = layout(zero_stage=3)
    for role in ("policy", "critic", "reference"):
        # A part, and what is gathered: at most 10^9 numbers.
        assert trainer_parts(work(), spread, (role,), 4).weights == 20 * MILLION // 4 + 20 * MILLION
        assert trainer_parts(work(), layout(zero_stage=2), (role,), 4).weights == 20 * MILLION
        assert trainer_parts(work(), spread, (role,), 1).weights == 20 * MILLION
    assert trainer_parts(work(), spread, ("reference",), 4).overhead == CONTEXT + NCCL  # it gathers over the ranks
    assert trainer_parts(work(), layout(), ("reference",), 4).overhead == CONTEXT


def test_a_layer_keeps_for_each_token_what_is_counted_by_hand(work: Any) -> None:
    norms = 4 * 200
    attention = 2 * (2 * 100 + 2 * 50) + 4 * 10
    feed_forward = 3 * 2 * 200
    # In bfloat16 each adapted layer keeps a float32 copy of its input; and what A gives, of rank 4.
    lora = 4 * (6 * 100 + 200) + 4 * 4 * 7
    assert memory.kept_per_token(work(), work().recipe.lora) == norms + attention + feed_forward + lora
    # In float32 layers that read the same share it.
    shared = 4 * (3 * 100 + 200) + 4 * 4 * 7
    in_float32 = norms + 4 * (2 * 100 + 2 * 50) + 40 + 3 * 4 * 200 + shared
    assert memory.kept_per_token(work("float32"), work().recipe.lora) == in_float32


def test_checkpointing_keeps_inputs_and_one_layer(work: Any) -> None:
    one = memory.kept_per_token(work(), work().recipe.lora)
    plain = activations(work(), layout(), 1000, trains=True)
    spared = activations(work(), layout(gradient_checkpointing=True), 1000, trains=True)
    assert plain - spared == 1000 * (one - 2 * 2 * 100)  # of the two layers one, but both inputs


def test_on_a_cpu_half_of_what_a_layer_frees_stays_as_holes_of_the_heap(work: Any) -> None:
    made = work("float32", device="CPU")
    norms, rotation, added = 2 * 200, 4 * (100 + 50), 2 * 100
    outputs = 100 + 50 + 50 + 100 + 200 + 200 + 100
    freed = memory.freed_per_token(made, made.recipe.lora)
    assert freed == 4 * (norms + rotation + added) + 3 * 4 * outputs
    spared = activations(made, layout(gradient_checkpointing=True), 1000, trains=True)
    both = activations(made, layout(), 1000, trains=True)
    one = memory.kept_per_token(made, made.recipe.lora) + freed // 2
    assert both - spared == 1000 * (one - 2 * 4 * 100)  # of the two layers one, but both inputs
    assert activations(made, layout(), 1000, trains=False) < 1000 * freed


def test_on_a_cpu_an_engine_holds_the_output_layer_twice(work: Any) -> None:
    assert engine_fixed(work("float32", device="CPU"), layout()).weights == 4 * (10 * MILLION + 1000 * 100)


def test_logits_are_of_a_chunk_of_positions(work: Any) -> None:
    made = work()  # 64 prompt tokens, ten answers of 8: 80 of 144 tokens are predicted
    assert logits(made, 144, ("policy",)) == 80 * 1000 * 18
    assert logits(made, 14_400, ("policy",)) == 256 * 1000 * 18
    assert logits(made, 14_400, ("critic",)) == 0
    assert logits(made, 14_400, ("reference",)) == 256 * 1000 * 10  # no entropies
    assert logits(work("float32"), 14_400, ("reference",)) == 256 * 1000 * 8
    assert logits(made, 14_400, ("reference", "policy")) == 256 * 1000 * 18


def test_a_pass_is_no_longer_than_the_work_and_no_shorter_than_one_answer(work: Any) -> None:
    made = work(ppo={"num_prompts": 2}, reward={"groups_per_batch": 1})
    assert made.group_tokens(256) == 64 + 80
    assert made.group_tokens(100) == 3 * 64 + 80  # four answers in a row of 100
    assert made.pass_tokens(16384, 1) == 2 * 144
    assert made.pass_tokens(16384, 2) == 144
    assert made.pass_tokens(10, 1) == 72


def test_an_engines_cache_is_what_its_share_leaves(work: Any) -> None:
    made = work(generator={"kv_cache_gib": None})
    parts = engine_parts(made, layout())
    assert parts.total == int(0.5 * made.device.usable)
    assert parts.weights == 20 * MILLION
    assert parts.adapters == 2 * SHAPE.adapter_parameters(made.recipe.lora, 8)  # rank 4 takes a slot of 8
    wide = engine_fixed(made, layout(tensor_parallel=2))
    assert wide.weights == 10 * MILLION


def test_a_cache_that_the_recipe_sets_is_taken_as_it_is(work: Any) -> None:
    assert engine_parts(work(generator={"kv_cache_gib": 2}), layout()).kv_cache == 2 * GIB


def test_the_smallest_cache_holds_a_prompt_and_its_answers_in_whole_blocks(work: Any) -> None:
    a_token = 2 * 2 * 50 * 2
    assert smallest_cache(work(), layout()) == (64 + 10 * 8 + 10 * 32) * a_token


def test_an_engines_rank_is_the_next_that_has_kernels() -> None:
    assert [engine_rank(rank) for rank in (1, 4, 8, 9, 33, 500)] == [1, 8, 8, 16, 64, 512]


def test_bytes_are_said_as_people_read_them() -> None:
    assert [gib(n * GIB) for n in (0, 0.01, 0.25, 15.21)] == ["0.0 GiB", "10 MiB", "0.25 GiB", "15.2 GiB"]
