"""The generator on a real vLLM engine, against a float32 Hugging Face forward of the same tiny model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from actors.base import Base
from actors.generator import Generator, cut
from actors.reference import Reference
from configs.schema import GeneratorConfig
from rlhf.adapters import starting_adapter, write_adapter
from rlhf.chat import ChatTokenizer
from rlhf.checksum import checksum
from rlhf.errors import DataError, RecipeError, SyncError
from rlhf.ports import Policy
from rlhf.records import Adapter, AnswerGroup, Message, Prompt, Sampling
from rlhf.sync import check_canary
from tests.actors.reference import LORA, largest_gap, make_adapter, merged
from tests.recipes import tiny_recipe

pytestmark = pytest.mark.vllm

CONTEXT = 256
TEN = Sampling(n=10, temperature=0.7, max_answer_tokens=12)
TOLERANCE = 2e-4  # nats; what float32 leaves between two implementations


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Iterator[Generator]:
    generator = Generator(
        str(tiny_model),
        GeneratorConfig(kv_cache_gib=0.03),
        LORA,
        dtype="float32",
        max_model_tokens=CONTEXT,
        threads=2,
    )
    yield generator
    generator.shutdown()


@pytest.fixture
def generator(engine: Generator, start: Adapter) -> Generator:
    """The engine, on the base."""
    engine.load_adapter(start)
    return engine


@pytest.fixture(scope="module")
def chat(tiny_model: Path) -> ChatTokenizer:
    return ChatTokenizer(tiny_model)


@pytest.fixture(scope="module")
def start(tiny_model: Path) -> Adapter:
    return make_adapter(tiny_model, version=0)


@pytest.fixture(scope="module")
def first(tiny_model: Path) -> Adapter:
    return make_adapter(tiny_model, version=1)


@pytest.fixture(scope="module")
def second(tiny_model: Path) -> Adapter:
    return make_adapter(tiny_model, version=2)


@pytest.fixture(scope="module")
def prompts(chat: ChatTokenizer) -> list[Prompt]:
    """One prompt that spans several KV blocks, and one within a block."""
    return [chat.prompt((Message("user", text),)) for text in ("Why is the sky blue? " * 4, "Hi")]


def tokens(groups: Sequence[AnswerGroup]) -> list[tuple[int, ...]]:
    return [answer.token_ids for group in groups for answer in group.answers]


def bias_logits(generator: Generator, bias: dict[int, float], monkeypatch: pytest.MonkeyPatch) -> None:
    real = generator._sampling_params

    def biased(sampling: Sampling, seed: int) -> Any:
        params = real(sampling, seed)
        params.logit_bias = bias
        return params

    monkeypatch.setattr(generator, "_sampling_params", biased)


def test_an_answer_record_is_plain(generator: Generator, prompts: list[Prompt]) -> None:
    """It crosses process borders: tuples of Python's own numbers."""
    answer = generator.answer(prompts[:1], TEN, seeds=[5])[0].answers[0]
    assert type(answer.token_ids) is tuple and {type(token) for token in answer.token_ids} == {int}
    assert len(answer.logprobs) == len(answer.token_ids) and {type(value) for value in answer.logprobs} == {float}


def test_logprobs_are_those_of_logits_over_temperature(
    generator: Generator, tiny_model: Path, prompts: list[Prompt]
) -> None:
    groups = generator.answer(prompts, TEN, seeds=[5, 50])
    reference = merged(tiny_model, 0)
    assert largest_gap(reference, groups, TEN.temperature) < TOLERANCE
    assert largest_gap(reference, groups, 1.0) > 0.1  # raw logprobs would show


def test_ten_answers_differ_and_come_again_with_the_same_seeds(generator: Generator, prompts: list[Prompt]) -> None:
    once = generator.answer(prompts, TEN, seeds=[5, 50])
    assert [group.prompt for group in once] == prompts
    assert all(len(set(tokens([group]))) == 10 for group in once)
    assert generator.answer(prompts, TEN, seeds=[5, 50]) == once
    assert generator.answer(prompts, TEN, seeds=[6, 50])[0] != once[0]


def test_a_replay_from_a_cold_cache_gives_the_same_bits(
    generator: Generator, first: Adapter, prompts: list[Prompt]
) -> None:
    generator.load_adapter(first)
    once = generator.answer(prompts, TEN, seeds=[5, 50])
    generator.load_adapter(first)
    assert generator.answer(prompts, TEN, seeds=[5, 50]) == once


