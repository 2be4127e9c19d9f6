"""The conversation in the terminal, with an endpoint that answers in words that the test chose."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster.chat import STOPPED, Chat, api_url, choose, line_reader, shown
from cluster.cli import app
from rlhf.errors import ServeError


class Endpoint:
    """Lists three models, and answers each message with its model's name and what was asked last."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.refuses: tuple[int, str] | None = None
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.keys.append(self.headers["Authorization"])
                names = [] if self.path != "/v1/models" else ["base", "law", "policy"]
                models = [{"id": n, "object": "model", "created": 0, "owned_by": "x"} for n in names]
                if outer.refuses:
                    self._send(outer.refuses[0], {"error": {"message": outer.refuses[1]}})
                else:
                    self._send(200, {"object": "list", "data": models})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append(body)
                if outer.refuses:
                    return self._send(outer.refuses[0], {"error": {"message": outer.refuses[1]}})
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.end_headers()
                for piece in (f"{body['model']}: ", body["messages"][-1]["content"], "\x1b[31m!"):
                    delta = {"index": 0, "delta": {"content": piece}, "finish_reason": None}
                    chunk = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "m"}
                    self.wfile.write(f"data: {json.dumps({**chunk, 'choices': [delta]})}\n\n".encode())
                self.wfile.write(b"data: [DONE]\n\n")

            def _send(self, status: int, body: object) -> None:
                content = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    made = Endpoint()
    yield made
    made.server.shutdown()
    made.server.server_close()


def talk(endpoint: Endpoint, lines: str, **options: Any) -> tuple[str, Chat]:
    out = io.StringIO()
    chat = Chat(endpoint.url, out=out, **options)
    chat.run(line_reader(io.StringIO(lines)))
    chat.close()
    return out.getvalue(), chat


def test_answers_stream_and_what_was_said_goes_along_with_the_system_message(endpoint: Endpoint) -> None:
    out, chat = talk(endpoint, "Hello\n\n  And now?\n", system="Be brief.", key="secret-key")
    assert "policy: Hello[31m!\n" in out  # the escape that would colour the terminal is gone
    assert endpoint.asked[1]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "policy: Hello\x1b[31m!"},
        {"role": "user", "content": "And now?"},
    ]
    assert all(body["stream"] and body["model"] == "policy" for body in endpoint.asked)
    assert len(chat.history) == 4
    assert endpoint.keys == ["Bearer secret-key"]


def test_commands_change_the_model_forget_and_end(endpoint: Endpoint) -> None:
    out, _ = talk(endpoint, "one\n/model base\ntwo\n/reset\nthree\n/model nobody\n/model\n/what\n/\n/quit\nfour\n")
    assert [body["model"] for body in endpoint.asked] == ["policy", "base", "base"]
    assert [len(body["messages"]) for body in endpoint.asked] == [1, 3, 1]
    assert "There is no model 'nobody'. There are base, law, policy." in out
    assert "(now base; there are base, law, policy)" in out
    assert out.count("/quit") == 3  # the greeting, and help for the two that are no commands


def test_a_message_that_fails_is_told_and_not_kept(endpoint: Endpoint) -> None:
    lines = ["fine", "too long", "fine again"]

    def read() -> str:
        endpoint.refuses = (400, "The context is full") if lines and lines[0] == "too long" else None
        if not lines:
            raise EOFError
        return lines.pop(0)

    out = io.StringIO()
    chat = Chat(endpoint.url, out=out)
    chat.run(read)
    assert "(The context is full; the message is not kept)" in out.getvalue()
    assert [message["content"] for message in chat.history if message["role"] == "user"] == ["fine", "fine again"]


def test_ctrl_c_stops_an_answer_and_keeps_what_came(endpoint: Endpoint) -> None:
    class Interrupting(io.StringIO):
        def write(self, text: str) -> int:
            if text == "long story":
                raise KeyboardInterrupt
            return super().write(text)

    out = Interrupting()
    chat = Chat(endpoint.url, out=out)
    chat.run(line_reader(io.StringIO("long story\nnext\n")))
    assert STOPPED in out.getvalue()
    assert chat.history[1]["content"] == "policy: long story"
    assert endpoint.asked[1]["messages"][-1]["content"] == "next"


@pytest.mark.parametrize(
    ("refuses", "message"),
    [((401, "No API key, or a wrong one."), "No API key, or a wrong one"), ((500, "broken"), "broken")],
)
def test_an_endpoint_that_lets_nobody_in_is_one_error(
    endpoint: Endpoint, refuses: tuple[int, str], message: str
) -> None:
    endpoint.refuses = refuses
    with pytest.raises(ServeError, match=message):
        Chat(endpoint.url, out=io.StringIO())


def test_an_unknown_model_and_an_endpoint_that_is_not_there_are_one_message_and_exit_code_2(endpoint: Endpoint) -> None:
    def run(*words: str) -> str:
        result = CliRunner().invoke(app, ["chat", *words], input="/quit\n")
        assert result.exit_code == 2, result.output
        assert "Traceback" not in result.output
        return " ".join(result.output.split())

    assert "There is no model 'nobody'. There are base, law, policy." in run(endpoint.url, "--model", "nobody")
    assert "http://127.0.0.1:9/v1 cannot be used" in run("http://127.0.0.1:9")
    assert "http://127.0.0.1:one is no address of an endpoint" in run("http://127.0.0.1:one")
    assert "http://../v1 cannot be used" in run("http://..")
    assert "There is no run nothing-here" in run("nothing-here")


def test_the_command_talks_to_an_endpoint_that_runs(endpoint: Endpoint) -> None:
    result = CliRunner().invoke(app, ["chat", endpoint.url, "--model", "law"], input="Hello\n")
    assert result.exit_code == 0
    assert "law: Hello" in result.output


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://host:8000", "http://host:8000/v1"),
        ("https://host/", "https://host/v1"),
        ("http://host:8000/v1", "http://host:8000/v1"),
        ("http://host/llm/v1/", "http://host/llm/v1"),
    ],
)
def test_the_root_of_an_endpoint_stands_for_its_first_version(url: str, base: str) -> None:
    assert api_url(url) == base


def test_what_was_trained_last_is_talked_to_first() -> None:
    assert choose(["base", "law", "policy"]) == "policy"
    assert choose(["base"]) == "base"


@pytest.mark.parametrize(
    ("text", "seen"), [("a\tb\n", "a\tb\n"), ("\x1b]0;title\x07x\r", "]0;titlex"), ("你好é", "你好é")]
)
def test_nothing_that_a_terminal_obeys_is_written(text: str, seen: str) -> None:
    assert shown(text) == seen
