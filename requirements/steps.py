"""Runs one step of the set-up: never silent for long, its whole output in a log, a failure told with its remedy.

Only the standard library, since it runs before anything is installed.
"""

from __future__ import annotations

import collections
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

QUIET_S = 8.0  # something is said at least so often
TAIL_LINES = 15

REMEDIES = (
    ("No space left on device", "Free disk space, then run the same command again."),
    (
        "Temporary failure in name resolution",
        "Check the network (and HTTPS_PROXY, if you need one), then run the same command again.",
    ),
    ("Connection", "Check the network (and HTTPS_PROXY, if you need one), then run the same command again."),
    (
        "No matching distribution found",
        "pip's index lacks this version: check `pip config list`, or resolve others with `make lock`.",
    ),
    ("Permission denied", "Make the repository's folder writable for you, then run the same command again."),
)


class StepFailed(Exception):
    """A step that did not work: which, why, and what to do."""

    def __init__(self, step: str, why: str, remedy: str) -> None:
        super().__init__(f"FAILED: {step}\n{_indented(why)}\n{remedy}")
        self.step, self.why, self.remedy = step, why, remedy


def say(text: str) -> None:
    """Prints a line at once, also into a pipe."""
    print(text, flush=True)


def exit_code(work: Callable[[], None], folder: Path) -> int:
    """0, or 1 with the failed step printed, or 130 after an interrupt. `folder` is what the work writes to."""
    try:
        work()
    except StepFailed as error:
        say(str(error))
        return 1
    except OSError as error:
        remedy = "Free disk space, or make the folder writable for you, then run the same command again."
        say(str(StepFailed(f"Writing {folder}", str(error), remedy)))
        return 1
    except KeyboardInterrupt:
        say("Stopped. Run the same command again to go on.")
        return 130
    return 0


def run(
    step: str,
    command: Sequence[str | Path],
    *,
    log: Path,
    env: Mapping[str, str] | None = None,
    quiet_s: float = QUIET_S,
) -> str:
    """What the command printed (both streams), which is appended to `log` as well.

    Prints the step's name, then a line every `quiet_s` seconds with what the command said last, then how long it took.
    Raises StepFailed where the command cannot be started or exits with a code other than 0.
    """
    say(f"{step} ...")
    began = time.monotonic()
    lines: list[str] = []
    latest: collections.deque[str] = collections.deque(maxlen=1)
    log.parent.mkdir(parents=True, exist_ok=True)
    try:
        process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=env,
        )
    except OSError as error:
        raise StepFailed(step, str(error), f"Check that {command[0]} exists and may be run.") from error
    reader = threading.Thread(target=_read, args=(process, log, lines, latest), daemon=True)
    reader.start()
    try:
        while reader.is_alive():
            reader.join(quiet_s)
            if reader.is_alive():
                say(f"  {time.monotonic() - began:4.0f} s  {_short(latest[0] if latest else 'at work')}")
        code = process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if code:
        tail = "\n".join(line for line in lines if line.strip()).splitlines()[-TAIL_LINES:]
        raise StepFailed(step, "\n".join(tail) or f"exit code {code}", f"{_remedy(tail)} The whole output is in {log}.")
    say(f"  done in {time.monotonic() - began:.0f} s")
    return "\n".join(lines)


def _read(process: subprocess.Popen[str], log: Path, lines: list[str], latest: collections.deque[str]) -> None:
    assert process.stdout is not None
    with process.stdout as output, log.open("a", encoding="utf-8") as file:
        for line in output:
            file.write(line)
            file.flush()
            lines.append(line.rstrip("\n"))
            if line.strip() and not line.startswith("WARNING"):
                latest.append(line.strip())


def _short(line: str) -> str:
    return line if len(line) <= 100 else line[:97] + "..."


def _indented(text: str) -> str:
    return "\n".join(f"  | {line}" for line in text.splitlines())


def _remedy(tail: Sequence[str]) -> str:
    text = "\n".join(tail)
    for sign, remedy in REMEDIES:
        if sign in text:
            return remedy
    return "Mend what the lines above name, then run the same command again: what is done already is kept."
