"""The endpoint on real engines, asked by OpenAI's own client: one server for all tests, ended by the last."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from cluster.cli import app
from cluster.leftovers import sessions
from cluster.serve import free_port
from rlhf.chat import ChatTokenizer
from rlhf.records import Message
from tests.cluster.test_export import make_run
from tests.cluster.test_served import make_peft_folder
from tests.tiny import PAD

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.timeout(900)]

KEY = "a-key-for-the-tests-0123456789"
TURNS = [Message("system", "Be brief."), Message("user", "Say something.")]
MESSAGES: Any = [{"role": message.role, "content": message.content} for message in TURNS]
NUM_TOKENS = 12


@dataclass
class Server:
    """`tenfold serve`, in processes of its own."""

    process: subprocess.Popen[str]
    ready: dict[str, Any]
    base: Path
    adapters: dict[str, Path]
    key_file: Path

    @property
    def url(self) -> str:
        return self.ready["url"]

    def client(self, key: str = KEY) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key=key, max_retries=0, timeout=300)


def own_address() -> str:
    """An address of this machine that is not loopback."""
    found = [a.address for part in psutil.net_if_addrs().values() for a in part if a.family == socket.AF_INET]
    return next(address for address in found if not address.startswith("127."))


def base_whose_turns_end_otherwise(tiny_model: Path, folder: Path) -> Path:
    """The tiny model with a template that ends a turn with a token that neither tokenizer nor config call its end."""
    shutil.copytree(tiny_model, folder)
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("eos_token", f"'{PAD}'"))
    return folder


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("serve")
    base = base_whose_turns_end_otherwise(tiny_model, folder / "base")
    run = make_run(base, folder, 0.05)
    law = make_peft_folder(base, folder / "law", rank=12, targets=("q_proj", "down_proj"))
    key_file = folder / "key"
    key_file.write_text(KEY)
    key_file.chmod(0o600)
    where = ("--host", own_address(), "--port", str(free_port()), "--api-key-file", str(key_file))
    command = [sys.executable, "-m", "cluster.cli", "serve", str(run), *where, "--adapter", f"law={law}", "--json"]
    log = folder / "log"
    with (
        log.open("w") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        assert process.stdout is not None
        line = process.stdout.readline()
        try:
            assert line, f"it ended:\n{log.read_text()}"
            adapters = {"policy": run / "models" / "policy", "law": law}
            yield Server(process, json.loads(line), base, adapters, key_file)
        finally:
            if process.poll() is None:
                process.terminate()


def test_the_base_and_its_adapters_are_listed_by_name(server: Server) -> None:
    assert server.ready["models"] == ["base", "policy", "law"]
    with server.client() as client:
        assert [model.id for model in client.models.list()] == ["base", "policy", "law"]
        assert client.models.retrieve("law").id == "law"


@torch.no_grad()
def greedy(server: Server, name: str) -> list[int]:
    """What plain transformers and peft answer to the turns, by the template that training uses."""
    model: Any = AutoModelForCausalLM.from_pretrained(str(server.base), dtype=torch.float32)
    if name != "base":
        model = PeftModel.from_pretrained(model, str(server.adapters[name]))
    prompt = torch.tensor([ChatTokenizer(server.base).prompt(TURNS).token_ids])
    seen = torch.ones_like(prompt)  # else transformers takes the ends of turns for padding
    written = model.eval().generate(prompt, attention_mask=seen, max_new_tokens=NUM_TOKENS, do_sample=False)
    return written[0, prompt.shape[1] :].tolist()


def test_each_model_streams_what_its_own_weights_say_and_they_differ(server: Server) -> None:
    texts: dict[str, str] = {}
    for name in ("base", "policy", "law", "base"):
        pieces: list[str] = []
        tokens: list[int] = []
        with server.client() as client:
            stream = client.chat.completions.create(
                model=name,
                messages=MESSAGES,
                stream=True,
                temperature=0,
                max_tokens=NUM_TOKENS,
                extra_body={"return_token_ids": True},
            )
            for chunk in stream:
                for choice in chunk.choices:
                    pieces.append(choice.delta.content or "")
                    tokens += (choice.model_extra or {}).get("token_ids") or []
        assert len(pieces) > 2, "it came in one piece"
        assert tokens == greedy(server, name), name
        assert texts.setdefault(name, "".join(pieces)) == "".join(pieces)
    assert len(set(texts.values())) == 3


def test_every_token_that_ended_an_answer_in_training_ends_one_here(server: Server) -> None:
    chat = ChatTokenizer(server.base)
    (pad,) = chat.encode_rendered(PAD)
    assert pad in chat.eos_ids and len(chat.eos_ids) == 2
    for end in chat.eos_ids:
        with server.client() as client:
            answer = client.chat.completions.create(
                model="policy", messages=MESSAGES, temperature=0, max_tokens=NUM_TOKENS, logit_bias={str(end): 100}
            )
        assert answer.choices[0].finish_reason == "stop"
        assert (answer.choices[0].message.content or "") == ""
        assert answer.usage is not None and answer.usage.completion_tokens == 1


def test_without_the_key_it_answers_401_from_another_address_than_loopback(server: Server) -> None:
    assert not server.url.startswith("http://127.")
    for key in ("", "wrong", KEY[:-1]):
        with server.client(key or "none") as client:
            with pytest.raises(openai.AuthenticationError):
                client.models.list()
            with pytest.raises(openai.AuthenticationError):
                client.chat.completions.create(model="policy", messages=MESSAGES, stream=True)
    root = server.url.removesuffix("/v1")
    for path in ("/v1/models", "/", "/docs", "/openapi.json", "/metrics", "/anything"):
        assert httpx.get(f"{root}{path}", trust_env=False).status_code == 401, path


def test_a_model_that_is_not_served_is_404_and_a_bad_request_400(server: Server) -> None:
    with server.client() as client:
        with pytest.raises(openai.NotFoundError, match="There are base, policy, law"):
            client.chat.completions.create(model="nobody", messages=MESSAGES)
        with pytest.raises(openai.NotFoundError, match="nobody"):
            client.models.retrieve("nobody")
        with pytest.raises(openai.BadRequestError, match="context"):
            client.completions.create(model="law", prompt="x" * 3000)
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model="law", messages=[])


def test_the_chat_talks_to_it(server: Server) -> None:
    words = ["chat", server.url, "--api-key-file", str(server.key_file), "--model", "base"]
    result = CliRunner().invoke(app, words, input="Hello\n/quit\n")
    assert result.exit_code == 0, result.output
    assert result.output.startswith(f"base at {server.url}")
    refused = CliRunner().invoke(app, ["chat", server.url], input="Hello\n")
    assert refused.exit_code == 2
    assert "No API key" in " ".join(refused.output.split())


def test_at_the_end_no_process_no_port_and_no_folder_is_left(server: Server) -> None:
    family = psutil.Process(server.process.pid).children(recursive=True)
    arguments = [argument for process in family for argument in process.cmdline()]
    (folder,) = [path for path in sessions() if any(str(path) in argument for argument in arguments)]
    os.kill(server.process.pid, signal.SIGTERM)
    assert server.process.wait(120) == 0
    _, alive = psutil.wait_procs(family, timeout=5)
    assert alive == []
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/models", trust_env=False)
    assert not folder.exists()
