"""Rows of prompts from JSONL and Parquet files, and from packages that hold some."""

from __future__ import annotations

import difflib
import importlib.util
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlhf.errors import DataError
from rlhf.files import jsonl_rows, matching_files, parquet_rows

CHATTERBOT = "chatterbot:"
KINDS = (".jsonl", ".jsonl.gz", ".parquet")


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
            remedy = 'Convert it, one row such as {"prompt": "..."} per prompt.'
            for path in matching_files(source, KINDS, named=f"data.prompts={source!r}", remedy=remedy):
                for where, row in parquet_rows(path) if path.suffix == ".parquet" else jsonl_rows(path):
                    yield _item(f"{path}, {where}", row)


def _item(where: str, row: Any) -> Item:
    if not isinstance(row, dict) or row.get("prompt") is None:
        fields = ", ".join(map(str, row)) or "none" if isinstance(row, dict) else f"a {type(row).__name__}"
        raise DataError(
            f"{where}: there is no `prompt` (found: {fields}).",
            remedy="Name the field `prompt`: a text, or a list of {role, content}.",
        )
    system = row.get("system")
    if system is not None and not isinstance(system, str):
        raise DataError(
            f"{where}: `system` is no text: {json.dumps(system, ensure_ascii=False, default=str)[:100]}.",
            remedy="Give the system message as a text, or name the field otherwise.",
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
