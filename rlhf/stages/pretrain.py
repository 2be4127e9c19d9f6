"""Pretraining: a decoder learns to continue raw text, until that is all it can do, but very well."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig

from configs.schema import Recipe
from rlhf.base_model import write_new_model
from rlhf.corpus import corpus_sources, sample_texts
from rlhf.errors import ModelError, RecipeError
from rlhf.packing import Batch, RowStream, one_pass
from rlhf.rows import MicroBatch
from rlhf.stages.model_context import ModelContext, follow
from rlhf.templates import check_vocabulary
from rlhf.token_cache import Indices, TokenCache, make_cache
from rlhf.tokenizer import frame, load_tokenizer, save_tokenizer, tokenizer_hash, train_tokenizer
from rlhf.training import Job, Opening

START, TOKENIZER = "start/pretrain", "tokenizer"


def run(context: ModelContext) -> dict[str, object]:
    """Held-out bits per byte at the first evaluation and at the end; the model is then models/base of the run."""
    recipe, folder = context.recipe, context.store.folder
    config = recipe.pretrain
    sources = corpus_sources(recipe)
    tokenizer = find_tokenizer(context)
    root = Path(config.cache) if config.cache else folder.parent / "token-cache"
    cache = make_cache(root, sources, tokenizer, console=context.console)
    start = starting_model(context, tokenizer)
    data = CorpusData(cache, recipe, openings(config.continuations, tokenizer))
    num_steps = config.num_steps or steps_of(data, config.epochs)
    job = Job(
        stage="pretrain",
        recipe=recipe,
        folder=folder,
        start=start,
        tokenizer=start,
        result=folder / "models" / "base",
        data=data,
        num_steps=num_steps,
        num_sample_tokens=config.continuation_tokens,
        evaluate_every=config.evaluate_every,
        save_every=config.save_every,
    )
    heard = follow(context, job, "loss")
    measured = [row["pretrain/bits_per_byte"] for row in context.store.metrics("pretrain") if has_bits(row)]
    return {
        "num_steps": num_steps,
        "num_tokens": num_steps * config.batch_rows * config.row_tokens,
        "num_documents": len(cache),
        "num_corpus_tokens": cache.num_tokens,
        "num_corpus_bytes": cache.num_bytes,
        "first_bits_per_byte": measured[0] if measured else None,
        "bits_per_byte": measured[-1] if measured else None,
        "loss": heard.figures.get("pretrain/loss"),
        "samples": heard.samples,
    }


@dataclass(frozen=True, slots=True)
class CorpusData:
    """`training.TextData` of a tokenised corpus."""

    cache: TokenCache
    recipe: Recipe
    prompts: Sequence[Opening]

    def stream(self) -> CorpusStream:
        """Full rows of the training documents."""
        config = self.recipe.pretrain
        indices = self.cache.weighted(self._split()[0], [source.weight for source in config.sources])
        rows = RowStream(self.cache, indices, row_tokens=config.row_tokens, seed=self.recipe.seed)
        rows_per_pass = max(1, self.recipe.learner.micro_batch_tokens // config.row_tokens)
        return CorpusStream(rows, config.batch_rows, rows_per_pass, len(indices))

    def held_out(self, rank: int, world_size: int) -> list[MicroBatch]:
        """This rank's rows of the held-out documents that are measured."""
        rows = one_pass(self.cache, self._measured(), self.recipe.pretrain.row_tokens)
        return [row for number, row in enumerate(rows) if number % world_size == rank]

    def figures(self, nats: float, num_targets: float) -> dict[str, float]:
        """Bits per byte of text, and nats per token."""
        _, num_bytes = self.cache.count(self._measured())
        return {"bits_per_byte": nats / math.log(2) / num_bytes, "held_out_loss": nats / num_targets}

    def num_train_tokens(self) -> int:
        """Tokens of an epoch."""
        indices = self.cache.weighted(self._split()[0], [source.weight for source in self.recipe.pretrain.sources])
        return self.cache.count(indices)[0]

    def _split(self) -> tuple[Indices, Indices]:
        return self.cache.split(self.recipe.pretrain.held_out)

    def _measured(self) -> Indices:
        """Held-out documents, evenly over all sources, of so many tokens as are wanted."""
        held_out = self._split()[1]
        if not len(held_out):
            return held_out
        num_tokens, _ = self.cache.count(held_out)
        keep = min(1.0, self.recipe.pretrain.evaluate_tokens / num_tokens)
        num = max(1, round(keep * len(held_out)))
        return held_out[np.linspace(0, len(held_out) - 1, num).astype(np.int64)]


