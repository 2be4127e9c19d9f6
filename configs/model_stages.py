"""Keys of the stages that make a model: `pretrain`, from raw text, and `sft`, from conversations."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from configs.section import OptimizerConfig, Positive, Section

Weight = Annotated[float, Field(gt=0, le=1000)]
Part = Annotated[float, Field(ge=0, lt=1)]  # what is left is trained on
SERVED_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)  # by vLLM's kernels, on CPUs and GPUs alike
SAMPLE_LIMIT = 100_000_000


class CorpusSource(Section):
    """Raw text: files, and how a document is told from the next."""

    path: str  # .txt, .md, .jsonl, .parquet, the first three also .gz; globs allowed
    weight: Weight = 1.0  # how often an epoch sees its documents: 2.0 twice, 0.5 half of them, chosen by hash
    split: Literal["file", "paragraph", "line"] = "file"  # what a document of a text file is
    field: str = "text"  # the text of a JSONL or Parquet row


class ModelSizes(Section):
    """A decoder in Llama's layout, to be trained from nothing."""

    hidden_size: Positive
    num_layers: Positive
    num_heads: Positive
    num_key_value_heads: Positive | None = None  # None: as many as heads
    intermediate_size: Positive | None = None  # of the feed-forward layers; None: 8/3 of hidden_size, in steps of 64
    context_tokens: Positive = 1024  # the longest sequence that it is made for
    tie_embeddings: bool = True  # the output layer is the embedding
    rope_theta: Annotated[float, Field(gt=0)] = 10_000.0

    @model_validator(mode="after")
    def _can_be_served(self) -> Self:
        size, rest = divmod(self.hidden_size, self.num_heads)
        if rest or size not in SERVED_HEAD_SIZES:
            found = f"{self.hidden_size}/{self.num_heads}" if rest else str(size)
            raise ValueError(
                f"hidden_size={self.hidden_size} and num_heads={self.num_heads} give a head size of {found}, which "
                f"vLLM cannot serve; it serves {', '.join(map(str, SERVED_HEAD_SIZES))}"
            )
        if self.num_heads % (self.num_key_value_heads or 1):
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} does not divide num_heads={self.num_heads}"
            )
        return self


class PretrainConfig(Section):
    """Next-token prediction on raw text, from nothing (`sizes`) or from the model of `model.path`."""

    sources: tuple[CorpusSource, ...] = ()
    sizes: ModelSizes | None = None
    vocab_size: Positive = 32_000  # of the tokenizer that is trained
    merges: Literal["words", "characters"] = "words"  # what a token may be; characters: a Chinese one stands alone
    tokenizer: str | None = None  # a folder with one that is there; None: train one, or that of model.path
    tokenizer_sample_bytes: Annotated[int, Field(gt=0, le=SAMPLE_LIMIT)] = 32_000_000  # some 100 bytes of memory each
    cache: str | None = None  # the folder of tokenised corpora; None: token-cache in the folder of run folders
    held_out: Part = 0.01  # of the documents, for bits per byte
    epochs: Annotated[float, Field(gt=0)] = 1.0
    num_steps: Positive | None = None  # in place of epochs
    batch_rows: Positive = 32  # rows of an update, over all workers
    row_tokens: Annotated[int, Field(ge=2)] = 1024
    optimizer: OptimizerConfig = OptimizerConfig(lr=6e-4, weight_decay=0.1, warmup_steps=100, schedule="cosine")
    evaluate_every: Positive | None = 100  # steps
    evaluate_tokens: Positive = 100_000  # of the held-out documents
    continuations: tuple[str, ...] = ()  # beginnings of texts that the model goes on with at every evaluation
    continuation_tokens: Positive = 64
    save_every: Positive = 100  # steps


class ConversationSource(Section):
    """Files of conversations: messages, prompt and completion, or instruction, input and output."""

    path: str  # .jsonl, .jsonl.gz, .json or .parquet; globs allowed
    weight: Weight = 1.0  # how often an epoch sees its rows: 2.0 twice, 0.5 half of them, chosen by hash


class SFTConfig(Section):
    """Instruction alignment: the assistant's tokens of conversations are learned."""

    sources: tuple[ConversationSource, ...] = ()
    system: str | None = None  # a system message put before each conversation that has none
    template: str | None = None  # a named chat template, for a base without one
    train: Literal["full", "lora"] = "lora"
    held_out: Part = 0.05  # of the prompts
    max_text_tokens: Positive = 1024
    long: Literal["drop", "cut", "stop"] = "drop"  # what becomes of longer conversations
    epochs: Positive = 1
    batch_texts: Positive = 32  # conversations of an update, over all workers
    optimizer: OptimizerConfig = OptimizerConfig(lr=2e-4, warmup_steps=10, schedule="cosine")
    evaluate_every: Positive | None = 50  # steps
    evaluate_texts: Positive = 256  # held-out ones at most
    sampled_prompts: Annotated[int, Field(ge=0)] = 4  # held-out ones that are answered at every evaluation
    sample_tokens: Positive = 128
    save_every: Positive = 100  # steps
