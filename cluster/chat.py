"""`tenfold chat`: a conversation in the terminal with any OpenAI-compatible endpoint."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, TextIO

from cluster.served import BASE
from rlhf.errors import ServeError

HELP = "/model NAME: another model (without NAME: which there are), /reset: forget what was said, /quit"
CONNECT_S, ANSWER_S = 10.0, 600.0
STOPPED = " (stopped)"


class Chat:
    """One conversation. Each line of input is a message or a command; answers are written as they come.

    Raises ServeError where there is no endpoint at `url`, it refuses the key, or it has no such model.
    """

    def __init__(
        self, url: str, *, key: str | None = None, model: str | None = None, system: str | None = None, out: TextIO
    ) -> None:
        import openai

        try:
            self._client = openai.OpenAI(
                base_url=api_url(url),
                api_key=key or "none",  # the client wants one; an endpoint without a key does not look
                timeout=openai.Timeout(ANSWER_S, connect=CONNECT_S),
                max_retries=0,
            )
        except Exception as error:  # what it raises for a URL that is none is of no kind that is documented
            raise ServeError(
                f"{url} is no address of an endpoint: {error}.", remedy="Give it as http://HOST:8000."
            ) from error
        self._errors = (openai.OpenAIError, UnicodeError)  # the second of a host's name that is none
        self._out, self._url = out, api_url(url)
        self._system = [{"role": "system", "content": system}] if system else []
        self.history: list[dict[str, str]] = []
        self.models = self._list_models()
        self.model = self._known(model) if model else choose(self.models)

    def run(self, read_line: Callable[[], str]) -> None:
        """Talks until /quit or the end of the input (EOFError)."""
        self._say(f"{self.model} at {self._url}. {HELP}")
        while True:
            try:
                line = read_line().strip()
            except EOFError:
                return
            if line == "/quit":
                return
            if line.startswith("/"):
                self._command(*line[1:].split(maxsplit=1))
            elif line:
                self._answer(line)

    def close(self) -> None:
        """Ends the connection."""
        self._client.close()

    def _command(self, name: str = "", rest: str = "") -> None:
        if name == "reset":
            self.history.clear()
            self._say("(what was said is forgotten)")
        elif name == "model" and rest:
            try:
                self.model = self._known(rest)
                self._say(f"(now {self.model}; what was said stays)")
            except ServeError as error:
                self._say(str(error))
        elif name == "model":
            self._say(f"(now {self.model}; there are {', '.join(self.models)})")
        else:
            self._say(HELP)

    def _answer(self, text: str) -> None:
        """Writes the answer to a message. An answer that Ctrl-C stops is kept as far as it came."""
        asked = [*self.history, {"role": "user", "content": text}]
        written: list[str] = []
        try:
            self._stream(asked, written)
        except KeyboardInterrupt:
            self._out.write(STOPPED)
        except self._errors as error:
            self._say(f"({_why(error)}; the message is not kept)")
            return
        self._say("")
        self.history = [*asked, {"role": "assistant", "content": "".join(written)}]

    def _stream(self, asked: list[dict[str, str]], written: list[str]) -> None:
        messages: Any = [*self._system, *asked]
        with self._client.chat.completions.create(model=self.model, messages=messages, stream=True) as stream:
            for chunk in stream:
                piece = (chunk.choices[0].delta.content or "") if chunk.choices else ""
                written.append(piece)
                self._out.write(shown(piece))
                self._out.flush()

    def _list_models(self) -> list[str]:
        try:
            models = [model.id for model in self._client.models.list()]
        except self._errors as error:
            raise ServeError(
                f"{self._url} cannot be used: {_why(error)}.",
                remedy="Start an endpoint with `tenfold serve RUN`, and give its key with --api-key-file.",
            ) from error
        if not models:
            raise ServeError(f"{self._url} serves no model.", remedy="Name another endpoint.")
        return models

    def _known(self, name: str) -> str:
        if name not in self.models:
            raise ServeError(f"There is no model {name!r}.", limit=f"There are {', '.join(self.models)}.")
        return name

    def _say(self, text: str) -> None:
        self._out.write(text + "\n")
        self._out.flush()


def choose(models: Sequence[str]) -> str:
    """The model to talk to where none is named: what was trained last, not its base."""
    return next((name for name in reversed(models) if name != BASE), models[0])


def is_url(target: str) -> bool:
    """Whether what to talk to is an endpoint that runs, rather than a run."""
    return target.startswith(("http://", "https://"))


def api_url(url: str) -> str:
    """The base URL: that of an endpoint's root gets `/v1`."""
    bare = url.rstrip("/")
    return f"{bare}/v1" if bare.count("/") == 2 else bare


def shown(text: str) -> str:
    """The text without what a terminal would obey: a model may write escape sequences."""
    return "".join(character for character in text if character in "\n\t" or character.isprintable())


def line_reader(source: TextIO) -> Callable[[], str]:
    """Reads a line, with a prompt and editing on a terminal; raises EOFError at the end."""
    if source is sys.stdin and source.isatty():
        import contextlib

        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - input() edits lines once it is there
        return lambda: input("> ")

    def read() -> str:
        if not (line := source.readline()):
            raise EOFError
        return line

    return read


def _why(error: Exception) -> str:
    """A client's error in a line."""
    body: Any = getattr(error, "body", None)
    message = body.get("message") if isinstance(body, dict) else None
    cause = error.__cause__ if error.__cause__ is not None else error
    return " ".join(str(message or str(cause).strip() or type(error).__name__).split()).rstrip(".")
