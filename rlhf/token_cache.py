"""A corpus as tokens on the disk: made once for these files and this tokenizer, then mapped into memory.

A folder holds tokens.bin, all documents one behind the other (uint16 or uint32, little-endian), index.bin, a RECORD
for each document, and manifest.json with checksums, which is written last.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from rlhf.corpus import Document, Source, corpus_fingerprint, read_documents
from rlhf.disk import (
    FORMAT,
    MANIFEST,
    TMP,
    check_format,
    damage,
    disk_errors,
    sync_folder,
    to_json,
    write_file,
)
from rlhf.errors import DataError, StoreError
from rlhf.ports import Console
from rlhf.tokenizer import Frame, frame, num_ids, text_encoder, tokenizer_hash

TOKENS, INDEX = "tokens.bin", "index.bin"
LAYOUT = 1  # raise it when the same files would be cut or tokenised otherwise
RECORD = np.dtype(
    [
        ("end", "<u8"),  # tokens up to its end, from the first document's start
        ("bytes", "<u4"),  # of its text
        ("source", "<u4"),  # index of its source
        ("side", "<u8"),  # from its text's hash: decides what is held out
        ("share", "<u8"),  # from its text's hash, independent of `side`: decides what a weight below 1 keeps
    ]
)
# Text that is tokenised at once, by the library's own threads: an Encoding takes more than 100 bytes for each token.
BATCH_BYTES, BATCH_DOCUMENTS = 2 << 20, 4096

Indices = NDArray[np.integer]  # of documents


class TokenCache:
    """The documents of a corpus as token ids, each with the ids around it (BOS where there is one, EOS)."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.folder = folder
        self.key = str(manifest["key"])  # of the corpus, the tokenizer and the layout
        self.num_ids = int(manifest["num_ids"])  # of the tokenizer's vocabulary
        # Views as plain arrays: a memmap takes microseconds for each slice.
        self._tokens = np.asarray(np.memmap(folder / TOKENS, np.dtype(manifest["dtype"]), "r"))
        self._index = np.asarray(np.memmap(folder / INDEX, RECORD, "r"))
        self._ends = self._index["end"]
        self.num_tokens = int(self._ends[-1])
        self.num_bytes = int(manifest["num_bytes"])  # of all texts

    @classmethod
    def open(cls, folder: Path) -> TokenCache:
        """The cache in `folder`; names and sizes are checked, `make_cache` checks the bytes too. Raises StoreError."""
        try:
            manifest = json.loads((folder / MANIFEST).read_bytes())
            check_format(folder / MANIFEST, int(manifest["format"]), FORMAT)
            for name, wanted in manifest["files"].items():
                if (folder / name).stat().st_size != wanted["bytes"]:
                    raise ValueError(f"{name} has not {wanted['bytes']} bytes")
            return cls(folder, manifest)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"{folder} is no complete token cache: {error}.",
                remedy="Delete the folder and start again: the cache is made anew.",
            ) from error

    def __reduce__(self) -> tuple[object, ...]:
        """Travels as its folder, not as its bytes: another process maps the same files."""
        return (TokenCache.open, (self.folder,))

    def __len__(self) -> int:
        return len(self._index)

    def document(self, index: int) -> NDArray[np.unsignedinteger]:
        """Token ids [T] of a document, T ≥ 2; a view of the file."""
        start = int(self._ends[index - 1]) if index else 0
        return self._tokens[start : int(self._ends[index])]

    def split(self, share: float) -> tuple[Indices, Indices]:
        """(train, held-out) indices, ascending: by a hash of the text, so that equal texts are on one side.

        A document keeps its side when others come or go. If `share` is above 0, neither side is empty.
        Raises DataError where all texts are equal, and so cannot be split.
        """
        side = self._index["side"]
        if share <= 0:
            return _narrow(np.arange(len(side))), _narrow(np.arange(0))
        smallest, largest = side.min(), side.max()
        if smallest == largest:
            raise DataError(
                f"The corpus holds 1 document, and a share of {share} of it is to be held out.",
                limit="At least 2 different documents are needed.",
                remedy="Let a document be a paragraph or a line (split), bring more text, or hold out nothing.",
            )
        held_out = side < np.uint64(min(int(share * 2**64), 2**64 - 1))
        held_out = (held_out | (side == smallest)) & (side != largest)
        return _narrow(np.flatnonzero(~held_out)), _narrow(np.flatnonzero(held_out))

    def weighted(self, indices: Indices, weights: Sequence[float]) -> Indices:
        """`indices`, each as often as its source's weight says, equal ones side by side.

        2.5 is twice, and three times for the half of the documents that a hash chooses. Raises DataError if none is
        left.
        """
        whole = np.floor(weights).astype(np.int64)
        bound = ((np.asarray(weights, np.float64) - whole) * 2.0**64).astype(np.uint64)
        source = self._index["source"][indices]
        kept = np.repeat(indices, whole[source] + (self._index["share"][indices] < bound[source]))
        if len(indices) and not len(kept):
            raise DataError(
                f"With the weights {', '.join(map(str, weights))} no document of {len(indices)} is left.",
                limit="A weight below 1 keeps such a share of a source's documents.",
                remedy="Raise the weights.",
            )
        return kept

    def count(self, indices: Indices) -> tuple[int, int]:
        """Tokens and UTF-8 bytes of text of these documents."""
        starts = np.where(indices > 0, self._ends[np.maximum(indices, 1) - 1], 0).astype(np.int64)
        num_tokens = int((self._ends[indices].astype(np.int64) - starts).sum())
        return num_tokens, int(self._index["bytes"][indices].sum(dtype=np.int64))


