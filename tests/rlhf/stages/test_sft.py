"""Instruction alignment up to the point where workers take over."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from configs.errors import ConfigError
from configs.load import make_recipe
from rlhf.chat import ChatTokenizer
from rlhf.errors import DataError, ModelError, RecipeError, StoreError
from rlhf.stages import sft
from rlhf.stages.context import StageLeft
from tests.rlhf.stages.crews import model_context, recipe_of
from tests.tiny import make_tiny_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path / "model")


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A base that has no chat template."""
    folder = make_tiny_model(tmp_path / "bare")
    (folder / "chat_template.jinja").unlink()
    return folder


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"Say {i}", "completion": f"It is {i}."} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipe(model: Path, pairs: Path, adapter: str | None = None, **keys: Any):
    section = {"sources": [{"path": str(pairs)}], "held_out": 0.2, "batch_texts": 4, "max_text_tokens": 64, **keys}
    return recipe_of(
        pairs.parent,
        stages=["sft"],
        model={"path": str(model), "dtype": "float32"},
        adapter=adapter,
        sft=section,
    )


def test_only_answers_and_their_ends_are_trained(model: Path, pairs: Path):
    with model_context(recipe(model, pairs)) as (context, crew):
        sft.run(context)
    data = crew.jobs[0].data
    assert isinstance(data, sft.ConversationData)
    chat = ChatTokenizer(model)
    for ids, trained in data.train:
        written = [int(token) for token, is_trained in zip(ids, trained, strict=True) if is_trained]
        assert chat.decode(written).startswith("It is ") and written[-1] in chat.eos_ids
        assert "Say" not in chat.decode(written)


def test_lora_is_merged_into_sft_and_a_named_adapter_is_kept_under_its_name(model: Path, pairs: Path):
    with model_context(recipe(model, pairs)) as (context, crew):
        sft.run(context)
    assert (crew.jobs[0].adapter, crew.jobs[0].result.name) == ("sft", "sft")
    named = recipe(model, pairs, "law").model_copy(update={"name": "named"})
    with model_context(named) as (context, crew):
        assert sft.run(context)["result"] == "law"
    assert (crew.jobs[0].adapter, crew.jobs[0].result.name) == ("law", "law")


def test_full_training_has_no_adapter(model: Path, pairs: Path):
    with model_context(recipe(model, pairs, train="full")) as (context, crew):
        sft.run(context)
    assert crew.jobs[0].adapter is None


