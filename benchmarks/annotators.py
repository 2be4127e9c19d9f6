"""Many people rank at once, over loopback: how long the page lets them wait, and whether it loses anything.

    python -m benchmarks.annotators [--people 50] [--prompts 5] [--think 2] [--database URL | --postgresql]

Each person, in a thread of their own, signs in, then takes a prompt, thinks, saves drafts on the way, and hands a
ranking in, until they have ranked `--prompts`. The server is a process of its own (uvicorn).
At the end the database is held against what people were told: no ranking lost, none twice, no prompt with more
rankings than its quota. It exits with 1 if any is, or if 95 % of the answers did not come within half a second.

`--database` is an empty database of SQLite or PostgreSQL (its password: PGPASSWORD); left out, SQLite in a temporary
folder. `--postgresql` starts Debian's PostgreSQL for it.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import httpx

from configs.desk import DeskConfig
from rlhf.desk.desk import Desk
from rlhf.records import Answer, AnswerGroup, Message, Prompt
from tests import postgresql
from tests.cluster.page.browser.browsing import Server

MOST_S = 0.5  # for 95 % of the answers
DRAFTS = 3  # saved on the way to a ranking
QUOTA = 2
WORDS = ("a", "model", "writes", "ten", "answers", "and", "people", "say", "which", "they", "would", "rather", "read")


@dataclass
class Counts:
    """What all people saw, gathered from their threads."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    handed_in: list[tuple[str, int]] = field(default_factory=list)  # (person, task)
    problems: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


def group(number: int, num_words: int) -> AnswerGroup:
    """A prompt with ten answers of so many words."""
    draw = random.Random(number)
    texts = [f"**{i}** " + " ".join(draw.choice(WORDS) for _ in range(num_words)) for i in range(10)]
    answers = tuple(Answer((i,), (-1.0,), "eos", 0, text) for i, text in enumerate(texts))
    return AnswerGroup(Prompt(f"p{number}", (Message("user", f"Question {number}?"),), (1,)), answers)


def work(url: str, name: str, token: str, prompts: int, think_s: float, counts: Counts) -> None:
    """One person's session."""
    draw = random.Random(name)
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:

        def ask(kind: str, method: str, path: str, body: Any = None) -> Any:
            began = time.perf_counter()
            answer = client.request(method, path, json=body)
            spent = time.perf_counter() - began
            with counts.lock:
                counts.seconds.setdefault(kind, []).append(spent)
                if answer.status_code != 200:
                    counts.problems.append(f"{name}: {method} {path}: {answer.status_code} {answer.text[:200]}")
            return answer.json() if answer.status_code == 200 else {}

        ask("sign in", "POST", "/api/session", {"token": token})
        time.sleep(draw.random() * think_s)  # they do not all begin at the same moment
        for _ in range(prompts):
            task = ask("next", "POST", "/api/tasks/next").get("task")
            if task is None:
                break
            for part in range(DRAFTS):
                time.sleep(think_s / DRAFTS)
                state = {"verdict": {"grades": {}}, "rev": part, "base": None}
                ask("draft", "PUT", f"/api/tasks/{task['id']}/draft", {"state": state, "time_ms": 1000 * part})
            labels = [card["label"] for card in task["cards"]]
            draw.shuffle(labels)
            said = {"tiers": [[label] for label in labels], "time_ms": int(1000 * think_s)}
            if "created" in ask("hand in", "POST", f"/api/tasks/{task['id']}/verdict", said):
                with counts.lock:
                    counts.handed_in.append((name, task["id"]))


def check(desk: Desk, counts: Counts) -> list[str]:
    """What is wrong with the database, held against what people were told."""
    kept = desk.submissions(every_row=True)
    told, found = Counter(counts.handed_in), Counter((one.person, one.task_id) for one in kept)
    wrong = list(counts.problems)
    wrong += [f"lost: {one}" for one in told - found] + [f"twice: {one}" for one in found - told]
    by_prompt = Counter(one.prompt_id for one in kept)
    wrong += [f"{prompt}: {num} rankings" for prompt, num in by_prompt.items() if num > QUOTA]
    return wrong


def measure(database: str, people: int, prompts: int, think_s: float, num_words: int) -> dict[str, Any]:
    """Runs the whole, and gives what the table and the JSON show."""
    counts = Counts()
    with Desk(database, DeskConfig(quota=QUOTA, repeats=0), seed=1) as desk, ExitStack() as stack:
        desk.add_groups([group(i, num_words) for i in range(-(-people * prompts // QUOTA))])
        tokens = {f"person {i:03}": desk.invite(f"person {i:03}") for i in range(people)}
        server = Server(database)
        stack.callback(server.kill)
        began = time.perf_counter()
        threads = [
            threading.Thread(target=work, args=(server.url, name, token, prompts, think_s, counts))
            for name, token in tokens.items()
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        took_s = time.perf_counter() - began
        wrong = check(desk, counts)
    every = [seconds for kind in counts.seconds.values() for seconds in kind]
    return {
        "database": "postgresql" if database.startswith("postgresql") else "sqlite",
        "people": people,
        "rankings": len(counts.handed_in),
        "requests_per_s": len(every) / took_s,
        "p95_s": percentile(every),
        "by_request": {
            kind: {
                "num": len(seconds),
                "median_s": median(seconds),
                "p95_s": percentile(seconds),
                "max_s": max(seconds),
            }
            for kind, seconds in counts.seconds.items()
        },
        "wrong": wrong,
    }


def percentile(seconds: list[float]) -> float:
    """The 95th."""
    return quantiles(seconds, n=20, method="inclusive")[-1] if len(seconds) > 1 else seconds[0]


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--people", type=int, default=50)
    parser.add_argument("--prompts", type=int, default=5, help="that each ranks")
    parser.add_argument("--think", type=float, default=2.0, help="seconds of thought for each")
    parser.add_argument("--words", type=int, default=500, help="of each answer")
    parser.add_argument("--database", help="the URL of an empty database")
    parser.add_argument("--postgresql", action="store_true", help="start Debian's PostgreSQL")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with ExitStack() as stack:
        if given.postgresql:
            database = stack.enter_context(postgresql.server())
        else:
            database = given.database or f"sqlite:///{stack.enter_context(tempfile.TemporaryDirectory())}/rankings.db"
        found = measure(database, given.people, given.prompts, given.think, given.words)
    print(f"{found['people']} people, {found['database']}: {found['rankings']} rankings")
    print(f"  {found['requests_per_s']:.1f} requests/s")
    for kind, row in found["by_request"].items():
        print(
            f"  {kind:8} {row['num']:6}  median {1000 * row['median_s']:6.0f} ms"
            f"  p95 {1000 * row['p95_s']:6.0f} ms  max {1000 * row['max_s']:6.0f} ms"
        )
    print(f"  p95 of all {1000 * found['p95_s']:.0f} ms; wrong: {len(found['wrong'])}")
    print("\n".join(found["wrong"][:20]))
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n")
    return int(bool(found["wrong"]) or found["p95_s"] > MOST_S)


if __name__ == "__main__":
    sys.exit(main())