def test_another_adapter_gives_other_answers_with_its_own_logprobs(
    generator: Generator, tiny_model: Path, first: Adapter, second: Adapter, prompts: list[Prompt]
) -> None:
    answers = {}
    for adapter in (first, second):
        generator.load_adapter(adapter)
        groups = generator.answer(prompts, TEN, seeds=[5, 50])
        assert largest_gap(merged(tiny_model, adapter.version), groups, TEN.temperature) < TOLERANCE
        answers[adapter.version] = tokens(groups)
    assert answers[1] != answers[2]


@pytest.mark.parametrize("emptied", [True, False])
def test_a_prefix_cached_under_the_old_adapter_is_not_used_for_the_new(
    generator: Generator,
    tiny_model: Path,
    first: Adapter,
    second: Adapter,
    prompts: list[Prompt],
    emptied: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two locks: the cache is emptied at every sync, and its key holds the adapter's version and checksum."""
    if not emptied:
        monkeypatch.setattr(Generator, "reset_prefix_cache", lambda self: None)
    generator.load_adapter(first)
    generator.answer(prompts, TEN, seeds=[5, 50])
    generator.load_adapter(replace(second, version=first.version))  # even under the old version
    groups = generator.answer(prompts, TEN, seeds=[5, 50])
    assert largest_gap(merged(tiny_model, 2), groups, TEN.temperature) < TOLERANCE
    assert largest_gap(merged(tiny_model, 1), groups, TEN.temperature) > 0.1


def test_answers_carry_the_version_that_wrote_them(
    generator: Generator, first: Adapter, second: Adapter, prompts: list[Prompt]
) -> None:
    for adapter in (second, first):
        generator.load_adapter(adapter)
        assert generator.version == adapter.version
        (group,) = generator.answer(prompts[:1], TEN, seeds=[5])
        assert {answer.version for answer in group.answers} == {adapter.version}


def test_the_start_is_the_base_and_an_adapter_that_is_continued_is_not(
    generator: Generator, tiny_model: Path, start: Adapter, first: Adapter, prompts: list[Prompt]
) -> None:
    base = generator.answer(prompts, TEN, seeds=[5, 50])
    assert base[0].answers[0].version == 0
    continued = replace(first, version=0)
    generator.load_adapter(continued)
    groups = generator.answer(prompts, TEN, seeds=[5, 50])
    assert groups[0].answers[0].version == 0
    assert largest_gap(merged(tiny_model, 1), groups, TEN.temperature) < TOLERANCE
    generator.load_adapter(start)
    assert generator.answer(prompts, TEN, seeds=[5, 50]) == base


def test_an_adapter_that_ppo_continues_answers_as_the_reference_says(
    generator: Generator, tiny_model: Path, first: Adapter, prompts: list[Prompt], tmp_path: Path
) -> None:
    write_adapter(tmp_path / "law", first)
    changes = {"lora": LORA.model_dump(), "sampling": {"temperature": TEN.temperature}}
    recipe = tiny_recipe(tiny_model, tmp_path, adapter_from=str(tmp_path / "law"), **changes)
    start = starting_adapter(recipe)
    assert start is not None and start.version == 0
    generator.load_adapter(start)
    groups = generator.answer(prompts, TEN, seeds=[5, 50])
    reference = Reference(Base(recipe.model, recipe.lora, seed=0), recipe)
    rows = [torch.tensor(answer.logprobs) for group in groups for answer in group.answers]
    sampled = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    assert float((reference.logprobs(groups) - sampled).abs().max()) < TOLERANCE
    assert float((reference.base_logprobs(groups) - sampled).abs().max()) > 0.1
    # At its first step the policy speaks as the reference does, and the canary proves that the engine does as well.
    canary = prompts[0].token_ids[:32]
    found = check_canary(cast(Policy, reference), generator, reference, canary, start.version, continues=True)
    assert found["sync/canary_checked"] == 1.0 and found["sync/canary_gap"] < TOLERANCE


@pytest.mark.parametrize("skipped", ["sync", "activation", "slot"])
def test_a_sync_that_is_silently_skipped_is_caught(
    generator: Generator,
    first: Adapter,
    second: Adapter,
    prompts: list[Prompt],
    skipped: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm.lora.model_manager import LRUCacheLoRAModelManager

    from actors.lora_worker import LoraWorker

    generator.load_adapter(first)
    match skipped:
        case "sync":
            monkeypatch.setattr(LoraWorker, "hold_adapter", lambda *_: None)
        case "activation":
            monkeypatch.setattr(LRUCacheLoRAModelManager, "activate_adapter", lambda *_: True)
        case "slot":
            real = LRUCacheLoRAModelManager.activate_adapter

            def activate_all_but_one_number(manager: Any, lora_id: int) -> bool:
                activated = real(manager, lora_id)
                manager.modules["model.layers.1.mlp.gate_up_proj"].lora_b_stacked[1][0, 0, 7, 3] += 1e-6
                return activated

            monkeypatch.setattr(LRUCacheLoRAModelManager, "activate_adapter", activate_all_but_one_number)
    with pytest.raises(SyncError, match="version 2 did not reach the engine"):
        generator.load_adapter(second)
    with pytest.raises(SyncError, match="the last sync failed"):
        generator.answer(prompts, TEN, seeds=[5, 50])


def test_an_adapter_that_does_not_match_the_base_stops_the_run(
    generator: Generator, first: Adapter, prompts: list[Prompt]
) -> None:
    tensors = dict(first.tensors)
    tensors["base_model.model.model.layers.7.mlp.up_proj.lora_A.weight"] = torch.zeros(4, 128)
    with pytest.raises(SyncError, match=r"unknown \(base_model.model.model.layers.7"):
        generator.load_adapter(replace(first, tensors=tensors, checksum=checksum(tensors)))
    with pytest.raises(SyncError, match="the last sync failed"):
        generator.answer(prompts, TEN, seeds=[5, 50])


def test_the_scalar_head_never_travels(generator: Generator, first: Adapter) -> None:
    tensors = {**first.tensors, "head.weight": torch.zeros(1, 128)}
    with pytest.raises(SyncError, match=r"unknown \(head\.weight\)"):
        generator.load_adapter(replace(first, tensors=tensors, checksum=checksum(tensors)))


def test_the_senders_tensors_are_left_alone(generator: Generator, first: Adapter) -> None:
    generator.load_adapter(first)
    assert checksum(first.tensors) == first.checksum


def test_canary_logprobs_tell_the_adapter_from_the_base(
    generator: Generator, tiny_model: Path, first: Adapter, prompts: list[Prompt]
) -> None:
    generator.load_adapter(first)
    ids = list(prompts[0].token_ids)
    for version, found in zip((1, 0), generator.canary_logprobs(ids), strict=True):
        with torch.no_grad():
            logprobs = merged(tiny_model, version)(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = logprobs[torch.arange(len(ids) - 1), ids[1:]]
        torch.testing.assert_close(torch.tensor(found), expected, atol=TOLERANCE, rtol=0)


def test_requests_with_and_without_the_adapter_may_share_a_batch(
    generator: Generator, tiny_model: Path, first: Adapter, prompts: list[Prompt]
) -> None:
    generator.load_adapter(first)
    params = [generator._sampling_params(TEN, seed) for seed in (5, 50)]
    mixed = generator._llm.generate(
        [{"prompt_token_ids": list(prompt.token_ids)} for prompt in prompts],
        params,
        use_tqdm=False,
        lora_request=[generator._request, None],
    )
    for prompt, output, version in zip(prompts, mixed, (1, 0), strict=True):
        group = AnswerGroup(prompt, tuple(generator._answer(each, version) for each in output.outputs))
        assert largest_gap(merged(tiny_model, version), [group], TEN.temperature) < TOLERANCE


def test_an_answer_that_is_cut_by_length_says_so(generator: Generator, prompts: list[Prompt]) -> None:
    groups = generator.answer(prompts, replace(TEN, max_answer_tokens=1), seeds=[5, 50])
    assert {len(ids) for ids in tokens(groups)} == {1}
    assert all(a.ended == "length" for g in groups for a in g.answers if a.token_ids != (258,))


@pytest.mark.parametrize("token", ["<|eos|>", "<|user|>"])
def test_an_answer_that_is_an_end_token_alone_works(
    generator: Generator, prompts: list[Prompt], token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end is a set of tokens: the tokenizer's own, and here one more."""
    (token_id,) = generator._chat.encode(token)[1:]
    monkeypatch.setattr(generator._chat, "eos_ids", generator._chat.eos_ids | {token_id})
    bias_logits(generator, {token_id: 100.0}, monkeypatch)
    for group in generator.answer(prompts, TEN, seeds=[5, 50]):
        for answer in group.answers:
            assert (answer.token_ids, answer.ended, answer.text) == ((token_id,), "eos", "")
            assert answer.logprobs == pytest.approx((0.0,), abs=1e-6)


def test_padding_does_not_end_an_answer(
    generator: Generator, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    (pad,) = generator._chat.encode("<|pad|>")[1:]
    bias_logits(generator, {pad: 100.0}, monkeypatch)
    (group,) = generator.answer(prompts[:1], TEN, seeds=[5])
    assert {(a.token_ids, a.ended) for a in group.answers} == {((pad,) * TEN.max_answer_tokens, "length")}


def test_text_is_the_tokens_without_special_ones(
    generator: Generator, prompts: list[Prompt], chat: ChatTokenizer
) -> None:
    (group,) = generator.answer(prompts[:1], replace(TEN, max_answer_tokens=40), seeds=[5])
    for answer in group.answers:
        assert answer.text == chat.decode(answer.token_ids)
        assert "<|" not in answer.text


def test_greedy_is_one_answer_of_the_likeliest_tokens(
    generator: Generator, tiny_model: Path, prompts: list[Prompt]
) -> None:
    greedy = Sampling(n=1, temperature=0.0, max_answer_tokens=8)
    groups = generator.answer(prompts, greedy, seeds=[5, 50])
    reference = merged(tiny_model, 0)
    for group in groups:
        (answer,) = group.answers
        with torch.no_grad():
            logits = reference(torch.tensor([[*group.prompt.token_ids, *answer.token_ids]])).logits[0]
        likeliest = logits[len(group.prompt.token_ids) - 1 : -1].argmax(-1)
        assert tuple(likeliest.tolist()) == answer.token_ids
    assert largest_gap(reference, groups, 1.0) < TOLERANCE
    assert generator.answer(prompts, greedy, seeds=[1, 2]) == groups


def test_a_prompt_that_leaves_no_room_for_an_answer_is_refused(generator: Generator, chat: ChatTokenizer) -> None:
    limit = CONTEXT - TEN.max_answer_tokens
    frame = len(chat.prompt((Message("user", ""),)).token_ids)
    fits, too_long = (chat.prompt((Message("user", "x" * (limit - frame + more)),)) for more in (0, 1))
    assert len(generator.answer([fits], TEN, seeds=[5])[0].answers) == 10
    with pytest.raises(DataError, match=rf"has {limit + 1} tokens.*leaves {limit}"):
        generator.answer([fits, too_long], TEN, seeds=[5, 50])


def test_a_context_beyond_the_bases_is_refused(tiny_model: Path) -> None:
    with pytest.raises(RecipeError, match=r"make 1025 tokens.*has 1024"):
        Generator(str(tiny_model), GeneratorConfig(), LORA, dtype="float32", max_model_tokens=1025)


def test_the_process_is_left_as_it_was(generator: Generator) -> None:
    torch.set_num_threads(1)
    assert torch.get_num_threads() == 1
    torch.set_num_threads(2)
    assert torch.get_num_threads() == 2
    assert "tcmalloc" not in os.environ.get("LD_PRELOAD", "") and "gomp" not in os.environ.get("LD_PRELOAD", "")


def test_sleeping_and_waking_change_nothing(generator: Generator, prompts: list[Prompt]) -> None:
    before = generator.answer(prompts, TEN, seeds=[5, 50])
    generator.sleep()
    generator.wake()
    assert generator.answer(prompts, TEN, seeds=[5, 50]) == before


def test_tokens_are_cut_after_the_first_end_token() -> None:
    assert cut([4, 2, 9, 2], frozenset({2, 9})) == ((4, 2), True)
    assert cut([4, 5], frozenset({2, 9})) == ((4, 5), False)
    assert cut([], frozenset({2})) == ((), False)


def test_more_prompt_tokens_than_the_engine_takes_in_a_step_are_answered_all_the_same(
    generator: Generator, chat: ChatTokenizer
) -> None:
    prompts = [chat.prompt((Message("user", f"{number} " + "Why is the sky blue? " * 9),)) for number in range(6)]
    sampling = Sampling(n=10, temperature=1.0, max_answer_tokens=2)
    assert sum(len(prompt.token_ids) for prompt in prompts) * sampling.n > 8192
    groups = generator.answer(prompts, sampling, range(6))
    assert [len(group.answers) for group in groups] == [10] * 6
