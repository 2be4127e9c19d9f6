"""A corpus: documents from text, JSONL and Parquet files, streamed, and what the files are known by.

Memory stays flat whatever the size: no more than one line of JSONL, one batch of Parquet rows or one document of a text
file is held. A longer text becomes several documents, cut where a paragraph, line or word ends.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import heapq
import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, cast

from configs.schema import Recipe
from rlhf.errors import DataError, RecipeError
from rlhf.files import matching_files, reason_of

Split = Literal["file", "paragraph", "line"]

MAX_DOCUMENT_BYTES = 1 << 20  # far above any row of tokens, and small enough to be tokenised at once
MAX_LINE_BYTES = 16 << 20  # of JSONL, which is parsed as a whole
PARQUET_ROWS = 64  # read at once
SAMPLE_BYTES = 32_000_000  # for a tokenizer, whose training takes some 100 bytes of memory for a byte of Chinese
WHOLE_BYTES, BLOCK_BYTES, NUM_BLOCKS = 64 << 20, 1 << 20, 64  # of the fingerprint
TEXT_KINDS, ROW_KINDS = (".txt", ".txt.gz", ".md", ".md.gz"), (".jsonl", ".jsonl.gz")


@dataclass(frozen=True, slots=True)
class Source:
    """Files that documents come from."""

    path: str  # a file or a glob
    weight: float = (
        1.0  # how often its documents are seen in an epoch; below 1: by such a share of them, chosen by hash
    )
    split: Split = "file"  # what a document of a text file is; a paragraph ends at a blank line
    field: str = "text"  # the text of a JSONL or Parquet row


@dataclass(frozen=True, slots=True)
class Document:
    """A text that a model learns to continue."""

    text: str  # not blank, MAX_DOCUMENT_BYTES at most
    source: int  # index of its source
    num_bytes: int  # of its UTF-8
    digest: bytes  # 16 bytes of BLAKE2b over its UTF-8: equal texts, equal digests


def corpus_sources(recipe: Recipe) -> list[Source]:
    """The sources of the recipe's corpus. Raises RecipeError if it names none."""
    if not recipe.pretrain.sources:
        raise RecipeError(
            "pretrain: the recipe names no raw text.",
            remedy="Name files under pretrain.sources, `- path: corpus.jsonl`.",
        )
    return [Source(source.path, source.weight, source.split, source.field) for source in recipe.pretrain.sources]


def read_documents(sources: Sequence[Source]) -> Iterator[Document]:
    """The documents of all sources, in order of sources, names of files, and place. Blank ones are left out.

    Raises DataError, with file and line: nothing matches, an unknown kind of file, one that cannot be read or is
    binary, a malformed line, a row without the field, a source that holds no document.
    """
    for number, source in enumerate(sources):
        found = False
        for path in find_files(source):
            for data in _contents(path, source):
                found = True
                digest = hashlib.blake2b(data, digest_size=16).digest()
                yield Document(data.decode(), number, len(data), digest)
        if not found:
            raise DataError(
                f"{source.path!r} holds no document.",
                limit="At least 1 is needed.",
                remedy="Give files with text in them, or leave the source out.",
            )


def check_corpus(sources: Sequence[Source]) -> None:
    """Nothing, if each source's files are there and its first document can be read. Raises DataError."""
    for source in sources:
        next(read_documents([source]))


