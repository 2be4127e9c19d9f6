"""Files that hold rows of data: found by path or glob, and read with errors that name file and line."""

from __future__ import annotations

import glob
import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from rlhf.errors import DataError
from rlhf.hub import HUB, hub_files


def matching_files(pattern: str, kinds: Sequence[str], *, named: str, remedy: str) -> list[Path]:
    """The files of a path, a glob or a data set on a hub (see `hub_files`), in order of names.

    Args:
        kinds: endings that can be read.
        named: what the pattern is called in errors.
        remedy: for a file of another kind.

    Raises DataError if there is none, or one of another kind.
    """
    paths = hub_files(pattern, kinds, named=named) if pattern.startswith(HUB) else _matching_here(pattern)
    if not paths:
        raise DataError(f"{named} matches no file in {Path.cwd()}.", remedy="Give a path or a glob that does.")
    for path in paths:
        if not path.name.endswith(tuple(kinds)):
            raise DataError(
                f"{path} is of a kind that is not known.",
                limit=f"Known are {', '.join(kinds)}.",
                remedy=remedy,
            )
    return paths


def _matching_here(pattern: str) -> list[Path]:
    path = Path(pattern)
    paths = [path] if path.is_file() else [Path(found) for found in sorted(glob.glob(pattern, recursive=True))]
    return [path for path in paths if path.is_file()]


def jsonl_rows(path: Path) -> Iterator[tuple[str, object]]:
    """(`line N`, what stands there) for each line of a JSONL file, .gz or not, that is not blank. Raises DataError."""
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"line {number}", json.loads(line.decode("utf-8-sig"))
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        broken = "line" if isinstance(error, ValueError | RecursionError) else "file"
        raise DataError(
            f"{path}, line {max(number, 1)}: {reason_of(error)}.", remedy=f"Mend or remove the {broken}."
        ) from error


def parquet_rows(path: Path) -> Iterator[tuple[str, object]]:
    """(`row N`, its fields) for each row of a Parquet file. Raises DataError."""
    import pyarrow  # only where there is a Parquet file: it takes long to import
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(1000):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {str(error).rstrip('.')}.", remedy="Give a Parquet file.") from error


def reason_of(error: Exception) -> str:
    """What is wrong with a line, in words."""
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON, {error.msg} at column {error.colno}"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8, byte {error.start + 1} of the line"
    if isinstance(error, RecursionError):
        return "lists or objects within one another, deeper than Python's reader goes"
    return str(error).rstrip(".")
