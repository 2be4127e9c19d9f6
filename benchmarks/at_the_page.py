"""A run that waits for people, the page beside it, and scripted people at the page, each a process or a thread."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from benchmarks.rankers import Noise, Ranker
from benchmarks.tales import rule
from cluster.serve import free_port
from requirements.steps import QUIET_S, StepFailed, say

TENFOLD = (sys.executable, "-m", "cluster.cli")
PEOPLE = ("Ada", "Bo", "Chen")
LOOK_S = 0.5
BEGINS_S = 120.0  # until the run folder, or the page, is there
ENDS_S = 60.0
TAIL_LINES = 15


def two_rounds(recipe: Path, folder: Path, changes: Sequence[str], seed: int) -> int:
    """How many rankings were handed in, once the run in `folder` is done; 0 where it was done before.

    Raises StepFailed: the run, the page or an invitation failed, or somebody was refused something.
    """
    if (folder / "models" / "policy-round-2").is_dir():
        say(f"{folder}: done before")
        return 0
    command = ["run", recipe, f"runs={folder.parent}", f"name={folder.name}", *changes]
    step, began = f"Two rounds in {folder}", time.monotonic()
    say(f"{step} ...")
    with ExitStack() as stack:
        log = folder.parent / f"{folder.name}.log"
        process = stack.enter_context(started(command, stack.enter_context(log.open("w"))))
        wait_until(lambda: (folder / "manifest.json").exists(), process, log, step)
        port = free_port()
        tokens = {name: invited(folder, name, port) for name in PEOPLE}
        page_log = folder.parent / f"{folder.name}-page.log"
        page = stack.enter_context(
            started(["annotate", folder, "--port", port], stack.enter_context(page_log.open("w")))
        )
        wait_until(lambda: "ready: people rank at" in page_log.read_text(), page, page_log, "Serving the page")
        people = [Ranker(f"http://127.0.0.1:{port}", tokens[n], rule, Noise(), f"{seed} {n}") for n in PEOPLE]
        for person in people:
            person.start()
            stack.callback(person.stop)
        said = time.monotonic()
        while process.poll() is None:
            time.sleep(LOOK_S)
            check(people, page, page_log)
            if time.monotonic() - said > QUIET_S:
                said = time.monotonic()
                say(f"  {said - began:4.0f} s  {(tail(log, 1) or 'at work')[:100]}")
        for person in people:
            person.stop()
            person.join()
        check(people, page, page_log)
        if process.returncode:
            raise StepFailed(step, tail(log, TAIL_LINES), f"The whole output is in {log}.")
    say(f"  done in {time.monotonic() - began:.0f} s")
    return sum(person.num_handed_in for person in people)


@contextmanager
def started(words: Sequence[str | int | Path], log: IO[str]) -> Iterator[subprocess.Popen[bytes]]:
    """The command `tenfold` with these words, as a process that has ended when the block ends."""
    command = [*TENFOLD, *map(str, words)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        try:
            process.wait(ENDS_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def invited(folder: Path, name: str, port: int) -> str:
    """The token of a person: a new one, or of somebody who was invited before."""
    for how in ("--invite", "--renew"):
        command = [*TENFOLD, "annotate", str(folder), how, name, "--port", str(port), "--json"]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode == 0:
            return json.loads(done.stdout)["link"].partition("#")[2]
    raise StepFailed(f"Inviting {name}", done.stderr, f"Remove {folder} to begin from nothing.")


def wait_until(there: Callable[[], bool], process: subprocess.Popen[bytes], log: Path, step: str) -> None:
    """Returns once it is there. Raises StepFailed where the process ends before, or it takes too long."""
    until = time.monotonic() + BEGINS_S
    while not there():
        if process.poll() is not None or time.monotonic() > until:
            raise StepFailed(step, tail(log, TAIL_LINES), f"The whole output is in {log}.")
        time.sleep(LOOK_S)


def check(people: Sequence[Ranker], page: subprocess.Popen[bytes], log: Path) -> None:
    """Raises StepFailed where the page ended, or refused somebody something."""
    problems = [person.problem for person in people if person.problem]
    if problems or page.poll() is not None:
        raise StepFailed("Ranking at the page", "\n".join(problems) or tail(log, TAIL_LINES), f"The page's log: {log}.")


def tail(log: Path, num_lines: int) -> str:
    """The last lines of a log."""
    return "\n".join([line for line in log.read_text(errors="replace").splitlines() if line.strip()][-num_lines:])
