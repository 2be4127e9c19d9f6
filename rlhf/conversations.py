"""Conversations to learn from: read from files, weighted, told apart, and split once."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from configs.schema import Recipe
from rlhf.chat import prompt_id
from rlhf.data import by_hash
from rlhf.errors import DataError, RecipeError
from rlhf.files import jsonl_rows, matching_files, parquet_rows, reason_of
from rlhf.formats import FORMATS, Conversation, read_row
from rlhf.records import Message

KINDS = (".jsonl", ".jsonl.gz", ".json", ".parquet")
REMEDY = 'Convert it, one row such as {"prompt": "...", "completion": "..."} per line of a .jsonl file.'


@dataclass(frozen=True, slots=True)
class Source:
    """Files, and how often an epoch sees their rows: 2.0 twice, 0.5 half of them, chosen by hash."""

    path: str  # a file or a glob
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Conversations:
    """The conversations of a run. Both parts are ordered by a hash, so that the first n are a fair sample of all."""

    train: tuple[Conversation, ...]  # one epoch: those of a weight above 1 several times
    held_out: tuple[Conversation, ...]  # each once
    num_duplicates: int = 0  # rows that were left out since the same conversation came before


def conversation_sources(recipe: Recipe) -> list[Source]:
    """The sources of the recipe's conversations. Raises RecipeError if it names none."""
    if not recipe.sft.sources:
        raise RecipeError(
            "sft: the recipe names no conversations.", remedy="Name files under sft.sources, `- path: pairs.jsonl`."
        )
    return [Source(source.path, source.weight) for source in recipe.sft.sources]


def load_conversations(sources: Sequence[Source], held_out: float, system: str | None = None) -> Conversations:
    """All different conversations of the sources, split into train and held-out.

    `held_out` is a share in [0, 1]; `system` is put before the conversations that have no system message. The split
    goes by a hash of the prompt (the messages before the first answer that is learned): all answers to one prompt lie
    on one side, the side depends neither on the order of rows or files nor on others that come or go, and with the same
    share it is the side that the prompt has in `rlhf.data`. If `held_out` is above 0 and there are two prompts or more,
    neither side is empty. A conversation that several sources hold has the greatest of their weights.

    Raises DataError: no file, a malformed row (with file and line), several formats in a file, no conversation at all.
    """
    found: dict[str, tuple[Conversation, float]] = {}
    num_rows = 0
    for source in sources:
        _check_weight(source)
        for path in _files(source):
            for conversation in _read(path):
                num_rows += 1
                conversation = _with_system(conversation, system)
                first, weight = found.setdefault(conversation.id, (conversation, source.weight))
                found[conversation.id] = first, max(weight, source.weight)
    if not found:
        raise _empty(sources, "hold no conversation")
    epoch = [(id_, copy) for id_, (_, weight) in found.items() for copy in range(_copies(id_, weight))]
    if not epoch:
        raise _empty(sources, f"hold {len(found)} conversations, and their weights choose none of them")
    place = by_hash("order")
    epoch.sort(key=lambda entry: place(f"{entry[0]}|{entry[1]}"))
    prompts = {id_: prompt_id(found[id_][0].prompt) for id_, _ in epoch}
    apart = _held_out(set(prompts.values()), held_out)
    train = tuple(found[id_][0] for id_, _ in epoch if prompts[id_] not in apart)
    kept = tuple(found[id_][0] for id_, copy in epoch if prompts[id_] in apart and copy == 0)
    return Conversations(train, kept, num_rows - len(found))


def check_conversations(sources: Sequence[Source]) -> None:
    """Nothing, if the sources' files are there and the first row of each is a conversation. Raises DataError."""
    found = [next(_read(path), None) for source in sources for path in _files(source)]
    if not any(found):
        raise _empty(sources, "hold no conversation")


def _files(source: Source) -> list[Path]:
    return matching_files(source.path, KINDS, named=f"The source {source.path!r}", remedy=REMEDY)


def _check_weight(source: Source) -> None:
    if not (math.isfinite(source.weight) and source.weight > 0):
        raise DataError(
            f"The source {source.path!r} has the weight {source.weight}.",
            limit="A weight is a number above 0.",
            remedy="Give 1 to see every row once in an epoch, or leave the source out.",
        )


def _read(path: Path) -> Iterator[Conversation]:
    """The conversations of one file, all of one format."""
    first: tuple[str, str] | None = None
    for where, row in _rows(path):
        name, conversation = read_row(f"{path}, {where}", row)
        first = first or (name, where)
        if name != first[0]:
            raise DataError(
                f"{path} mixes formats: {first[0]} ({first[1]}) and {name} ({where}).",
                limit="A file has one format.",
                remedy="Put the rows of each format into a file of their own.",
            )
        yield conversation


def _rows(path: Path) -> Iterator[tuple[str, object]]:
    """(line or row, what stands there) for each row of a file."""
    if path.suffix == ".parquet":
        return parquet_rows(path)
    return _json(path) if path.suffix == ".json" else jsonl_rows(path)


def _json(path: Path) -> Iterator[tuple[str, object]]:
    try:
        rows = json.loads(path.read_bytes().decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        lines = error.msg == "Extra data"
        raise DataError(
            f"{path}, line {error.lineno}: {reason_of(error)}.",
            limit="A .json file is one list of rows.",
            remedy="Name it .jsonl, if each line is a row." if lines else "Mend the file.",
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{path} cannot be read: {reason_of(error)}.", remedy="Give a UTF-8 file with one list of rows."
        ) from error
    if not isinstance(rows, list):
        fields = f" with {', '.join(rows)}" if isinstance(rows, dict) else ""
        raise DataError(
            f"{path} holds a {type(rows).__name__}{fields}.",
            limit="A .json file is one list of rows.",
            remedy="Keep the list alone, or write one row per line of a .jsonl file.",
        )
    for number, row in enumerate(rows, 1):
        yield f"row {number}", row


def _with_system(conversation: Conversation, system: str | None) -> Conversation:
    if system is None or conversation.messages[0].role == "system":
        return conversation
    num_given = conversation.num_given + 1 if conversation.num_given else 0
    return replace(conversation, messages=(Message("system", system), *conversation.messages), num_given=num_given)


def _copies(id_: str, weight: float) -> int:
    """How often an epoch holds the conversation: the whole part of the weight, and the rest by the hash."""
    whole = math.floor(weight)
    return whole + (by_hash("weight")(id_) < _bound(weight - whole))


def _held_out(prompts: Collection[str], share: float) -> set[str]:
    """Those of the prompts' ids that are held out, as `rlhf.data` chooses them."""
    if share == 0 or len(prompts) < 2:
        return set()
    place = by_hash("split")
    below = sum(place(id_) < _bound(share) for id_ in prompts)
    return set(sorted(prompts, key=place)[: min(max(1, below), len(prompts) - 1)])


def _bound(share: float) -> str:
    """Below it lies that share of all hashes."""
    return f"{int(share * 2**64):016x}" if share < 1 else "g"  # above every hex digit


def _empty(sources: Sequence[Source], problem: str) -> DataError:
    return DataError(
        f"The sources {', '.join(repr(source.path) for source in sources) or '(none)'} {problem}.",
        limit="At least 1 is needed.",
        remedy=f"Give a file with rows of one of the formats {', '.join(FORMATS)}.",
    )
