"""The tokenizer of a base of one's own: trained on a sample of its corpus, or one that is there already."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rlhf.disk import disk_errors, write_folder
from rlhf.errors import ModelError, RecipeError

NUM_BYTES = 256
MIN_FREQUENCY = 2  # a pair that is seen once is not worth a token
# Qwen's rule (Qwen2 technical report, 2024): words with one mark or space before them, digits one by one, line ends
# apart. Merges never cross it.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The same, but each Chinese character is a piece of its own: for verse, whose form counts them.
HAN = r"\p{Han}|" + WORDS.replace(r"\p{L}+", r"[\p{L}&&[^\p{Han}]]+")
SPLITS = {"words": WORDS, "characters": HAN}


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Tokens that no text gives. BOS begins each document and each plain text, EOS ends it."""

    bos: str = "<|bos|>"
    eos: str = "<|eos|>"
    pad: str = "<|pad|>"
    roles: tuple[str, ...] = ("<|system|>", "<|user|>", "<|assistant|>")  # for a chat template

    @property
    def all(self) -> tuple[str, ...]:
        """All of them; the place of each is its id."""
        return (self.bos, self.eos, self.pad, *self.roles)


@dataclass(frozen=True, slots=True)
class Frame:
    """The ids around a document."""

    bos: int | None  # None for a tokenizer that puts nothing before a text
    eos: int


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    special: SpecialTokens | None = None,
    *,
    merges: Literal["words", "characters"] = "words",
) -> PreTrainedTokenizerFast:
    """A byte-level BPE (Sennrich et al. 2016; over bytes as in Radford et al. 2019) of at most `vocab_size` tokens.

    Every text of any language comes back as it was. The same texts give the same tokenizer. It has fewer tokens where
    the texts hold too few pairs that are seen twice. It puts BOS before plain text. Under `merges="characters"` no
    token spans two Chinese characters, or one and a mark.

    Raises RecipeError for a vocabulary that is too small for all bytes and special tokens, and for equal or empty
    special tokens.
    """
    special = special or SpecialTokens()
    _check(vocab_size, special)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLITS[merges]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=MIN_FREQUENCY,
        show_progress=False,
        special_tokens=list(special.all),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[special.bos, "$A"], special_tokens=[(special.bos, special.all.index(special.bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special.bos,
        eos_token=special.eos,
        pad_token=special.pad,
        clean_up_tokenization_spaces=False,  # decoding must not move a space
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    """`folder`, which now holds the tokenizer in Hugging Face layout, whole or not at all. Raises StoreError."""
    with tempfile.TemporaryDirectory() as made:
        tokenizer.save_pretrained(made)
        files = {path.name: path.read_bytes() for path in sorted(Path(made).iterdir())}
    with disk_errors(folder, "written"):
        folder.parent.mkdir(parents=True, exist_ok=True)
    write_folder(folder, files)
    return folder


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder in Hugging Face layout.

    Raises ModelError: none is there, it is not of the `tokenizers` library, or it names no token that ends a text.
    """
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(folder))
    except Exception as error:  # transformers raises almost anything for files that it cannot read
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ModelError(
            f"{folder} has no tokenizer that can be loaded: {reason}.",
            remedy="Name a folder that holds tokenizer.json and tokenizer_config.json.",
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ModelError(
            f"The tokenizer of {folder} is a {type(tokenizer).__name__}, written in Python.",
            limit="A corpus is tokenised by the `tokenizers` library.",
            remedy="Take a base that has a tokenizer.json.",
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"The tokenizer of {folder} names no end-of-sequence token, so a document could not end.",
            remedy="Set eos_token in its tokenizer_config.json.",
        )
    return tokenizer


def frame(tokenizer: PreTrainedTokenizerFast) -> Frame:
    """What stands around a document: EOS, and BOS where the tokenizer itself puts it before a text."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert isinstance(eos, int), "load_tokenizer refuses a tokenizer without EOS"
    starts = tokenizer("")["input_ids"][:1] == [bos]  # pyright: ignore[reportIndexIssue]
    return Frame(bos if starts and isinstance(bos, int) else None, eos)


def text_encoder(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """A copy that takes every text for plain text: `<|eos|>` written in a document is seven characters, no EOS."""
    encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    encoder.encode_special_tokens = True
    encoder.no_truncation()
    encoder.no_padding()
    return encoder


def num_ids(tokenizer: PreTrainedTokenizerFast) -> int:
    """One more than the largest id: what a model must embed at least."""
    return max(tokenizer.get_vocab().values()) + 1


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 (hex) of what decides how a document is tokenised, wherever the tokenizer comes from."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["truncation"] = content["padding"] = None  # settings of the last call, not of the tokenizer
    around = frame(tokenizer)
    plain = json.dumps([content, around.bos, around.eos], sort_keys=True)
    return hashlib.sha256(plain.encode()).hexdigest()


def _check(vocab_size: int, special: SpecialTokens) -> None:
    if len(set(special.all)) < len(special.all) or not all(special.all):
        raise RecipeError(
            f"The special tokens are {', '.join(map(repr, special.all))}.",
            limit="Each is a text of its own.",
            remedy="Give them different names.",
        )
    least = NUM_BYTES + len(special.all)
    if vocab_size < least:
        raise RecipeError(
            f"A vocabulary of {vocab_size} tokens is too small.",
            limit=f"All bytes and the special tokens are {NUM_BYTES} + {len(special.all)} = {least}.",
            remedy="Raise the vocabulary size; 4,000 is small, 32,000 usual.",
        )