def test_epochs_and_batches_make_the_steps(model: Path, pairs: Path):
    with model_context(recipe(model, pairs, epochs=3)) as (context, crew):
        results = sft.run(context)
    assert crew.jobs[0].num_steps == results["num_steps"] == 3 * -(-results["num_texts"] // 4)  # type: ignore[operator]


def test_a_stage_that_is_asked_to_leave_has_saved_and_is_not_done(model: Path, pairs: Path):
    with model_context(recipe(model, pairs, epochs=2)) as (context, crew):
        leaving = replace(context, is_to_leave=lambda: True)
        with pytest.raises(StageLeft):
            sft.run(leaving)
        assert crew.is_stopped and len(crew.jobs) == 1
        crew.is_stopped = False
        sft.run(context)
        assert len(crew.jobs) == 2


def test_held_out_prompts_are_answered_for_people_to_see(model: Path, pairs: Path):
    with model_context(recipe(model, pairs, sampled_prompts=2)) as (context, crew):
        sft.run(context)
    openings = crew.jobs[0].data.prompts
    chat = ChatTokenizer(model)
    assert len(openings) == 2 and openings[0].text.startswith("Say ")
    assert chat.decode(openings[0].token_ids).endswith(openings[0].text)


def test_a_base_without_template_is_refused_and_a_named_one_is_written_beside_it(bare: Path, pairs: Path):
    with model_context(recipe(bare, pairs)) as (context, _), pytest.raises(ModelError, match="has no chat template"):
        sft.run(context)
    again = recipe(bare, pairs, template="roles", train="full").model_copy(update={"name": "again"})
    with model_context(again) as (context, crew):
        sft.run(context)
    (job,) = crew.jobs
    assert job.start == bare and job.tokenizer != bare and job.num_embeddings is None
    assert AutoTokenizer.from_pretrained(job.tokenizer).chat_template
    assert not (bare / "chat_template.jinja").exists()


def test_new_tokens_of_a_template_need_full_training(bare: Path, pairs: Path):
    refused = recipe(bare, pairs, template="chatml")
    with model_context(refused) as (context, _), pytest.raises(ModelError, match="LoRA leaves the embeddings"):
        sft.run(context)
    whole = recipe(bare, pairs, template="chatml", train="full").model_copy(update={"name": "whole"})
    with model_context(whole) as (context, crew):
        sft.run(context)
    assert crew.jobs[0].num_embeddings == 264


def test_a_named_adapter_needs_a_base_with_a_template(bare: Path, pairs: Path):
    asked = recipe(bare, pairs, "law", template="plain")
    with model_context(asked) as (context, _), pytest.raises(RecipeError, match="leaves its base as it is"):
        sft.run(context)


def test_a_vocabulary_larger_than_the_embedding_is_refused(model: Path, pairs: Path):
    config = json.loads((model / "config.json").read_text()) | {"vocab_size": 200}
    (model / "config.json").write_text(json.dumps(config))
    asked = recipe(model, pairs)
    with (
        model_context(asked) as (context, _),
        pytest.raises(ModelError, match="has 262 tokens, and the model embeds 200"),
    ):
        sft.run(context)


def test_conversations_longer_than_the_limit_are_left_out_and_counted(model: Path, pairs: Path):
    pairs.write_text(pairs.read_text() + json.dumps({"prompt": "x" * 100, "completion": "y"}) + "\n")
    with model_context(recipe(model, pairs, held_out=0.0)) as (context, _):
        results = sft.run(context)
    assert results["num_dropped"] == 1 and results["num_texts"] == 20


def test_texts_longer_than_the_context_are_refused(model: Path, pairs: Path):
    asked = recipe(model, pairs, max_text_tokens=4096)
    with model_context(asked) as (context, _), pytest.raises(RecipeError, match="The model's context has 1024 tokens"):
        sft.run(context)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"role": "user", "content": "Hello"}]}, "no assistant turn"),
        ({"instruction": "a", "output": "b"}, "mixes formats"),
        ({"prompt": "a"}, "the format is not known"),
    ],
)
def test_a_row_that_is_of_no_use_is_named_by_file_and_line(model: Path, pairs: Path, row: Any, message: str):
    pairs.write_text(pairs.read_text() + json.dumps(row) + "\n")
    asked = recipe(model, pairs)
    with model_context(asked) as (context, _), pytest.raises(DataError, match=message) as error:
        sft.run(context)
    assert str(pairs) in str(error.value) and "21" in str(error.value)


def test_a_template_that_drops_the_system_message_is_refused(model: Path, pairs: Path):
    template = "{% for m in messages %}{% if m['role'] != 'system' %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"  # noqa: E501
    (model / "chat_template.jinja").write_text(template)
    asked = recipe(model, pairs, system="Be brief.")
    with model_context(asked) as (context, _), pytest.raises(ModelError, match="leaves out the system message"):
        sft.run(context)


def test_sft_of_a_run_that_pretrains_waits_for_its_model(model: Path, pairs: Path):
    tree = recipe(model, pairs).model_dump(mode="json")
    tree["stages"], tree["pretrain"]["sources"] = ["pretrain", "sft"], [{"path": str(pairs), "field": "prompt"}]
    with model_context(make_recipe(tree, "x")) as (context, _), pytest.raises(StoreError, match="has not run"):
        sft.run(context)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": "law", "sft": {"train": "full"}}, "a named adapter is LoRA"),
        ({"adapter": "policy"}, "that name is taken"),
        ({"sft": {"sources": []}}, "sft.sources is missing"),
    ],
)
def test_contradictions_are_refused(model: Path, pairs: Path, changes: dict[str, Any], message: str):
    tree = recipe(model, pairs).model_dump(mode="json")
    for key, value in changes.items():
        tree[key] = {**tree[key], **value} if isinstance(value, dict) else value
    with pytest.raises(ConfigError, match=message):
        make_recipe(tree, "x")
