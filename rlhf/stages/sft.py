"""Instruction alignment: a model that continues learns to answer, from conversations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer

from configs.schema import Recipe
from rlhf.chat import ChatTokenizer
from rlhf.conversations import Conversations, conversation_sources, load_conversations
from rlhf.errors import DataError, ModelError, RecipeError
from rlhf.masks import TrainedTexts, make_texts
from rlhf.packing import pack
from rlhf.rows import MicroBatch
from rlhf.stages.model_context import ModelContext, follow
from rlhf.templates import check_template, check_vocabulary, refuse_untrained, write_template
from rlhf.text_stream import Example, TextStream, examples_of, share
from rlhf.training import Job, Opening

START = "start/sft"


def run(context: ModelContext) -> dict[str, object]:
    """Held-out loss at the first evaluation and at the end; the model, or the named adapter, is then in models/."""
    recipe, folder = context.recipe, context.store.folder
    config = recipe.sft
    sources = conversation_sources(recipe)
    words, num_embeddings = find_words(context)
    chat = ChatTokenizer(words)
    check_context(recipe, chat)
    with context.console.task("conversations"):
        conversations = load_conversations(sources, config.held_out, config.system)
        texts = make_texts(conversations.train, chat, config.max_text_tokens, config.long)
        held_out = held_out_texts(context, conversations, chat)
    tell(context, texts)
    data = ConversationData(
        examples_of(texts.texts),
        examples_of(held_out.texts),
        recipe,
        openings(conversations, chat, config.sampled_prompts),
    )
    num_steps = config.epochs * data.stream().batches_per_epoch
    job = Job(
        stage="sft",
        recipe=recipe,
        folder=folder,
        start=context.base,
        tokenizer=words,
        num_embeddings=num_embeddings,
        adapter=recipe.adapter or ("sft" if config.train == "lora" else None),
        adapter_from=Path(recipe.adapter_from) if recipe.adapter_from else None,
        result=folder / "models" / (recipe.adapter or "sft"),
        data=data,
        num_steps=num_steps,
        num_sample_tokens=config.sample_tokens,
        evaluate_every=config.evaluate_every,
        save_every=config.save_every,
    )
    heard = follow(context, job, "loss")
    losses = [row["sft/held_out_loss"] for row in context.store.metrics("sft") if "sft/held_out_loss" in row]
    return {
        "num_steps": num_steps,
        "num_texts": len(texts.texts),
        "num_held_out": len(held_out.texts),
        "num_duplicates": conversations.num_duplicates,
        "num_cut": texts.num_cut,
        "num_dropped": texts.num_dropped,
        "first_held_out_loss": losses[0] if losses else None,
        "held_out_loss": losses[-1] if losses else None,
        "loss": heard.figures.get("sft/loss"),
        "samples": heard.samples,
        "result": job.result.name,
    }


@dataclass(frozen=True, slots=True)
class ConversationData:
    """`training.TextData` of conversations."""

    train: Sequence[Example]
    measured: Sequence[Example]
    recipe: Recipe
    prompts: Sequence[Opening]

    def stream(self) -> TextStream:
        """Batches of whole conversations."""
        return TextStream(
            self.train, batch_texts=self.recipe.sft.batch_texts, max_tokens=self._room, seed=self.recipe.seed
        )

    def held_out(self, rank: int, world_size: int) -> list[MicroBatch]:
        """This rank's share of the held-out conversations."""
        longest = max((len(ids) for ids, _ in self.measured), default=0)
        return list(share(pack(self.measured, max(self._room, longest)), rank, world_size))

    def figures(self, nats: float, num_targets: float) -> dict[str, float]:
        """Nats per token of the answers."""
        return {"held_out_loss": nats / num_targets}

    @property
    def _room(self) -> int:
        return self.recipe.learner.micro_batch_tokens


def find_words(context: ModelContext) -> tuple[Path, int | None]:
    """(folder of tokenizer and chat template, tokens that the model must embed if it does not yet)."""
    recipe, base = context.recipe, context.base
    if not (base / "config.json").is_file():
        raise ModelError(
            f"sft: {base} holds no model in Hugging Face layout.",
            remedy="Set model.path to a folder with config.json; `tenfold import-model SOURCE DEST` makes one.",
        )
    if recipe.sft.template is None:
        check_vocabulary(AutoTokenizer.from_pretrained(str(base)), AutoConfig.from_pretrained(str(base)).vocab_size)
        return base, None
    check_template(recipe, ("sft",))
    words = context.store.folder / START
    words.parent.mkdir(parents=True, exist_ok=True)
    given = write_template(base, recipe.sft.template, words)
    refuse_untrained(recipe.sft.template, given, recipe.sft.train)
    return words, given.num_tokens if given.num_new_embeddings else None


def check_context(recipe: Recipe, chat: ChatTokenizer) -> None:
    """Raises RecipeError for texts that may be longer than the model's context."""
    if chat.context_tokens is not None and recipe.sft.max_text_tokens > chat.context_tokens:
        raise RecipeError(
            f"sft.max_text_tokens={recipe.sft.max_text_tokens}.",
            limit=f"The model's context has {chat.context_tokens} tokens.",
            remedy="Lower sft.max_text_tokens.",
        )


def openings(conversations: Conversations, chat: ChatTokenizer, num: int) -> tuple[Opening, ...]:
    """Prompts of held-out conversations, to be answered for people to see."""
    prompts = [chat.prompt(conversation.prompt) for conversation in conversations.held_out[:num]]
    return tuple(Opening(prompt.messages[-1].content, prompt.token_ids) for prompt in prompts)


def held_out_texts(context: ModelContext, conversations: Conversations, chat: ChatTokenizer) -> TrainedTexts:
    """What is measured: none where all held-out conversations are too long, which is no reason not to train."""
    config = context.recipe.sft
    chosen = conversations.held_out[: config.evaluate_texts]
    try:
        return make_texts(chosen, chat, config.max_text_tokens, "cut" if config.long == "cut" else "drop")
    except DataError as error:
        context.console.warn(f"sft: nothing is measured on held-out conversations. {error}")
        return TrainedTexts(())


def tell(context: ModelContext, texts: TrainedTexts) -> None:
    """Says what became of conversations that are too long."""
    if not texts.texts:
        raise DataError("sft: no conversation is left to train on.", remedy="Raise sft.max_text_tokens or bring more.")
    limit = context.recipe.sft.max_text_tokens
    for num, what in ((texts.num_cut, "cut"), (texts.num_dropped, "left out")):
        if num:
            context.console.warn(f"sft: {num} texts are longer than {limit} tokens and are {what}")