class CorpusStream:
    """`training.Stream` of full rows."""

    def __init__(self, rows: RowStream, batch_rows: int, rows_per_pass: int, num_documents: int) -> None:
        self._rows, self._batch_rows, self._num_documents = rows, batch_rows, num_documents
        self._rows_per_pass = rows_per_pass

    @property
    def epoch(self) -> float:
        """Epochs that were taken so far."""
        state: dict[str, Any] = self._rows.state()
        return state["epoch"] + state["document"] / self._num_documents

    def take(self, *, rank: int, world_size: int) -> Batch:
        """The next batch."""
        return self._rows.take(self._batch_rows, rank=rank, world_size=world_size, rows_per_pass=self._rows_per_pass)

    def state(self) -> dict[str, object]:
        """The position."""
        return self._rows.state()

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state` was taken."""
        self._rows.load_state(state)


def find_tokenizer(context: ModelContext) -> Any:
    """The run's tokenizer: that of the model or the recipe, or one that is trained now and kept in the run folder."""
    config, path = context.recipe.pretrain, context.recipe.model.path
    own = context.store.folder / TOKENIZER
    if config.sizes is None:
        tokenizer = load_tokenizer(path)
        if config.tokenizer and tokenizer_hash(load_tokenizer(config.tokenizer)) != tokenizer_hash(tokenizer):
            raise ModelError(
                f"pretrain.tokenizer={config.tokenizer} is not the tokenizer of model.path={path}.",
                limit="A model goes on with the tokens that it knows.",
                remedy="Leave pretrain.tokenizer out, or train a new model from pretrain.sizes.",
            )
        return tokenizer
    if config.tokenizer:
        return load_tokenizer(config.tokenizer)
    if not own.exists():
        with context.console.task("train the tokenizer"):
            texts = sample_texts(corpus_sources(context.recipe), config.tokenizer_sample_bytes)
            save_tokenizer(train_tokenizer(texts, config.vocab_size, merges=config.merges), own)
    return load_tokenizer(own)


def starting_model(context: ModelContext, tokenizer: Any) -> Path:
    """The folder of the model to begin with: a new one of the recipe's sizes, or the recipe's model."""
    recipe = context.recipe
    if recipe.pretrain.sizes is None:
        config = AutoConfig.from_pretrained(recipe.model.path)
        check_vocabulary(tokenizer, config.vocab_size)
        context_tokens = getattr(config, "max_position_embeddings", None)
        if context_tokens and recipe.pretrain.row_tokens > context_tokens:
            raise RecipeError(
                f"pretrain.row_tokens={recipe.pretrain.row_tokens}.",
                limit=f"The model's context has {context_tokens} tokens.",
                remedy="Lower pretrain.row_tokens.",
            )
        return Path(recipe.model.path)
    folder = context.store.folder / START
    if not (folder / "config.json").exists():
        num = write_new_model(recipe.pretrain.sizes, tokenizer, folder, seed=recipe.seed)
        context.console.say(f"pretrain: a new model of {num / 1e6:.2f} million parameters")
    return folder


def openings(texts: Sequence[str], tokenizer: Any) -> tuple[Opening, ...]:
    """Beginnings of documents as the model has learned them."""
    bos = frame(tokenizer).bos
    before = () if bos is None else (bos,)
    made = [(text, (*before, *tokenizer(text, add_special_tokens=False)["input_ids"])) for text in texts]
    return tuple(Opening(text, ids) for text, ids in made if ids)


def steps_of(data: CorpusData, epochs: float) -> int:
    """Updates in so many epochs."""
    config = data.recipe.pretrain
    return max(1, math.ceil(epochs * data.num_train_tokens() / (config.batch_rows * config.row_tokens)))


def has_bits(row: Mapping[str, float]) -> bool:
    """Whether the row was measured on held-out text."""
    return "pretrain/bits_per_byte" in row
