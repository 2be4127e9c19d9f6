"""Scripted people who rank at the page: they follow a rule, with noise, and speak to its API as its script does."""

from __future__ import annotations

import html
import random
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

Rule = Callable[[str, str], float]  # (what was asked, an answer) -> in [0, 1]

GRADES = ("good", "fair", "bad", "unusable")
LEAST = (0.5, 0.25, 0.1)  # of what is good, fair, bad
LOOK_S = 1.0  # between two questions whether there is something to rank
MS_PER_ANSWER = 3000  # of thought, as they say


@dataclass(frozen=True, slots=True)
class Noise:
    """How a person's eye differs from the rule."""

    std: float = 0.1  # of what is added to each answer's score
    margin: float = 0.04  # answers nearer than this to the best of their tier are called equal
    swaps: float = 0.1  # the probability with which two tiers that follow one another are put the wrong way round


def ranked(scores: Mapping[str, float], noise: Noise, draw: random.Random) -> dict[str, list[list[str]]]:
    """The answers by grade, in tiers, best first, as a person with this noise sorts and orders them.

    Args:
        scores: the rule's score of each answer, by its label.
        noise: of the person.
        draw: of the person; the same state gives the same ranking.
    """
    seen = {label: score + draw.gauss(0.0, noise.std) for label, score in scores.items()}
    by_grade: dict[str, list[list[str]]] = {}
    for grade in GRADES:
        labels = sorted((label for label in seen if grade_of(seen[label]) == grade), key=lambda label: -seen[label])
        tiers: list[list[str]] = []
        for label in labels:
            if tiers and seen[tiers[-1][0]] - seen[label] < noise.margin:
                tiers[-1].append(label)
            else:
                tiers.append([label])
        for place in range(1, len(tiers)):
            if draw.random() < noise.swaps:
                tiers[place - 1], tiers[place] = tiers[place], tiers[place - 1]
        by_grade[grade] = [sorted(tier) for tier in tiers]
    return by_grade


def grade_of(score: float) -> str:
    """The grade of what seems so good."""
    return next((grade for grade, least in zip(GRADES, LEAST, strict=False) if score >= least), GRADES[-1])


def plain(shown: str) -> str:
    """The text of a message that the page shows as HTML."""
    return html.unescape(re.sub(r"<[^>]*>", "", shown)).strip()


class Ranker(threading.Thread):
    """A person with a browser, as long as `stop` is not called: asks for tasks, ranks them, and hands them in.

    `problem` says what was refused, if anything was, which ends the thread; `num_handed_in` counts.
    """

    def __init__(self, url: str, token: str, rule: Rule, noise: Noise, seed: str) -> None:
        super().__init__(daemon=True)
        self._url, self._token, self._rule, self._noise = url, token, rule, noise
        self._draw = random.Random(seed)
        self._over = threading.Event()
        self.num_handed_in = 0
        self.problem: str | None = None

    def stop(self) -> None:
        """The end of the working day."""
        self._over.set()

    def run(self) -> None:
        """Signs in and ranks."""
        headers = {"Origin": self._url.rstrip("/"), "Sec-Fetch-Site": "same-origin"}
        try:
            with httpx.Client(base_url=self._url, headers=headers, timeout=60, trust_env=False) as client:
                _ask(client, "POST", "session", {"token": self._token})
                _ask(client, "GET", "me")
                while not self._over.is_set():
                    task = _ask(client, "POST", "tasks/next")["task"]
                    if task is None:
                        self._over.wait(LOOK_S)
                    else:
                        self._rank(client, task)
        except (httpx.HTTPError, Refused) as error:
            if not self._over.is_set():
                self.problem = str(error)

    def _rank(self, client: httpx.Client, task: Mapping[str, Any]) -> None:
        asked = plain(task["turns"][-1]["html"])
        tiers = ranked(
            {card["label"]: self._rule(asked, card["text"]) for card in task["cards"]}, self._noise, self._draw
        )
        grades = {label: grade for grade, of in tiers.items() for tier in of for label in tier}
        verdict = {"grades": grades, "tiers": tiers, "flags": {}, "allWrong": False, "step": 2}
        spent_ms = MS_PER_ANSWER * len(grades)
        state = {"verdict": verdict, "rev": len(grades), "base": task["created"]}
        _ask(client, "PUT", f"tasks/{task['id']}/draft", {"state": state, "time_ms": spent_ms // 2})
        said = {"tiers": in_order(tiers), "grades": grades, "flags": {}, "all_wrong": False, "time_ms": spent_ms}
        _ask(client, "POST", f"tasks/{task['id']}/verdict", said)
        self.num_handed_in += 1


class Refused(Exception):
    """The page did not take a request."""


def in_order(tiers: Mapping[str, Sequence[Sequence[str]]]) -> list[list[str]]:
    """All tiers, best first."""
    return [list(tier) for grade in GRADES for tier in tiers[grade]]


def _ask(client: httpx.Client, method: str, path: str, body: Any = None) -> Any:
    """What the page answers; a server that is away is asked again, as the page's script does."""
    for wait_s in (0.5, 1.0, 2.0, 4.0, 8.0, None):
        try:
            answer = client.request(method, f"/api/{path}", json=body)
        except httpx.TransportError:
            if wait_s is None:
                raise
        else:
            if answer.status_code < 300:
                return answer.json()
            if answer.status_code < 500 or wait_s is None:
                raise Refused(f"{method} {path}: {answer.status_code} {answer.text[:200]}")
        time.sleep(wait_s)
    raise AssertionError("the last time raises")
