"""Pretraining up to the point where workers take over."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from configs.errors import ConfigError
from configs.load import make_recipe
from rlhf.errors import DataError, ModelError, RecipeError
from rlhf.stages import pretrain
from tests.rlhf.stages.crews import model_context, recipe_of
from tests.tiny import make_tiny_model

SIZES = {"hidden_size": 64, "num_layers": 1, "num_heads": 2, "context_tokens": 32}
WORDS = ("the", "sea", "the", "wind", "the", "stone", "the", "river", "the", "light")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    texts = [" ".join(WORDS[(i + j) % len(WORDS)] for j in range(12)) + f" {i}" for i in range(40)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def recipe(corpus: Path, model: Path | None = None, **keys: Any):
    fresh = {"sizes": SIZES, "vocab_size": 300} if model is None else {}
    section = {"sources": [{"path": str(corpus)}], "held_out": 0.2, "row_tokens": 32, "batch_rows": 2, **fresh, **keys}
    return recipe_of(
        corpus.parent,
        stages=["pretrain"],
        model={"path": str(model) if model else "", "dtype": "float32"},
        pretrain={key: value for key, value in section.items() if value is not None},
    )


def test_a_new_model_has_the_sizes_of_the_recipe_and_the_tokenizer_of_the_corpus(corpus: Path):
    with model_context(recipe(corpus)) as (context, crew):
        pretrain.run(context)
    (job,) = crew.jobs
    model: Any = AutoModelForCausalLM.from_pretrained(job.start)
    tokenizer: Any = AutoTokenizer.from_pretrained(job.start)
    assert (model.config.hidden_size, model.config.num_hidden_layers) == (64, 1)
    assert model.config.vocab_size == len(tokenizer) <= 300
    text = "the sea 床前明月光\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert job.result == context.store.folder / "models" / "base"


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(corpus: Path):
    def weights(name: str, seed: int) -> torch.Tensor:
        with model_context(recipe(corpus).model_copy(update={"name": name, "seed": seed})) as (context, crew):
            pretrain.run(context)
        return AutoModelForCausalLM.from_pretrained(crew.jobs[0].start).model.embed_tokens.weight

    assert torch.equal(weights("a", 1), weights("b", 1)) and not torch.equal(weights("a", 1), weights("c", 2))


def test_an_epoch_is_as_many_updates_as_its_tokens_fill(corpus: Path):
    with model_context(recipe(corpus, epochs=2.0)) as (context, crew):
        pretrain.run(context)
    data = crew.jobs[0].data
    assert isinstance(data, pretrain.CorpusData)
    assert crew.jobs[0].num_steps == math.ceil(2 * data.num_train_tokens() / 64)
    stream = data.stream()
    for _ in range(crew.jobs[0].num_steps):
        stream.take(rank=0, world_size=1)
    assert stream.epoch == pytest.approx(2.0, abs=0.15)


@pytest.mark.parametrize(("warmup", "warned"), [(5, True), (4, False)])
def test_a_warm_up_that_the_run_never_leaves_is_told(corpus: Path, warmup: int, warned: bool):
    asked = recipe(corpus, num_steps=5, optimizer={"warmup_steps": warmup})
    with model_context(asked) as (context, _):
        pretrain.run(context)
    said: list[str] = context.console.warned  # type: ignore[attr-defined]
    assert any("warmup_steps=5 and 5 steps" in text for text in said) == warned


def test_bits_per_byte_are_nats_over_the_bytes_of_the_held_out_texts(corpus: Path):
    with model_context(recipe(corpus)) as (context, crew):
        pretrain.run(context)
    data = crew.jobs[0].data
    assert isinstance(data, pretrain.CorpusData)
    tokenizer: Any = AutoTokenizer.from_pretrained(crew.jobs[0].start)
    _, held_out = data.cache.split(0.2)
    texts = "".join(tokenizer.decode(data.cache.document(int(i)), skip_special_tokens=True) for i in held_out)
    figures = data.figures(nats=8 * math.log(2), num_targets=4.0)
    assert figures["bits_per_byte"] == pytest.approx(8 / len(texts.encode()))
    assert figures["held_out_loss"] == pytest.approx(2 * math.log(2))


def test_ranks_share_the_held_out_rows(corpus: Path):
    with model_context(recipe(corpus)) as (context, crew):
        pretrain.run(context)
    data = crew.jobs[0].data
    whole, parts = data.held_out(0, 1), [*data.held_out(0, 2), *data.held_out(1, 2)]
    assert sorted(m.num_tokens for m in whole) == sorted(m.num_tokens for m in parts)


def test_results_hold_first_and_last_bits_per_byte_and_what_was_written(corpus: Path):
    with model_context(recipe(corpus)) as (context, crew):
        crew.figures = {"pretrain/bits_per_byte": 3.0, "pretrain/loss": 2.0}
        results = pretrain.run(context)
    assert results["first_bits_per_byte"] == results["bits_per_byte"] == 3.0 and results["loss"] == 2.0
    assert results["samples"] == [("once", "upon a time")] and results["num_documents"] == 40


def test_continuing_a_model_takes_its_own_tokenizer_and_weights(corpus: Path, tmp_path: Path):
    model = make_tiny_model(tmp_path / "model")
    with model_context(recipe(corpus, model)) as (context, crew):
        pretrain.run(context)
    assert crew.jobs[0].start == model
    stream = crew.jobs[0].data.stream()
    ids = stream.take(rank=0, world_size=1).micro_batches[0].token_ids
    assert int(ids.max()) < 262


def test_another_tokenizer_than_the_models_is_refused(corpus: Path, tmp_path: Path):
    model = make_tiny_model(tmp_path / "model")
    with model_context(recipe(corpus)) as (context, _):
        pretrain.run(context)
    other = context.store.folder / "tokenizer"
    again = recipe(corpus, model, tokenizer=str(other)).model_copy(update={"name": "other"})
    with model_context(again) as (context, _), pytest.raises(ModelError, match="is not the tokenizer of"):
        pretrain.run(context)


def test_rows_longer_than_the_context_of_a_model_are_refused(corpus: Path, tmp_path: Path):
    model = make_tiny_model(tmp_path / "model")
    again = recipe(corpus, model, row_tokens=2048)
    with model_context(again) as (context, _), pytest.raises(RecipeError, match="The model's context has 1024 tokens"):
        pretrain.run(context)


def test_an_empty_corpus_is_refused(tmp_path: Path):
    (tmp_path / "empty.txt").write_text("\n \n")
    again = recipe(tmp_path / "empty.txt")
    with model_context(again) as (context, _), pytest.raises(DataError, match="holds no document"):
        pretrain.run(context)


def test_a_binary_corpus_is_refused(tmp_path: Path):
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 4)
    again = recipe(tmp_path / "binary.txt")
    with model_context(again) as (context, _), pytest.raises(DataError, match="NUL byte"):
        pretrain.run(context)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sizes": {**SIZES, "num_heads": 4}}, "head size of 16, which vLLM cannot serve"),
        ({"sizes": {**SIZES, "num_heads": 3}}, "64/3"),
        ({"sizes": {**SIZES, "num_heads": 2, "num_key_value_heads": 3}}, "does not divide num_heads=2"),
        ({"row_tokens": 64}, "row_tokens=64 is more than"),
        ({"sources": []}, "pretrain.sources is missing"),
        ({"sizes": None}, "model.path is missing"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused_before_anything_starts(corpus: Path, change: Any, message: str):
    tree = recipe(corpus).model_dump(mode="json")
    tree["pretrain"] = {**tree["pretrain"], **change}
    with pytest.raises(ConfigError, match=message):
        make_recipe(tree, "recipe.yaml")


def test_a_model_and_sizes_are_two_models(corpus: Path):
    tree = recipe(corpus).model_dump(mode="json") | {"model": {"path": "somewhere"}}
    with pytest.raises(ConfigError, match="two models to start from"):
        make_recipe(tree, "recipe.yaml")


def test_a_weight_repeats_a_source(corpus: Path, tmp_path: Path):
    other = tmp_path / "other.txt"
    other.write_text("one two three four\n\nfive six seven eight\n")
    once = recipe(corpus)
    sources = [{"path": str(corpus)}, {"path": str(other), "weight": 3.0, "split": "paragraph"}]
    counts: list[int] = []
    for name, chosen in (("a", sources[:1]), ("b", sources)):
        tree: Any = once.model_dump(mode="json") | {"name": name}
        tree["pretrain"] |= {"sources": chosen, "held_out": 0.0, "evaluate_every": None}
        with model_context(make_recipe(tree, "x")) as (context, crew):
            pretrain.run(context)
        data = crew.jobs[0].data
        assert isinstance(data, pretrain.CorpusData)
        indices = data.cache.weighted(np.arange(len(data.cache)), [s.get("weight", 1.0) for s in chosen])
        counts.append(len(indices))
    assert counts == [40, 46]
