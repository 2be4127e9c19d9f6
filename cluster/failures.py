"""What went wrong in a group, in words: from Ray's errors to ours."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ray.exceptions import ActorDiedError, ActorUnavailableError, OutOfMemoryError, RayError, RayTaskError

from rlhf.errors import PlacementError, TenfoldError

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class WorkerLost(PlacementError):
    """A worker's process or node went away in mid-call."""

    host = ""  # the address of its node


class CallLate(PlacementError):
    """A call did not return before its deadline."""


class WorkerRaised(RuntimeError):
    """A role raised something that is no mistake of the user's: a bug, told with the worker's traceback."""


@dataclass(frozen=True, slots=True)
class Asked:
    """Who was asked for what, for messages."""

    group: str
    rank: int
    num_workers: int
    host: str  # the node's address
    pid: int
    what: str  # "policy.update"

    def __str__(self) -> str:
        return f"{self.what} on worker {self.rank} of {self.num_workers} of the group {self.group!r}"


def explain(error: RayError, asked: Asked) -> Exception:
    """Our error for Ray's: a TenfoldError comes through as it was raised, with the same type."""
    if isinstance(error, RayTaskError):
        cause = error.cause
        if isinstance(cause, TenfoldError):
            return cause
        if type(cause).__name__ == "OutOfMemoryError" and type(cause).__module__.startswith("torch"):
            return PlacementError(
                f"{asked} (node {asked.host}) ran out of GPU memory: {_one_line(str(cause))}",
                remedy="Lower learner.micro_batch_tokens or generator.gpu_memory_share, set "
                "learner.gradient_checkpointing, or use more GPUs.",
            )
        return WorkerRaised(
            f"{asked} (process {asked.pid} on {asked.host}) raised {type(cause).__name__}: {cause}\n"
            f"The worker's traceback:\n{_COLOUR.sub('', str(error)).strip()}"
        )
    if isinstance(error, ActorUnavailableError):
        what = "cannot be reached"
    elif isinstance(error, (ActorDiedError, OutOfMemoryError)):
        what = "is gone"
    else:
        what = "cannot be asked"
    lost = WorkerLost(
        f"Worker {asked.rank} of {asked.num_workers} of the group {asked.group!r} {what} (process {asked.pid} on node "
        f"{asked.host}), while it was asked for {asked.what}: {_reason(error)}",
        remedy="Check that node's memory (a process that takes too much is killed) and the worker's log, then run the "
        "same command again: it goes on from what was committed.",
    )
    lost.host = asked.host
    return lost


def late(asked: list[Asked], limit_s: float, setting: str) -> CallLate:
    """The error for calls that are over their deadline."""
    one = asked[0]
    ranks = ", ".join(str(each.rank) for each in asked)
    nodes = ", ".join(sorted({each.host for each in asked}))
    return CallLate(
        f"Waited {limit_s:g} s for {one.what} on worker {ranks} of {one.num_workers} of the group {one.group!r} "
        f"(node {nodes}).",
        limit=f"The limit is {setting}={limit_s:g}.",
        remedy=f"Raise {setting} if the work takes so long; else see the worker's log for what it hangs at.",
    )


def _reason(error: RayError) -> str:
    """What Ray says of a death, without the identifiers and the guesses."""
    lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith("\t")]
    text = " ".join(lines[1:] or lines)
    return _one_line(text.split("Some common causes")[0])


def _one_line(text: str) -> str:
    joined = " ".join(text.split())
    return joined if len(joined) <= 400 else f"{joined[:400]}…"
