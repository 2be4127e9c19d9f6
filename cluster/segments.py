"""The segments of a W&B run on the disk: each start writes one, and a process that is killed leaves it torn."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# A log in LevelDB's form: blocks that begin with the file, and in them chunks: CRC-32, length, kind, content.
BLOCK = 32768
FILE_HEADER = 7
CHUNK_HEADER = struct.Struct("<IHB")
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4

Parse = Callable[[bytes], Any]  # content to wandb's `Record`
Row = tuple[str, int]  # stage, and its step: no other row of the run has both


@dataclass(frozen=True)
class Segment:
    """What can be read of one."""

    path: Path  # of the log, alone in the segment's folder but for files of tables and W&B's own logs
    has_run: bool  # it says of which run it is; without, it cannot be uploaded
    rows: Mapping[int, Row]  # by W&B's step
    num_bytes: int  # up to the end of the last whole record

    @property
    def is_offline(self) -> bool:
        """Whether it waits for an upload; the others are what an online run keeps beside."""
        return self.path.parent.name.startswith("offline-run-")


def read_segments(folder: Path, run_id: str, parse: Parse) -> list[Segment]:
    """All segments of a W&B run in a run folder, those of online starts too."""
    paths = [*folder.glob(f"wandb/offline-run-*-{run_id}*/*.wandb"), *folder.glob(f"wandb/run-*-{run_id}*/*.wandb")]
    return [_read(path, run_id, parse) for path in paths]


def mend(segment: Segment) -> None:
    """Makes an offline segment of a killed process fit for `wandb sync`.

    That uploads a run's segments in turn, gives up at an incomplete record, and uploads none at all if one does not
    say its run. So a torn end is cut off, and a segment without a run is renamed to unreadable-run-..., where the
    command does not look for it. No process may be writing it.
    """
    if segment.has_run:
        if segment.num_bytes < segment.path.stat().st_size:
            os.truncate(segment.path, segment.num_bytes)
    else:
        folder = segment.path.parent
        folder.rename(folder.with_name(f"unreadable-{folder.name.removeprefix('offline-')}"))


def records(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(offset of its end, content) of each record of a log, in order, up to the first that is torn or damaged."""
    at, parts = FILE_HEADER, b""
    while at + CHUNK_HEADER.size <= len(data):
        if BLOCK - at % BLOCK < CHUNK_HEADER.size:  # too little of the block is left for a header
            at += BLOCK - at % BLOCK
            continue
        checksum, length, kind = CHUNK_HEADER.unpack_from(data, at)
        content = data[at + CHUNK_HEADER.size : at + CHUNK_HEADER.size + length]
        at += CHUNK_HEADER.size + length
        if kind not in (FULL, FIRST, MIDDLE, LAST) or zlib.crc32(bytes([kind]) + content) != checksum:
            return
        parts = content if kind in (FULL, FIRST) else parts + content
        if kind in (FULL, LAST):
            yield at, parts


def _read(path: Path, run_id: str, parse: Parse) -> Segment:
    read = list(records(path.read_bytes()))
    parsed = [parse(content) for _, content in read]
    return Segment(
        path,
        has_run=any(record.WhichOneof("record_type") == "run" and record.run.run_id == run_id for record in parsed),
        rows=dict(_row(record.history) for record in parsed if record.WhichOneof("record_type") == "history"),
        num_bytes=read[-1][0] if read else FILE_HEADER,
    )


def _row(history: Any) -> tuple[int, Row]:
    values = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in history.item}
    return history.step.num, (values.get("stage", ""), values.get("step", 0))
