"""An append-only file of JSON lines that survives a process dying in the middle of a line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from rlhf.disk import disk_errors, sync_folder, write_file
from rlhf.errors import StoreError
from rlhf.records import Answer, AnswerGroup, Message, Prompt

Row = dict[str, Any]


class Journal:
    """Rows in the order in which they were appended. One writer at a time: the run's lock sees to it."""

    def __init__(self, path: Path, *, durable: bool) -> None:
        self._path, self._durable = path, durable
        if path.exists():
            self._mend()

    def append(self, rows: Iterable[Mapping[str, object]]) -> None:
        """Adds rows: in the file when this returns, and on the disk if the journal is durable."""
        data = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
        with disk_errors(self._path, "written"):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            is_new = not self._path.exists()
            size = 0 if is_new else self._path.stat().st_size
            try:
                with self._path.open("ab") as file:
                    file.write(data)
                    file.flush()
                    if self._durable:
                        os.fsync(file.fileno())
            except OSError:
                # A full disk may have taken half of the rows; the next append must not follow a torn one.
                os.truncate(self._path, size)
                raise
            if is_new:
                sync_folder(self._path.parent)

    def rows(self) -> list[Row]:
        """All whole rows; a torn last line is left out. Raises StoreError, with the line, for damage elsewhere."""
        if not self._path.exists():
            return []
        with disk_errors(self._path, "read"):
            lines = self._path.read_bytes().split(b"\n")[:-1]
        rows: list[Row] = []
        for number, line in enumerate(lines, 1):
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                if number == len(lines):
                    break
                raise StoreError(
                    f"{self._path}, line {number} is damaged: {error}.",
                    remedy="Restore the file from a copy, or start a run with another name.",
                ) from error
        return rows

    def keep(self, wanted: Callable[[Row], bool]) -> None:
        """Rewrites the file with the wanted rows only; either all of the change lasts or nothing of it."""
        rows = self.rows()
        kept = [row for row in rows if wanted(row)]
        if len(kept) != len(rows):
            write_file(self._path, b"".join(json.dumps(row).encode() + b"\n" for row in kept))

    def sync(self) -> None:
        """Puts what was appended on the disk."""
        if self._path.exists():
            with disk_errors(self._path, "written"), self._path.open("ab") as file:
                os.fsync(file.fileno())

    def _mend(self) -> None:
        """Cuts off a torn last line, so that the next row starts on a line of its own."""
        with disk_errors(self._path, "read"):
            data = self._path.read_bytes()
            end = data.rfind(b"\n") + 1
            last = data.rfind(b"\n", 0, max(end - 1, 0)) + 1
            try:
                json.loads(data[last:end] or b"0")
            except ValueError:
                end = last
            if end < len(data):
                os.truncate(self._path, end)


def group_to_row(group: AnswerGroup) -> Row:
    """A group as plain values."""
    return {
        "prompt": prompt_to_row(group.prompt),
        "answers": [
            {
                "text": answer.text,
                "ended": answer.ended,
                "version": answer.version,
                "token_ids": list(answer.token_ids),
                "logprobs": list(answer.logprobs),
            }
            for answer in group.answers
        ],
    }


def group_from_row(row: Row) -> AnswerGroup:
    """The group that `group_to_row` was given, equal in every bit."""
    return AnswerGroup(
        prompt_from_row(row["prompt"]),
        tuple(
            Answer(
                token_ids=tuple(answer["token_ids"]),
                logprobs=tuple(answer["logprobs"]),
                ended=answer["ended"],
                version=answer["version"],
                text=answer["text"],
            )
            for answer in row["answers"]
        ),
    )


def prompt_to_row(prompt: Prompt) -> Row:
    """A prompt as plain values."""
    return {
        "id": prompt.id,
        "messages": [[message.role, message.content] for message in prompt.messages],
        "token_ids": list(prompt.token_ids),
        "extra": dict(prompt.extra),
    }


def prompt_from_row(row: Row) -> Prompt:
    """The prompt that `prompt_to_row` was given."""
    return Prompt(
        id=row["id"],
        messages=tuple(Message(role, content) for role, content in row["messages"]),
        token_ids=tuple(row["token_ids"]),
        extra=row["extra"],
    )
