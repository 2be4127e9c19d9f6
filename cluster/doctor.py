"""`tenfold doctor`: on this machine with a Ray of its own, or as a job of a cluster."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, redirect_stdout
from typing import Any

from cluster.checks import Check, examine
from cluster.console import StreamConsole, make_console
from cluster.jobs import FOLDER, RUN, JobError, Jobs
from cluster.submit import Asked, bare_submission, send
from configs.schema import ClusterConfig

MARK = "tenfold-doctor "  # before the lines as JSON, in the job's log
NAME = "doctor"


def doctor_here(console: StreamConsole, *, generates: bool) -> list[Check]:
    """The lines for this machine."""
    return _look(ClusterConfig(), console, generates)


def doctor_there(jobs: Jobs, access: str, asked: Asked, console: StreamConsole, *, generates: bool) -> list[Check]:
    """The lines for a cluster, found by a job there, after those for the way to it.

    Raises JobError where the job does not come to its end.
    """
    from cluster.job_watch import Lines, follow

    command = [asked.python, "-m", "cluster.doctor", *([] if generates else ["--no-generator"])]
    submission = bare_submission(command, {RUN: NAME, FOLDER: ""}, asked)
    send(jobs, submission, console)
    said: list[str] = []
    lines = Lines(lambda text: _pass_on(text, said, console))
    info = follow(jobs, submission.job.job_id, lines.write)
    lines.close()
    found = [text for text in said if text.startswith(MARK)]
    if not found:
        raise JobError(
            f"The doctor's job {info.job_id} ended ({info.state.lower()}) without a word.",
            remedy=f"See `tenfold logs {info.job_id} --address {jobs.address}`.",
        )
    return [*way(jobs.address, access), *(Check(**line) for line in json.loads(found[-1].removeprefix(MARK)))]


def way(address: str, access: str) -> list[Check]:
    """The lines for the way to a cluster: whether its job server asks for a token, and whether others can listen."""
    from cluster.ray_jobs import warnings_of

    said = warnings_of(address, access)  # pyright: ignore[reportArgumentType]
    told = {"token": "a token is asked for", "open": "no token is asked for", "unknown": "not known"}[access]
    return [Check("job server", "mend" if said else "ok", f"{address}: {told}", " ".join(said))]


def table(checks: Sequence[Check]) -> str:
    """The lines for people."""
    return "\n".join(map(str, checks))


def _pass_on(text: str, said: list[str], console: StreamConsole) -> None:
    for line in text.splitlines():
        said.append(line)
        if not line.startswith(MARK):
            console.say(line)


def _look(config: ClusterConfig, console: StreamConsole, generates: bool) -> list[Check]:
    from cluster.node_probe import look
    from cluster.ray_session import RaySession

    with ExitStack() as stack:
        with console.task("start Ray" if config.address is None else "reach Ray"):
            stack.enter_context(RaySession(config))
        return examine(look(console, generates=generates))


def main(words: Sequence[str]) -> int:
    """What the job does: the lines, as one line of JSON. The exit code is 0 if they could be made."""
    from cluster.run import exit_code

    console = make_console(sys.stderr)
    found: list[Mapping[str, Any]] = []

    def work() -> None:
        checks = _look(ClusterConfig(address="auto"), console, "--no-generator" not in words)
        found.extend(check.to_json() for check in checks)

    with console, redirect_stdout(sys.stderr):
        code = exit_code(console, "tenfold doctor", work)
    if not code:
        print(MARK + json.dumps(found), flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