def make_cache(
    root: Path, sources: Sequence[Source], tokenizer: PreTrainedTokenizerFast, *, console: Console
) -> TokenCache:
    """The cache of this corpus and tokenizer, in a folder of `root` that is named by a hash of both.

    It is made where it is missing or damaged; a second process that wants the same waits for the first. Memory stays
    flat, but for 32 bytes that the disk, not the memory, holds for each document.

    Raises DataError for a corpus that cannot be used, StoreError for a folder that cannot be written.
    """
    with disk_errors(root, "written"):
        root.mkdir(parents=True, exist_ok=True)
    with console.task("fingerprint of the corpus"):
        key = cache_key(sources, tokenizer)
    folder = root / key
    with _turn(folder, console):
        if folder.exists():
            with console.task("check the token cache"):
                problem = damage(folder)
            if problem is None:
                return TokenCache.open(folder)
            console.warn(f"The token cache {folder} is damaged ({problem}); it is made again.")
        _make(folder, key, sources, tokenizer, console)
    return TokenCache.open(folder)


def cache_key(sources: Sequence[Source], tokenizer: PreTrainedTokenizerFast) -> str:
    """24 hex digits that name these contents under this tokenizer, wherever they lie. Weights do not count."""
    plain = json.dumps([LAYOUT, corpus_fingerprint(sources), tokenizer_hash(tokenizer)])
    return hashlib.sha256(plain.encode()).hexdigest()[:24]


def _make(
    folder: Path, key: str, sources: Sequence[Source], tokenizer: PreTrainedTokenizerFast, console: Console
) -> None:
    dtype = np.dtype("<u2" if num_ids(tokenizer) <= 1 << 16 else "<u4")
    temporary = folder.with_name(f"{TMP}{folder.name}")
    num_tokens = num_bytes = 0
    with disk_errors(folder, "written"):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            with (
                console.task("tokenise", unit="documents") as task,
                _Output(temporary / TOKENS) as tokens,
                _Output(temporary / INDEX) as index,
            ):
                around, encoder = frame(tokenizer), text_encoder(tokenizer)
                for batch in _batches(read_documents(sources)):
                    lengths = [tokens.write(ids) // dtype.itemsize for ids in _encode(batch, encoder, around, dtype)]
                    index.write(_records(batch, lengths, num_tokens))
                    num_tokens += sum(lengths)
                    num_bytes += sum(document.num_bytes for document in batch)
                    task.advance(len(batch), f"{num_tokens / 1e6:.1f} million tokens")
            about = {"key": key, "dtype": dtype.str, "num_ids": num_ids(tokenizer), "num_bytes": num_bytes}
            files = {TOKENS: tokens.entry(), INDEX: index.entry()}
            write_file(temporary / MANIFEST, to_json({"format": FORMAT, **about, "files": files}))
            shutil.rmtree(folder, ignore_errors=True)  # only a damaged one is here
            temporary.rename(folder)
            sync_folder(folder.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += document.num_bytes
        if size >= BATCH_BYTES or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(
    batch: Sequence[Document], encoder: Tokenizer, around: Frame, dtype: np.dtype[Any]
) -> Iterator[NDArray[np.unsignedinteger]]:
    before = [] if around.bos is None else [around.bos]
    for encoding in encoder.encode_batch_fast([document.text for document in batch], add_special_tokens=False):
        yield np.array([*before, *encoding.ids, around.eos], dtype)


def _records(batch: Sequence[Document], lengths: Sequence[int], start: int) -> NDArray[np.void]:
    records = np.empty(len(batch), RECORD)
    records["end"] = start + np.cumsum(lengths)
    records["bytes"] = [document.num_bytes for document in batch]
    records["source"] = [document.source for document in batch]
    hashes = np.frombuffer(b"".join(document.digest for document in batch), ">u8").reshape(-1, 2)
    records["side"], records["share"] = hashes[:, 0], hashes[:, 1]
    return records


class _Output:
    """A file under way; what goes in is hashed as it comes, since the whole may be larger than memory."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._hash, self._size = hashlib.sha256(), 0

    def write(self, array: NDArray[Any]) -> int:
        """The number of bytes that were written."""
        data = array.tobytes()
        self._file.write(data)
        self._hash.update(data)
        self._size += len(data)
        return len(data)

    def entry(self) -> dict[str, object]:
        return {"sha256": self._hash.hexdigest(), "bytes": self._size}

    def __enter__(self) -> _Output:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._file:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())


@contextmanager
def _turn(folder: Path, console: Console) -> Iterator[None]:
    """A block that one process at a time is in. The lock ends with its holder, however that one dies."""
    with disk_errors(folder, "locked"):
        file = folder.with_name(f".lock-{folder.name}").open("wb")
    with file:
        with disk_errors(folder, "locked"):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                with console.task("wait for another process that makes this token cache"):
                    fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _narrow(indices: NDArray[np.int64]) -> Indices:
    """Half the memory, where the indices allow it."""
    return indices.astype(np.uint32) if not len(indices) or indices[-1] < 1 << 32 else indices
