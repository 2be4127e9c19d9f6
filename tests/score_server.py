"""A server that scores answers, in a thread."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, bytes, dict[str, str]]  # status, body, headers
Answers = Callable[[dict[str, Any]], Reply]


class _QuietServer(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing of a client that left before its answer."""


class ScoreServer:
    """A server whose next answers a test chooses; when none are left, it scores by length."""

    def __init__(self) -> None:
        self.replies: list[Answers] = []
        self.asked: list[dict[str, Any]] = []
        self.tokens: list[str | None] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append(body)
                outer.tokens.append(self.headers["Authorization"])
                status, content, headers = (outer.replies.pop(0) if outer.replies else by_length)(body)
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: Any) -> None: ...

        self.server = _QuietServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}/score"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def by_length(body: dict[str, Any]) -> Reply:
    return ok([[len(text) for text in group["answers"]] for group in body["groups"]])


def ok(scores: Any) -> Reply:
    return 200, json.dumps({"scores": scores}).encode(), {}


def says(status: int, content: bytes = b"", **headers: str) -> Answers:
    return lambda body: (status, content, headers)
