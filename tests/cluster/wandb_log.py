"""Reads an offline W&B run: a LevelDB log (blocks of 32 KiB, records with a 7-byte header) of protobuf records."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

proto: Any = wandb_internal_pb2  # chosen at import by the protobuf version, so that its names have no types

BLOCK = 32768
FULL, FIRST, LAST = 1, 2, 4


def records(path: Path) -> Iterator[Any]:
    """The records of a `.wandb` file, in order; a torn one at the end is left out."""
    data = path.read_bytes()
    at, parts = 7, b""  # after the file's own header: ":W&B", magic, version
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:  # too little of the block is left for a header
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        if kind == 0 or at + 7 + length > len(data):
            return
        parts = data[at + 7 : at + 7 + length] if kind in (FULL, FIRST) else parts + data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (FULL, LAST):
            record = proto.Record()
            record.ParseFromString(parts)
            yield record


def history(folder: Path) -> list[dict[str, object]]:
    """The logged rows of all segments of a run folder, oldest first; `_step` is W&B's own count."""
    rows: list[dict[str, object]] = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for record in records(path):
            if record.WhichOneof("record_type") == "history":
                items = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
                rows.append(items | {"_step": record.history.step.num})
    return rows
