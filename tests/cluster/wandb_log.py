"""Reads an offline W&B run as it is on the disk, and as a W&B server is given it."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

from wandb.proto import wandb_internal_pb2

from cluster import segments

proto: Any = wandb_internal_pb2  # chosen at import by the protobuf version, so that its names have no types


def records(path: Path) -> Iterator[Any]:
    """The records of a `.wandb` file, in order; a torn one at the end is left out."""
    for _, content in segments.records(path.read_bytes()):
        yield proto.Record.FromString(content)


def history(folder: Path) -> list[dict[str, object]]:
    """The logged rows of all segments of a run folder, oldest first; `_step` is W&B's own count."""
    rows: list[dict[str, object]] = []
    for record in (record for path in logs(folder) for record in records(path) if is_row(record)):
        items = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
        assert items["_step"] == record.history.step.num
        rows.append(items)
    return rows


def logs(folder: Path) -> list[Path]:
    """The logs of the offline segments of a run folder, oldest first."""
    return sorted(folder.glob("wandb/offline-run-*/*.wandb"))


def steps(*paths: Path) -> list[int]:
    """W&B's steps of the rows in logs."""
    return [record.history.step.num for path in paths for record in records(path) if is_row(record)]


def tables(folder: Path) -> dict[int, str]:
    """The cells of the tables `completions` of one cell, by W&B's step."""
    found: dict[int, str] = {}
    for row in history(folder):
        if "completions/path" in row:
            # Where a row was lost after its table was written, there is the same file twice.
            file = next(folder.glob(f"wandb/offline-run-*/files/{row['completions/path']}"))
            step: Any = row["_step"]
            found[step] = json.loads(file.read_text())["data"][0][0]
    return found


def lose_rows(path: Path, num: int, torn_bytes: int = 0) -> None:
    """Cuts a log as a killed process leaves it: `num` rows, and so many bytes of what came next."""
    read = segments.records(path.read_bytes())
    ends = [end for end, content in read if is_row(proto.Record.FromString(content))]
    os.truncate(path, ends[num - 1] + torn_bytes)


def is_row(record: Any) -> bool:
    """Whether it is one of the history."""
    return record.WhichOneof("record_type") == "history"


class Server(ThreadingHTTPServer):
    """As much of a W&B server as the upload of one run without tables needs: it keeps the lines of the history."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.began = False
        self.lines: list[str] = []

    @property
    def environ(self) -> dict[str, str]:
        """The environment of a process that uploads to it."""
        url = f"http://127.0.0.1:{self.server_port}"
        return {"WANDB_BASE_URL": url, "WANDB_API_KEY": "a" * 40, "WANDB_ERROR_REPORTING": "false"}

    @property
    def steps(self) -> list[int]:
        """W&B's steps of the lines, in the order in which they stand."""
        return [json.loads(line)["_step"] for line in self.lines]

    def answer(self, query: str) -> dict[str, object]:
        """The data that answers a GraphQL query."""
        entity, project = {"id": "e", "name": "e"}, {"id": "p", "name": "p"}
        run = {"id": "r", "name": "r", "displayName": "r", "historyLineCount": len(self.lines)}
        if "mutation UpsertBucket" in query:
            is_new, self.began = not self.began, True
            return {"upsertBucket": {"bucket": run | {"project": project | {"entity": entity}}, "inserted": is_new}}
        if "query RunResumeStatus" in query:
            tails = {"historyTail": json.dumps(self.lines[-1:]), "eventsTail": "[]", "summaryMetrics": "{}"}
            counts = {"logLineCount": 0, "eventsLineCount": 0, "config": "{}", "tags": [], "wandbConfig": '{"t": 1}'}
            return {"model": project | {"entity": entity, "bucket": run | tails | counts if self.began else None}}
        if "createRunFiles" in query:
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": []}}
        return {"viewer": {"id": "u", "entity": "e", "username": "u", "flags": "{}", "teams": {"edges": []}}}


class Handler(BaseHTTPRequestHandler):
    """One request to it."""

    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        answer: dict[str, object] = {}
        if self.path.endswith("graphql"):
            answer = {"data": self.server.answer(json.loads(body)["query"])}
        elif self.path.endswith("file_stream"):
            history = (json.loads(body).get("files") or {}).get("wandb-history.jsonl")
            if history:
                self.server.lines[history["offset"] :] = history["content"]
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_PUT = do_POST

    def log_message(self, format: str, *args: object) -> None: ...


@contextmanager
def wandb_server() -> Iterator[Server]:
    """A server that is up."""
    with Server() as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
