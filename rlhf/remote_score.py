"""Scores of a server elsewhere: one POST per few prompts, JSON there and back (docs/serve.md says how).

request   {"version": 1, "groups": [{"id", "messages": [{"role", "content"}], "extra": {}, "answers": ["..."],
           "ended": ["eos" or "length"]}]}
answer    {"scores": [[0.5, ...], ...]}: a list per group, a number per answer, in the same order
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import httpx
import torch

from configs.schema import Recipe, Stage
from configs.scores import ScoreServerConfig
from rlhf.errors import RecipeError, ScoreError
from rlhf.loopback import is_loopback
from rlhf.records import AnswerGroup
from rlhf.rules import TRIES, OnBadScore

VERSION = 1
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0  # between two tries; each wait is twice the one before
LATER = (408, 425, 429)  # and all from 500 on: the same request may be answered later
LARGEST_BYTES = 64 * 1024**2


class _NoAnswerError(Exception):
    """A request to which no answer came that can be used."""

    def __init__(self, reason: str, *, malformed: bool = False, wait_s: float = 0.0) -> None:
        self.reason, self.malformed, self.wait_s = reason, malformed, wait_s
        super().__init__(reason)


class RemoteScorer:
    """A server as a scorer.

    No answer in time, a broken connection, and HTTP 408, 425, 429 and 5xx are tried again, with growing waits, before
    the recipe's `on_bad_score` decides. An answer that is none of ours (no JSON, another number of scores) is asked for
    again with `retry` alone. `drop` makes the scores of such a request NaN, so that its groups are left out. HTTP 3xx
    and other 4xx stop the run whatever the recipe says: address or token are wrong, and every request would fail.

    Raises RecipeError for an address that cannot be one, and for a token that the environment lacks.
    """

    def __init__(
        self,
        address: str,
        config: ScoreServerConfig,
        on_bad_score: OnBadScore = "stop",
        *,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        try:
            self._url = httpx.URL(address)
        except httpx.InvalidURL as error:
            raise RecipeError(f"{address!r} is no address: {error}.", remedy="Mend it.") from error
        self.name = str(self._url.copy_with(query=None))  # a query may hold what is nobody's business
        self._config, self._sleep = config, sleep
        self._on_bad_score: OnBadScore = on_bad_score
        self._headers = {"Content-Type": "application/json", **_authorization(config.token_env)}

    def scores(self, groups: Sequence[AnswerGroup]) -> torch.Tensor:
        """[N] float32 as the server gave them; NaN where it gave null or, with `drop`, no answer that can be used."""
        size = self._config.prompts_per_request
        flat: list[float] = []
        with self._client() as client:
            for first in range(0, len(groups), size):
                flat += self._part(client, groups[first : first + size])
        return torch.tensor(flat, dtype=torch.float32)

    def check(self) -> None:
        """Nothing, if the server answers a request without groups as it should. Raises ScoreError."""
        with self._client() as client:
            try:
                self._ask(client, ())
            except _NoAnswerError as error:
                raise self._failed(error.reason) from error

    def _client(self) -> httpx.Client:
        # A proxy of the environment cannot reach this machine's own loopback.
        return httpx.Client(
            headers=self._headers, timeout=self._config.timeout_s, trust_env=not is_loopback(self._url.host)
        )

    def _part(self, client: httpx.Client, groups: Sequence[AnswerGroup]) -> list[float]:
        try:
            return self._ask(client, groups)
        except _NoAnswerError as error:
            if self._on_bad_score != "drop":
                raise self._failed(error.reason) from error
            _say(f"{self.name}: {error.reason}; {len(groups)} prompts are left out")
            return [math.nan] * sum(len(group.answers) for group in groups)

    def _ask(self, client: httpx.Client, groups: Sequence[AnswerGroup]) -> list[float]:
        """The scores of one request, flat. Raises _NoAnswerError when all tries are used up."""
        body = json.dumps({"version": VERSION, "groups": [_to_json(group) for group in groups]}).encode()
        left = {True: TRIES - 1 if self._on_bad_score == "retry" else 0, False: self._config.tries - 1}
        wait_s = FIRST_WAIT_S
        while True:
            try:
                return _read(self._post(client, body), groups)
            except _NoAnswerError as error:
                if left[error.malformed] <= 0:
                    raise
                left[error.malformed] -= 1
                pause_s = min(max(wait_s, error.wait_s), LONGEST_WAIT_S)
                _say(f"{self.name}: {error.reason}; asked again in {pause_s:g} s")
                self._sleep(pause_s)
                wait_s *= 2

    def _post(self, client: httpx.Client, body: bytes) -> bytes:
        """What the server answered with 200. Raises ScoreError for what would come again, else _NoAnswerError."""
        deadline = time.monotonic() + self._config.timeout_s
        content = bytearray()
        try:
            with client.stream("POST", self._url, content=body) as response:
                for chunk in response.iter_bytes():
                    content += chunk
                    # httpx's own limit is for each read: a server that sends a byte now and then would never meet it.
                    if time.monotonic() > deadline:
                        raise httpx.ReadTimeout("the answer is not complete")
                    if len(content) > LARGEST_BYTES:
                        raise _NoAnswerError(f"the answer has more than {LARGEST_BYTES} bytes", malformed=True)
        except httpx.TimeoutException as error:
            raise _NoAnswerError(f"no answer within {self._config.timeout_s:g} s (score_server.timeout_s)") from error
        except httpx.HTTPError as error:
            raise _NoAnswerError(f"{type(error).__name__}: {str(error).rstrip('.') or 'no reason given'}") from error
        if response.status_code == httpx.codes.OK:
            return bytes(content)
        reason = f"HTTP {response.status_code} {response.reason_phrase}: {_start(content)}".rstrip(": ")
        if response.status_code in LATER or response.status_code >= 500:
            raise _NoAnswerError(reason, wait_s=_seconds(response.headers.get("retry-after", "")))
        raise self._failed(reason)

    def _failed(self, reason: str) -> ScoreError:
        return ScoreError(
            f"{self.name} gave no scores: {reason}.",
            limit=f"It was asked with score_server.tries={self._config.tries}.",
            remedy="See that the server runs and that address and token (score_server.token_env) are right, and go on "
            "with `tenfold resume`: nothing is lost.",
        )


def check_score_servers(recipe: Recipe, stages: Iterable[Stage]) -> None:
    """Nothing, if all servers answer that these stages ask for scores. Raises RecipeError, ScoreError."""
    for address in recipe.score_servers(tuple(stages)):
        RemoteScorer(address, recipe.score_server).check()


def _to_json(group: AnswerGroup) -> dict[str, Any]:
    return {
        "id": group.prompt.id,
        "messages": [{"role": message.role, "content": message.content} for message in group.prompt.messages],
        "extra": dict(group.prompt.extra),
        "answers": [answer.text for answer in group.answers],
        "ended": [answer.ended for answer in group.answers],
    }


def _read(content: bytes, groups: Sequence[AnswerGroup]) -> list[float]:
    """The scores, flat. Raises _NoAnswerError for what is no answer to these groups."""
    try:
        scores = json.loads(content)["scores"]
        sizes = [len(row) for row in scores]
        flat = [_number(value) for row in scores for value in row]
    except (ValueError, LookupError, TypeError, OverflowError, RecursionError) as error:
        raise _NoAnswerError(
            f'the answer is not {{"scores": [[number, ...], ...]}} ({type(error).__name__}: {error}): '
            f"{_start(content)!r}",
            malformed=True,
        ) from error
    wanted = [len(group.answers) for group in groups]
    if sizes != wanted:
        raise _NoAnswerError(f"the answer has {sizes} scores for groups of {wanted} answers", malformed=True)
    return flat


def _number(value: object) -> float:
    """A score; NaN for null. Raises TypeError for what is no number."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} is no number")
    return float(value)


def _authorization(token_env: str | None) -> dict[str, str]:
    if token_env is None:
        return {}
    token = os.environ.get(token_env, "").strip()
    if not token:
        raise RecipeError(
            f"score_server.token_env={token_env}: the environment has no such variable, or it is empty.",
            remedy=f"Set it (export {token_env}=...), or leave score_server.token_env out.",
        )
    if not (token.isascii() and token.isprintable()):
        raise RecipeError(
            f"score_server.token_env={token_env}: its value holds characters that no header can.",
            limit="A token is printable ASCII.",
            remedy="Set it anew.",
        )
    return {"Authorization": f"Bearer {token}"}


def _seconds(retry_after: str) -> float:
    """The seconds that the header asks to wait; 0 where it is missing, or a date."""
    return float(retry_after) if retry_after.strip().isdecimal() else 0.0


def _start(content: bytes | bytearray) -> str:
    return " ".join(bytes(content[:200]).decode(errors="replace").split())


def _say(text: str) -> None:
    logging.getLogger("tenfold").warning(text)
