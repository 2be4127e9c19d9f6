"""A run that waits for people, the page beside it, and scripted people at the page, each a process or a thread."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.rankers import Noise, Ranker
from benchmarks.tales import rule
from cluster.serve import free_port
from requirements.steps import QUIET_S, StepFailed, say
from rlhf.disk import write_file

TENFOLD = (sys.executable, "-m", "cluster.cli")
WAITS = ("people can begin", "people are waited for")  # says the run when the page is wanted
READY = "ready: people rank at"  # says the page when it is there
PEOPLE = ("Ada", "Bo", "Chen")
LOOK_S = 0.5
ENDS_S = 60.0
TAIL_LINES = 15


def two_rounds(recipe: Path, folder: Path, changes: Sequence[str], seed: int) -> dict[str, float]:
    """How many rankings were `handed_in` and how many `seconds` it took, once the run in `folder` is done.

    What was done before is not done again. Raises StepFailed: the run, the page or an invitation failed, or somebody
    was refused something.
    """
    done, step = folder.with_suffix(".json"), f"Two rounds in {folder}"
    if done.exists():
        say(f"{step}: done before")
        return json.loads(done.read_text())
    began = time.monotonic()
    say(f"{step} ...")
    with ExitStack() as stack:
        log, page_log = folder.with_suffix(".log"), folder.with_suffix(".page.log")
        words = ["run", recipe, f"runs={folder.parent}", f"name={folder.name}", *changes]
        process = stack.enter_context(started(words, log))
        for _ in looks(log, began):  # the page is opened when the run says so
            if any(sign in log.read_text() for sign in WAITS) or process.poll() is not None:
                break
        check_code(process, log, step)
        port = free_port()
        tokens = {name: invited(folder, name, port) for name in PEOPLE}
        page = stack.enter_context(started(["annotate", folder, "--port", port], page_log))
        for _ in looks(page_log, began):
            check([], page, page_log)
            if READY in page_log.read_text():
                break
        people = [Ranker(f"http://127.0.0.1:{port}", tokens[n], rule, Noise(), f"{seed} {n}") for n in PEOPLE]
        for person in people:
            person.start()
            stack.callback(person.stop)
        for _ in looks(log, began):
            check(people, page, page_log)
            if process.poll() is not None:
                break
        for person in people:
            person.stop()
            person.join()
        check(people, page, page_log)
        check_code(process, log, step)
    found = {"handed_in": sum(person.num_handed_in for person in people), "seconds": time.monotonic() - began}
    say(f"  done in {found['seconds']:.0f} s")
    write_file(done, json.dumps(found).encode())
    return found


@contextmanager
def started(words: Sequence[str | int | Path], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The command `tenfold` with these words, as a process that has ended when the block ends. Its output: `log`."""
    with log.open("wb") as file:
        command = [*TENFOLD, *map(str, words)]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
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


def looks(log: Path, began: float) -> Iterator[None]:
    """A look every now and then, with the log's last line said where it was quiet for long."""
    said = time.monotonic()
    while True:
        yield
        time.sleep(LOOK_S)
        if time.monotonic() - said > QUIET_S:
            said = time.monotonic()
            say(f"  {said - began:4.0f} s  {(tail(log, 1) or 'at work')[:100]}")


def check_code(process: subprocess.Popen[bytes], log: Path, step: str) -> None:
    """Raises StepFailed where the process ended with an error."""
    if process.poll():
        raise StepFailed(step, tail(log, TAIL_LINES), f"The whole output is in {log}.")


def check(people: Sequence[Ranker], page: subprocess.Popen[bytes], log: Path) -> None:
    """Raises StepFailed where the page ended, or refused somebody something."""
    problems = [person.problem for person in people if person.problem]
    if problems or page.poll() is not None:
        raise StepFailed("Ranking at the page", "\n".join(problems) or tail(log, TAIL_LINES), f"The page's log: {log}.")


def tail(log: Path, num_lines: int) -> str:
    """The last lines of a log."""
    return "\n".join([line for line in log.read_text(errors="replace").splitlines() if line.strip()][-num_lines:])
