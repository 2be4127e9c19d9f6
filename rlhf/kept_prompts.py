"""prompts.jsonl of a run: the prompts as they were when it began, whatever becomes of the files they came from."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from rlhf.data import Prompts
from rlhf.disk import disk_errors, write_file
from rlhf.errors import StoreError
from rlhf.journal import prompt_from_row, prompt_to_row

PROMPTS = "prompts.jsonl"


def write_prompts(folder: Path, prompts: Prompts) -> None:
    """Commits the prompts of the run in `folder`: a line about all, then one line per prompt."""
    rows = [*prompts.train, *prompts.held_out]
    body = b"".join(json.dumps(prompt_to_row(prompt)).encode() + b"\n" for prompt in rows)
    about = {
        "num_train": len(prompts.train),
        "num_duplicates": prompts.num_duplicates,
        "sha256": hashlib.sha256(body).hexdigest(),
    }
    write_file(folder / PROMPTS, json.dumps(about).encode() + b"\n" + body)


def read_prompts(folder: Path) -> Prompts | None:
    """The prompts that the run began with, or None. Raises StoreError for a file that was altered."""
    path = folder / PROMPTS
    if not path.exists():
        return None
    with disk_errors(path, "read"):
        first, _, body = path.read_bytes().partition(b"\n")
    try:
        about = json.loads(first)
        if about["sha256"] != hashlib.sha256(body).hexdigest():
            raise ValueError("its checksum differs")
        prompts = tuple(prompt_from_row(json.loads(line)) for line in body.splitlines())
        num_train, num_duplicates = int(about["num_train"]), int(about["num_duplicates"])
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{path} was altered: {error}.", remedy="Restore it from a copy, or start a run with another name."
        ) from error
    return Prompts(prompts[:num_train], prompts[num_train:], num_duplicates)