def sample_texts(sources: Sequence[Source], max_bytes: int = SAMPLE_BYTES) -> list[str]:
    """Texts of at most `max_bytes` of UTF-8 to train a tokenizer on; the same files give the same list.

    Each source has an equal share; what a small one leaves goes to the larger ones. Within a source, documents are
    chosen by hash. Raises DataError as `read_documents` does.
    """
    sizes = [sum(path.stat().st_size for path in find_files(source)) for source in sources]
    texts: list[str] = []
    left = max_bytes
    for done, number in enumerate(sorted(range(len(sources)), key=lambda i: (sizes[i], i))):
        kept = _largest_digests(read_documents([sources[number]]), left // (len(sources) - done))
        left -= sum(document.num_bytes for document in kept)
        texts += [document.text for document in kept]
    return texts


def corpus_fingerprint(sources: Sequence[Source]) -> str:
    """SHA-256 (hex) of what decides which documents come in which order, wherever the files lie; not of the weights.

    Names, sizes and contents count. Of a file above WHOLE_BYTES it is NUM_BLOCKS blocks, evenly spaced: a change that
    keeps its size and misses them all goes unnoticed. Raises DataError as `find_files`, and for what cannot be read.
    """
    total = hashlib.sha256()
    for source in sources:
        paths = find_files(source)
        total.update(json.dumps([len(paths), source.split, source.field]).encode())
        for path in paths:
            with _reading(path), path.open("rb") as file:
                size = path.stat().st_size
                total.update(json.dumps([path.name, size]).encode())
                for start in _blocks(size):
                    file.seek(start)
                    total.update(file.read(BLOCK_BYTES))
    return total.hexdigest()


def find_files(source: Source) -> list[Path]:
    """The files of a source in order of names. Raises DataError if there is none, or one of an unknown kind."""
    kinds = (*TEXT_KINDS, *ROW_KINDS, ".parquet")
    return matching_files(
        source.path, kinds, named=repr(source.path), remedy="Rename a text file to .txt, or convert it."
    )


def _largest_digests(documents: Iterator[Document], max_bytes: int) -> list[Document]:
    # The split holds out the smallest digests, so a sample of a large corpus has none of what is held out.
    heap: list[tuple[bytes, int, Document]] = []
    size = 0
    for number, document in enumerate(documents):
        heapq.heappush(heap, (document.digest, number, document))
        size += document.num_bytes
        while size > max_bytes and len(heap) > 1:
            size -= heapq.heappop(heap)[2].num_bytes
    return [document for _, _, document in sorted(heap)]


def _blocks(size: int) -> Iterator[int]:
    """Where the blocks begin that the fingerprint reads."""
    if size <= WHOLE_BYTES:
        yield from range(0, size, BLOCK_BYTES)
    else:
        yield from ((size - BLOCK_BYTES) * i // (NUM_BLOCKS - 1) for i in range(NUM_BLOCKS))


def _contents(path: Path, source: Source) -> Iterator[bytes]:
    """The documents of a file as UTF-8, none of them blank or too long."""
    with _reading(path):
        if path.suffix == ".parquet":
            yield from _pieces(_parquet(path, source.field))
            return
        with cast(BinaryIO, gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")) as file:
            if path.name.endswith(TEXT_KINDS):
                yield from _texts(path, file, source.split)
            else:
                yield from _pieces(_jsonl(path, file, source.field))


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {reason_of(error)}.", remedy="Mend or remove the file.") from error


def _texts(path: Path, file: BinaryIO, split: Split) -> Iterator[bytes]:
    held, first = bytearray(), 1  # the document under way, and the line that it begins in
    line, at_start = 1, True
    while raw := file.readline(MAX_DOCUMENT_BYTES):
        ends = raw.endswith(b"\n")
        if split == "paragraph" and at_start and not raw.strip():
            yield from _text(path, held, first, split)
            held.clear()
        else:
            first = first if held else line
            held += raw
            while len(held) > MAX_DOCUMENT_BYTES:
                part = held[: _cut(held)]
                yield from _text(path, part, first, split)
                first += part.count(b"\n")
                del held[: len(part)]
            if split == "line" and ends:
                yield from _text(path, held, first, split)
                held.clear()
        line += ends
        at_start = ends
    yield from _text(path, held, first, split)


def _text(path: Path, held: bytearray, first: int, split: Split) -> Iterator[bytes]:
    """The document, unless it is blank."""
    data = bytes(held).removeprefix(codecs.BOM_UTF8) if first == 1 else bytes(held)
    if (at := data.find(b"\0")) != -1:
        raise DataError(
            f"{path}, line {first + data.count(10, 0, at)}: a NUL byte.",
            limit="A corpus is UTF-8 text; NUL bytes mean a binary file, or UTF-16.",
            remedy="Remove the file, or save it as UTF-8.",
        )
    try:
        blank = not data.decode().strip()
    except UnicodeDecodeError as error:
        line_start = data.rfind(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {first + data.count(10, 0, error.start)}: not UTF-8, byte {error.start - line_start + 1} "
            "of the line.",
            remedy="Remove the file, or save it as UTF-8.",
        ) from error
    if not blank:
        yield data if split == "file" else data.strip(b"\r\n")


def _pieces(rows: Iterator[tuple[str, str]]) -> Iterator[bytes]:
    for where, text in rows:
        if not text.strip():
            continue
        try:
            data = text.encode()
        except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair; no tokenizer takes it
            raise DataError(
                f"{where}: the text holds half a character (a lone surrogate).", remedy="Mend or remove the row."
            ) from error
        while len(data) > MAX_DOCUMENT_BYTES:
            at = _cut(data)
            if data[:at].strip():
                yield data[:at]
            data = data[at:]
        if data.strip():
            yield data


def _cut(data: bytes | bytearray) -> int:
    """Where the first piece of a text that is too long ends: at the last paragraph, line, word or character in it."""
    for mark in (b"\n\n", b"\n", b" "):
        at = data.rfind(mark, MAX_DOCUMENT_BYTES // 2, MAX_DOCUMENT_BYTES)
        if at != -1:
            return at + len(mark)
    begins = (at for at in range(MAX_DOCUMENT_BYTES, MAX_DOCUMENT_BYTES - 4, -1) if data[at] & 0xC0 != 0x80)
    return next(begins, MAX_DOCUMENT_BYTES)


def _jsonl(path: Path, file: BinaryIO, field: str) -> Iterator[tuple[str, str]]:
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        where = f"{path}, line {number}"
        if len(line) > MAX_LINE_BYTES:
            raise DataError(
                f"{where} is longer than {MAX_LINE_BYTES >> 20} MiB.",
                limit="A line is read as a whole.",
                remedy="Cut its text into several rows.",
            )
        if line.strip():
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: {reason_of(error)}.", remedy="Mend or remove the line.") from error
            fields = ", ".join(map(str, row)) or "none" if isinstance(row, dict) else f"a {type(row).__name__}"
            yield where, _field(where, field, row.get(field) if isinstance(row, dict) else None, fields)


def _parquet(path: Path, field: str) -> Iterator[tuple[str, str]]:
    import pyarrow  # only where there is a Parquet file: it takes long to import
    import pyarrow.parquet

    try:
        # Read piece by piece, not a whole column of a row group at once.
        with pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            names = file.schema_arrow.names
            if field not in names:
                _field(str(path), field, None, ", ".join(names) or "none")
            number = 0
            for batch in file.iter_batches(PARQUET_ROWS, columns=[field]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield f"{path}, row {number}", _field(f"{path}, row {number}", field, value, field)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} cannot be read: {reason_of(error)}.", remedy="Give a Parquet file.") from error


def _field(where: str, field: str, value: object, found: str) -> str:
    if isinstance(value, str):
        return value
    problem = (
        f"no text in `{field}` (found: {found})" if value is None else f"`{field}` is a {type(value).__name__}, no text"
    )
    raise DataError(
        f"{where}: {problem}.",
        limit=f"Each row has its text in `{field}`.",
        remedy="Name the field that holds the text (field), or mend the row.",
    )
