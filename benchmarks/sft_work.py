"""The work that `benchmarks/sft.py` gives to both sides: the recipe, its texts, and each step's batch of them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.schema import Recipe
from rlhf.chat import ChatTokenizer
from rlhf.conversations import Source, load_conversations
from rlhf.masks import make_texts
from rlhf.packing import Batch
from rlhf.rows import MicroBatch
from rlhf.sources import CHATTERBOT, read_items
from rlhf.stages.sft import ConversationData
from rlhf.text_stream import Example, examples_of

IGNORED = -100  # the label of a token that is not learned, by transformers' convention
LR = {"lora": 2e-4, "full": 2e-5}
DTYPE, SEED = "float32", 0
Lengths = tuple[int, int]  # tokens of the shortest and of the longest text that is used


@dataclass(frozen=True, slots=True)
class Work:
    """The steps of one run, the same for every repeat."""

    recipe: Recipe
    lengths: Lengths
    num_texts: int  # of that length, from the first on: an epoch
    is_packed: bool
    batches: tuple[Batch, ...]  # what ours trains on, step by step

    @property
    def num_tokens(self) -> list[int]:
        """Of each step."""
        return [sum(micro_batch.num_tokens for micro_batch in batch.micro_batches) for batch in self.batches]

    @property
    def num_targets(self) -> list[int]:
        """The learned tokens of each step."""
        return [batch.num_targets for batch in self.batches]

    def for_ours(self) -> dict[str, Any]:
        """What `our_sft.py` reads."""
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "lengths": self.lengths,
            "num_texts": self.num_texts,
            "num_steps": len(self.batches),
        }

    def for_trl(self) -> dict[str, Any]:
        """What `trl_sft.py` reads: the texts are those that ours trains on, in the same order of batches."""
        recipe, optimizer = self.recipe, self.recipe.sft.optimizer
        steps = [[text for m in batch.micro_batches for text in texts_of(m)] for batch in self.batches]
        return {
            "model": recipe.model.path,
            "dtype": recipe.model.dtype,
            "threads": recipe.cluster.threads,
            "rank": recipe.lora.rank if recipe.sft.train == "lora" else None,
            "alpha": recipe.lora.alpha,
            "optimizer": {
                "learning_rate": optimizer.lr,
                "adam_beta1": optimizer.betas[0],
                "adam_beta2": optimizer.betas[1],
                "adam_epsilon": optimizer.eps,
                "weight_decay": optimizer.weight_decay,
                "max_grad_norm": optimizer.max_grad_norm,
            },
            "seed": recipe.seed,
            "num_steps": len(steps),
            "batch_texts": recipe.sft.batch_texts,
            "packed_tokens": recipe.learner.micro_batch_tokens if self.is_packed else None,
            "texts": [text for step in steps for text in step],
            "num_first": len(steps[0]),
        }


def make_work(options: argparse.Namespace, method: str, layout: str, folder: Path) -> Work:
    """The work of one method (lora, full) in one layout.

    A step is one micro-batch. In `unpacked` it holds `--texts` texts, in `even` as many of nearly one length, in
    `packed` as many as always fit `--packed-tokens`.
    """
    recipe = _recipe(options, method, find_pairs(options.data, folder), folder)
    lengths = 1, options.max_text_tokens
    examples = load_examples(recipe, lengths)
    if layout == "even":
        lengths = _alike([len(ids) for ids, _ in examples], options.texts * options.steps)
        examples = load_examples(recipe, lengths)
    if layout == "packed":
        recipe = _filled(_with(recipe, 1, options.packed_tokens), examples, options.steps)
    else:
        recipe = _with(recipe, options.texts, options.texts * options.max_text_tokens)
    used = _used(recipe, examples, options.steps)
    batches = _batches(recipe, used, options.steps)
    assert all(len(batch.micro_batches) == 1 and batch.num_parts == recipe.sft.batch_texts for batch in batches)
    return Work(recipe, lengths, len(used), layout == "packed", batches)


def load_examples(recipe: Recipe, lengths: Lengths) -> list[Example]:
    """The texts to train on, as the stage `sft` makes them, of these lengths."""
    sources = [Source(source.path, source.weight) for source in recipe.sft.sources]
    conversations = load_conversations(sources, recipe.sft.held_out, recipe.sft.system)
    chat = ChatTokenizer(recipe.model.path)
    examples = examples_of(make_texts(conversations.train, chat, recipe.sft.max_text_tokens, recipe.sft.long).texts)
    low, high = lengths
    return [(ids, trained) for ids, trained in examples if low <= len(ids) <= high]


def data_of(recipe: Recipe, examples: Sequence[Example]) -> ConversationData:
    """What the stage `sft` trains on; nothing is held out."""
    return ConversationData(examples, (), recipe, ())


def find_pairs(data: str, folder: Path) -> str:
    """The file of conversations: `data` itself, or what a package holds, written into `folder`."""
    if not data.startswith(CHATTERBOT):
        return data
    rows = [
        {"prompt": item.prompt, "completion": item.extra["answer"]}
        for item in read_items(data)
        if item.prompt and item.extra.get("answer")
    ]
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def texts_of(micro_batch: MicroBatch) -> list[dict[str, list[int]]]:
    """The texts of a micro-batch one by one, as SFTTrainer takes texts that are tokenised already."""
    ids = micro_batch.token_ids[0].tolist()
    labels = [IGNORED] * len(ids)
    for place, target in zip(micro_batch.predict.tolist(), micro_batch.target_ids.tolist(), strict=True):
        labels[place + 1] = target
    texts: list[dict[str, list[int]]] = []
    first = 0
    for piece in micro_batch.pieces:
        last = first + piece.length
        texts.append({"input_ids": ids[first:last], "labels": labels[first:last]})
        first = last
    return texts


def _recipe(options: argparse.Namespace, method: str, pairs: str, folder: Path) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "sft",
            "seed": SEED,
            "runs": str(folder / "runs"),
            "stages": ["sft"],
            "model": {"path": str(options.model), "dtype": DTYPE},
            "lora": {"rank": options.rank, "alpha": 2 * options.rank},
            "sft": {
                "sources": [{"path": pairs}],
                "train": method,
                "held_out": 0.0,
                "max_text_tokens": options.max_text_tokens,
                "optimizer": {"lr": LR[method], "warmup_steps": 0, "schedule": "constant"},
                "evaluate_every": None,
            },
            "cluster": {"threads": options.threads},
            "tracker": {"mode": "disabled"},
        }
    )


def _with(recipe: Recipe, batch_texts: int, micro_batch_tokens: int) -> Recipe:
    sft = recipe.sft.model_copy(update={"batch_texts": batch_texts})
    learner = recipe.learner.model_copy(update={"micro_batch_tokens": micro_batch_tokens})
    return recipe.model_copy(update={"sft": sft, "learner": learner})


def _alike(lengths: Sequence[int], num: int) -> Lengths:
    """The narrowest range of lengths, relative to the longer end, that so many of them lie in."""
    ordered = sorted(lengths)
    ranges = zip(ordered, ordered[min(num, len(ordered)) - 1 :], strict=False)
    return min(ranges, key=lambda ends: ends[1] / ends[0])


def _filled(recipe: Recipe, examples: Sequence[Example], num_steps: int) -> Recipe:
    """With the most texts in a step that fit one micro-batch in every step."""
    room = recipe.learner.micro_batch_tokens
    most = room * len(examples) // sum(len(ids) for ids, _ in examples)
    for batch_texts in range(min(most, len(examples)), 0, -1):
        tried = _with(recipe, batch_texts, room)
        batches = _batches(tried, _used(tried, examples, num_steps), num_steps)
        if all(len(batch.micro_batches) == 1 for batch in batches):
            return tried
    sys.exit(f"--packed-tokens {room}: no text fits. Raise it to --max-text-tokens at least.")


def _used(recipe: Recipe, examples: Sequence[Example], num_steps: int) -> Sequence[Example]:
    """As many as the steps take, in whole batches: each has the same number of texts, and so can TRL's."""
    batch_texts = recipe.sft.batch_texts
    num_batches = min(num_steps, len(examples) // batch_texts)
    if not num_batches:
        sys.exit(f"--texts {batch_texts}: the data have {len(examples)}. Lower it, or give more with --data.")
    return examples[: num_batches * batch_texts]


def _batches(recipe: Recipe, examples: Sequence[Example], num_steps: int) -> tuple[Batch, ...]:
    stream = data_of(recipe, examples).stream()
    return tuple(stream.take() for _ in range(num_steps))
