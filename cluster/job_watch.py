"""A job is followed to its end, stopped, and told of."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime

from cluster.jobs import JobError, JobInfo, Jobs, Parts
from rlhf.ports import Console
from rlhf.wording import duration

POLL_S = 1.0
GENTLE_S = 60.0  # for the entry point to end by itself, before Ray ends all processes of the job
SETTLE_S = 30.0  # after the end, for the cluster to take away what the job had
WANDB = "W&B: "  # how the line of a run's log begins that says where its W&B run is


def follow(
    jobs: Jobs, job_id: str, write: Callable[[str], None], *, sleep: Callable[[float], None] = time.sleep
) -> JobInfo:
    """What became of a job, once it is over; until then all that it prints is given to `write`, each part once.

    A connection that breaks is made again, and what was written is not written again.
    """
    written = 0
    while True:
        seen = 0
        try:
            for part in jobs.tail(job_id):
                fresh = part[max(written - seen, 0) :]
                seen += len(part)
                if fresh:
                    write(fresh)
                    written += len(fresh)
        except ConnectionError:
            pass
        info = jobs.info(job_id)
        if info.is_over:
            # What the entry point said last may have come after the connection broke.
            if rest := jobs.logs(job_id)[written:]:
                write(rest)
            return info
        sleep(POLL_S)


class Lines:
    """Takes text in parts of any size, and gives it on in whole lines."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._rest = say, ""

    def write(self, text: str) -> None:
        whole, newline, self._rest = (self._rest + text).rpartition("\n")
        if newline:
            self._say(whole)

    def close(self) -> None:
        """Gives on what has no end of line."""
        if self._rest:
            self._say(self._rest)
            self._rest = ""


@dataclass(frozen=True, slots=True)
class Stopped:
    """How a stop went."""

    info: JobInfo
    was_over: bool  # before it was asked
    left: Parts  # what the job still had at the end; nothing, if all is well


def stop_job(
    jobs: Jobs,
    info: JobInfo,
    console: Console,
    *,
    wait_s: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Stopped:
    """How it went: the entry point gets SIGTERM and closes the run; then it is looked whether anything is left.

    Ray's own stop comes second: it sends SIGTERM to W&B's service too, which the run needs for closing.
    Raises JobError if the job is not over after `wait_s`.
    """
    was_over, had = info.is_over, jobs.parts(info)
    if not was_over:
        with console.task(f"stop {info.job_id}"):
            began = clock()
            asked = not jobs.terminate(info)
            if asked:
                jobs.stop(info.job_id)
            while not (info := jobs.info(info.job_id)).is_over:
                if clock() - began >= wait_s:
                    raise JobError(
                        f"The job {info.job_id} is still {info.state.lower()}.",
                        limit=f"The limit is --wait-s {wait_s:g}.",
                        remedy="Look at its log (`tenfold logs`), and ask once more.",
                    )
                if not asked and clock() - began >= GENTLE_S:
                    jobs.stop(info.job_id)
                    asked = True
                sleep(POLL_S)
    deadline = clock() + SETTLE_S
    while left := _left(jobs, info, had):
        if clock() >= deadline:
            break
        sleep(POLL_S)
    return Stopped(info, was_over, left)


def _left(jobs: Jobs, info: JobInfo, had: Parts) -> Parts:
    now = jobs.parts(info)
    return Parts(now.actors, now.placement_groups, jobs.alive(had.processes | now.processes))


def wandb_link(log: str) -> str:
    """Where the W&B run is, as the log of a run says last; empty if it does not."""
    lines = [line.strip() for line in log.splitlines()]
    return next((line.removeprefix(WANDB) for line in reversed(lines) if line.startswith(WANDB)), "")


def describe(info: JobInfo, address: str, log: str, now_s: float | None = None) -> dict[str, object]:
    """A job as plain values that JSON can hold."""
    began, ended = info.started_ms, info.ended_ms
    until_s = ended / 1000 if ended else (time.time() if now_s is None else now_s)
    said = [line for line in log.splitlines() if line.strip()]
    return {
        "address": address,
        "job": info.job_id,
        "run": info.run,
        "folder": info.folder,
        "state": info.state.lower(),
        "started": datetime.fromtimestamp(began / 1000).astimezone().isoformat(timespec="seconds") if began else None,
        "time_s": round(until_s - began / 1000, 1) if began else None,
        "exit_code": info.exit_code,
        "wandb": wandb_link(log) or None,
        "last_line": said[-1] if said else None,
    }


def told(about: Mapping[str, object]) -> str:
    """The same for people, a line for each thing that is known."""
    time_s = about["time_s"]
    after = f" for {duration(time_s)}" if isinstance(time_s, (int, float)) else ""
    code = f", exit code {about['exit_code']}" if about["exit_code"] is not None else ""
    lines = {
        "run": about["run"],
        "job": f"{about['job']} at {about['address']}",
        "state": f"{about['state']}{after}{code}",
        "folder": about["folder"],
        "W&B": about["wandb"],
        "last line": about["last_line"],
    }
    return "\n".join(f"{name:<10} {value}" for name, value in lines.items() if value)
