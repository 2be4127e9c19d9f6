"""Rows of prompts from JSONL and Parquet files, and from packages that hold some."""

from __future__ import annotations

import difflib
import glob
import gzip
import importlib.util
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlhf.errors import DataError

CHATTERBOT = "chatterbot:"


@dataclass(frozen=True, slots=True)
class Item:
    """A row before it is checked."""

    where: str  # file and line, for errors
    prompt: object
    extra: Mapping[str, str]  # the other fields; those that are no texts as JSON


def read_items(sources: str | tuple[str, ...]) -> Iterator[Item]:
    """The rows of all sources, in order: files, globs (in order of names), `chatterbot:PART,PART`.

    Raises DataError: nothing matches, a file that cannot be read, a malformed line (with its number).
    """
    for source in (sources,) if isinstance(sources, str) else sources:
        if source.startswith(CHATTERBOT):
            yield from _chatterbot(source)
        else:
            for path in _files(source):
                yield from _parquet(path) if path.suffix == ".parquet" else _jsonl(path)


def _files(source: str) -> list[Path]:
    paths = [Path(source)] if Path(source).is_file() else [Path(p) for p in sorted(glob.glob(source, recursive=True))]
    paths = [path for path in paths if path.is_file()]
    if not paths:
        raise DataError(
            f"data.prompts={source!r} matches no file in {Path.cwd()}.", remedy="Give a path or a glob that does."
        )
    for path in paths:
        if not path.name.endswith((".jsonl", ".jsonl.gz", ".parquet")):
            raise DataError(
                f"{path} is of a kind that is not known.",
                limit="Known are .jsonl, .jsonl.gz and .parquet.",
                remedy='Convert it, one row such as {"prompt": "..."} per prompt.',
            )
    return paths


def _jsonl(path: Path) -> Iterator[Item]:
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _item(f"{path}, line {number}", _row(line))
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(
            f"{path}, line {max(number, 1)}: {reason_of(error)}.", remedy="Mend or remove the line."
        ) from error


def _row(line: bytes) -> object:
    return json.loads(line.decode("utf-8-sig"))


def reason_of(error: Exception) -> str:
    """What is wrong with a line, in words."""
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON, {error.msg} at column {error.colno}"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8, byte {error.start + 1} of the line"
    return str(error).rstrip(".")


def _parquet(path: Path) -> Iterator[Item]:
    import pyarrow  # only where there is a Parquet file: it takes long to import
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(1000):
                for row in batch.to_pylist():
                    number += 1
                    yield _item(f"{path}, row {number}", row)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {str(error).rstrip('.')}.", remedy="Give a Parquet file.") from error


def _item(where: str, row: Any) -> Item:
    if not isinstance(row, dict) or row.get("prompt") is None:
        fields = ", ".join(map(str, row)) or "none" if isinstance(row, dict) else f"a {type(row).__name__}"
        raise DataError(
            f"{where}: there is no `prompt` (found: {fields}).",
            remedy="Name the field `prompt`: a text, or a list of {role, content}.",
        )
    extra = {
        str(key): value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        for key, value in row.items()
        if key != "prompt" and value is not None
    }
    return Item(where, row["prompt"], extra)


def _chatterbot(source: str) -> Iterator[Item]:
    spec = importlib.util.find_spec("chatterbot_corpus")
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            f"data.prompts={source!r} needs the package chatterbot-corpus.", remedy="pip install chatterbot-corpus"
        )
    folder = Path(spec.submodule_search_locations[0]) / "data" / "english"
    parts = {path.stem: path for path in sorted(folder.glob("*.yml"))}
    for part in source.removeprefix(CHATTERBOT).split(","):
        if part.strip() not in parts:
            near = difflib.get_close_matches(part.strip(), parts, n=1)
            raise DataError(
                f"data.prompts={source!r}: chatterbot-corpus has no part {part.strip()!r}.",
                limit=f"It has {', '.join(parts)}.",
                remedy=f"Did you mean {near[0]}?" if near else "Name one of them.",
            )
        path = parts[part.strip()]
        corpus = yaml.safe_load(path.read_text(encoding="utf-8"))
        for number, conversation in enumerate(corpus["conversations"], 1):
            extra = {"source": f"{CHATTERBOT}{path.stem}"}
            if len(conversation) > 1:
                extra["answer"] = str(conversation[1]).strip()
            yield Item(f"{path.name}, conversation {number}", str(conversation[0]).strip(), extra)
