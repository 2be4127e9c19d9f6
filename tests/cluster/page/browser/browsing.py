"""A server that can be killed, and people in Chromium."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Dialog, Page, sync_playwright

from cluster.serve import free_port
from rlhf.desk.desk import Desk
from rlhf.records import Answer, AnswerGroup, Message, Prompt

ROOT = Path(__file__).parents[4]
PHONE: dict[str, Any] = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
STARTS_S = 60.0


class Server:
    """The page's server over one database, on one port, however often it is killed."""

    def __init__(self, database: str) -> None:
        self.database, self.port = database, free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def start(self) -> None:
        command = [sys.executable, "-m", "tests.cluster.page.browser.served", self.database, str(self.port)]
        self._process = subprocess.Popen(command, cwd=ROOT)
        until = time.monotonic() + STARTS_S
        while True:
            with socket.socket() as trial:
                if trial.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            assert self._process.poll() is None and time.monotonic() < until, "the server does not start"
            time.sleep(0.1)

    def kill(self) -> None:
        """kill -9: it has no moment to put anything away."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


@contextmanager
def chromium() -> Iterator[Browser]:
    """Debian's browser. Skips where there is none."""
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("Chromium is not installed: apt-get install -y --no-install-recommends chromium")
    flags = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=flags)
        yield browser
        browser.close()


class Visit:
    """One person in a browser of their own, with all that must not happen written down."""

    def __init__(self, browser: Browser, url: str, token: str, **context: Any) -> None:
        self.context: BrowserContext = browser.new_context(**context)
        self.context.set_default_timeout(30_000)
        self.page: Page = self.context.new_page()
        self.dialogs: list[str] = []
        self.errors: list[str] = []
        self.elsewhere: list[str] = []
        self.page.on("dialog", self._shown)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self._heard)
        self.context.on("request", lambda request: self._asked(request.url, url))
        self.page.goto(f"{url}#{token}")

    def _shown(self, dialog: Dialog) -> None:
        self.dialogs.append(dialog.message)
        dialog.dismiss()

    def _heard(self, message: Any) -> None:
        # A server that is away, and the 401 of who is not signed in yet, are told by the browser itself.
        if message.type == "error" and "Failed to load resource" not in message.text:
            self.errors.append(message.text)

    def _asked(self, address: str, url: str) -> None:
        if not address.startswith(url):
            self.elsewhere.append(address)

    def nothing_happened(self) -> None:
        """No dialog, no error, no violation of the policy, no request elsewhere."""
        assert (self.dialogs, self.errors, self.elsewhere) == ([], [], [])

    def saved(self) -> None:
        """Waits until the server has all."""
        self.page.wait_for_selector("#saved[data-kind=saved]")

    def handed_in(self, num: int) -> None:
        """Waits until so many tasks were handed in and the next one is there, or none is left."""
        self.page.wait_for_function(
            "num => document.getElementById('count').textContent.startsWith(num + ' ') "
            "&& document.getElementById('message').hidden",
            arg=num,
        )

    def labels(self) -> list[str]:
        """The labels of the cards, as they stand."""
        return self.page.eval_on_selector_all(".card", "cards => cards.map(card => card.dataset.label)")


Come = Callable[..., Visit]  # somebody new opens the link of their invitation


def ten_answers(name: str, question: str = "Why is the sky blue?") -> AnswerGroup:
    """A group whose answers say which they are, in Markdown, some of them long."""
    texts = [
        f"**Answer number {i}** of {name}.\n\n" + "\n\n".join(f"- point {j} of `{i}`" for j in range(2 + 5 * (i % 3)))
        for i in range(10)
    ]
    answers = tuple(Answer((i,), (-1.0,), "eos", 0, text) for i, text in enumerate(texts))
    return AnswerGroup(Prompt(name, (Message("user", f"{question} ({name})"),), (1,)), answers)


def index_by_label(desk: Desk, person: str, prompt_id: str | None = None) -> dict[str, int]:
    """Which answer stood under which label, for what a person handed in last."""
    found = desk.submissions(person=person, prompt_id=prompt_id)[-1]
    return {"ABCDEFGHIJKLMNOPQRSTUVWXYZ"[place]: index for place, index in enumerate(found.order)}
