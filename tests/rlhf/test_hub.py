"""Data sets of a hub, given by a server of ours that speaks as much of the hub's protocol as is asked for."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

from rlhf.conversations import Source, load_conversations
from rlhf.errors import DataError
from rlhf.files import matching_files
from rlhf.sources import read_items

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "README.md": b"# About\n",
    "data/train-0.jsonl": b'{"prompt": "one", "completion": "1"}\n',
    "data/train-1.jsonl": b'{"prompt": "two", "completion": "2"}\n',
    "data/test.jsonl": b'{"prompt": "three", "completion": "3"}\n',
    "broken/train.json": b"[]",
}


class Hub(BaseHTTPRequestHandler):
    """One data set, owner/pairs."""

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""

    def _answer(self, *, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        headers: dict[str, str] = {}
        status, body = 404, b""
        if path.startswith("/api/datasets/owner/pairs/revision/"):
            listed = [{"rfilename": name} for name in FILES]
            about = {"id": "owner/pairs", "sha": COMMIT, "siblings": listed, "private": False, "downloads": 0}
            status, body = 200, json.dumps(about | {"likes": 0, "tags": [], "disabled": False, "gated": False}).encode()
        elif path.startswith("/api/datasets/owner/pairs/tree/"):
            tree = [{"type": "file", "path": name, "size": len(data), "oid": sha(data)} for name, data in FILES.items()]
            status, body = 200, json.dumps(tree).encode()
        elif path.startswith(f"/datasets/owner/pairs/resolve/{COMMIT}/"):
            body = FILES[path.split(f"{COMMIT}/")[1]]
            status, headers = 200, {"X-Repo-Commit": COMMIT, "ETag": f'"{sha(body)}"'}
        elif path.startswith("/api/"):
            headers = {"X-Error-Code": "RepoNotFound"}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        breaks_off = path.endswith("broken/train.json")
        self.send_header("Content-Length", str(len(body) + 1000 * breaks_off))
        self.end_headers()
        if with_body:
            self.wfile.write(body)


def sha(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a hub, which is the one that the library asks."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        for module in [module for name, module in sys.modules.items() if name.startswith("huggingface_hub")]:
            for constant, value in {
                "ENDPOINT": address,
                "HF_HUB_OFFLINE": False,
                "HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}",
                "HF_HUB_CACHE": str(tmp_path / "cache"),
            }.items():
                if constant in vars(module):
                    monkeypatch.setattr(module, constant, value)
        yield address
        server.shutdown()
        thread.join()


def test_all_files_of_a_kind_or_those_that_are_named_are_fetched(hub: str) -> None:
    def names(source: str) -> list[str]:
        return [path.name for path in matching_files(source, (".jsonl",), named=source, remedy="")]

    assert names("hub:owner/pairs") == ["test.jsonl", "train-0.jsonl", "train-1.jsonl"]
    assert names("hub:owner/pairs/data/train-*") == ["train-0.jsonl", "train-1.jsonl"]
    assert names(f"hub:owner/pairs@{COMMIT}/data/test.jsonl") == ["test.jsonl"]


def test_what_was_fetched_is_there_without_the_hub(hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    matching_files(f"hub:owner/pairs@{COMMIT}/*.jsonl", (".jsonl",), named="it", remedy="")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found = matching_files(f"hub:owner/pairs@{COMMIT}/*.jsonl", (".jsonl",), named="it", remedy="")
    assert len(found) == 3


def test_prompts_and_conversations_come_from_a_hub_as_from_files(hub: str) -> None:
    assert [item.prompt for item in read_items("hub:owner/pairs/data/train-*")] == ["one", "two"]
    found = load_conversations([Source("hub:owner/pairs/data/train-*")], held_out=0.0)
    assert sorted(conversation.messages[0].content for conversation in found.train) == ["one", "two"]


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("hub:pairs", "names no data set of a hub.*hub:OWNER/NAME"),
        ("hub:owner/other", "the hub did not give it.*Check the spelling"),
        ("hub:owner/pairs/data/dev*", r"no file that matches data/dev\*"),
        ("hub:owner/pairs/broken/*", "the hub did not give it: peer closed connection"),
        ("hub:owner/pairs/README.md", "of a kind that is not known"),
    ],
)
def test_what_the_hub_does_not_have_is_told(hub: str, source: str, told: str) -> None:
    with pytest.raises(DataError, match=f"(?s){told}"):
        matching_files(source, (".jsonl",), named=source, remedy="")
