"""Runs as jobs of a cluster, found by the run's name. Nothing of Ray in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from rlhf.errors import TenfoldError

State = Literal["PENDING", "RUNNING", "STOPPED", "SUCCEEDED", "FAILED"]
OVER: tuple[State, ...] = ("STOPPED", "SUCCEEDED", "FAILED")
RUN, FOLDER, PYTHON = "tenfold.run", "tenfold.folder", "tenfold.python"  # keys of a job's metadata


class JobError(TenfoldError):
    """A job that cannot be submitted, found, followed or stopped, or a cluster that does not let us."""


@dataclass(frozen=True, slots=True)
class Job:
    """What is asked of the cluster."""

    job_id: str
    entrypoint: str  # a shell command
    runtime_env: Mapping[str, object]  # may hold secrets, under env_vars: never printed, never written
    metadata: Mapping[str, str]  # kept by the cluster, for everybody to see


@dataclass(frozen=True, slots=True)
class JobInfo:
    """What the cluster says of a job."""

    job_id: str
    state: State
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    started_ms: int | None = None  # Unix time
    ended_ms: int | None = None
    exit_code: int | None = None  # of the entry point, once it has ended by itself
    message: str = ""
    driver: str = ""  # Ray's own id of the job, which its actors carry; empty until the driver has connected
    pid: int = 0  # of the entry point on its node; 0 until then
    node: str = ""  # the id of that node

    @property
    def is_over(self) -> bool:
        return self.state in OVER

    @property
    def run(self) -> str:
        """The run's name, or nothing for a job that is not ours."""
        return self.metadata.get(RUN, "")

    @property
    def folder(self) -> str:
        """The run folder, as the cluster sees it."""
        return self.metadata.get(FOLDER, "")


@dataclass(frozen=True, slots=True)
class Parts:
    """What a job has on the cluster."""

    actors: frozenset[str] = frozenset()  # "CLASS ID" of those that are not dead
    placement_groups: frozenset[str] = frozenset()  # ids of those that are not removed
    processes: frozenset[tuple[str, int]] = frozenset()  # (node, pid) of those actors

    def __bool__(self) -> bool:
        return bool(self.actors or self.placement_groups or self.processes)

    def __str__(self) -> str:
        return "; ".join(
            f"{name}: {', '.join(sorted(map(str, there)))}"
            for name, there in (
                ("actors", self.actors),
                ("placement groups", self.placement_groups),
                ("processes", {f"{pid} on {node[:8]}" for node, pid in self.processes}),
            )
            if there
        )


class Jobs(Protocol):
    """The jobs of one cluster. Every method raises JobError for a cluster that is not there or does not let us."""

    @property
    def address(self) -> str:
        """Of the cluster's job server, such as http://HEAD:8265."""
        ...

    @property
    def limit_bytes(self) -> int:
        """A package must be smaller than this."""
        ...

    def submit(self, job: Job) -> None:
        """Uploads the working directory, if the cluster does not have it yet, and asks for the job."""
        ...

    def list(self) -> Sequence[JobInfo]:
        """All jobs that the cluster remembers."""
        ...

    def info(self, job_id: str) -> JobInfo: ...

    def logs(self, job_id: str) -> str:
        """All that the entry point has printed so far."""
        ...

    def tail(self, job_id: str) -> Iterator[str]:
        """What the entry point prints, from its first line on, until the job is over or the connection breaks."""
        ...

    def terminate(self, info: JobInfo) -> bool:
        """Sends SIGTERM to the entry point alone; False if it is not known yet which process that is."""
        ...

    def stop(self, job_id: str) -> None:
        """Asks for the end: SIGTERM to all processes of the job, and a kill once the job's own limit is over."""
        ...

    def parts(self, info: JobInfo) -> Parts:
        """What the job has on the cluster now."""
        ...

    def alive(self, processes: frozenset[tuple[str, int]]) -> frozenset[tuple[str, int]]:
        """Those of these (node, pid) that are still workers of the cluster."""
        ...


def find_job(jobs: Jobs, run: str) -> JobInfo:
    """The job of a run, given by the run's name or by the job's id: the one that is not over, or else the newest.

    Raises JobError where there is none, and where several runs have that name: their job ids are named.
    """
    ours = [info for info in jobs.list() if info.run]
    for info in ours:
        if info.job_id == run:
            return info
    found = sorted((info for info in ours if info.run == run), key=lambda info: info.started_ms or 0)
    if not found:
        known = sorted({info.run for info in ours})
        raise JobError(
            f"There is no job of a run {run!r} at {jobs.address}.",
            remedy=f"There are jobs of {', '.join(known)}." if known else "No job of Tenfold's was submitted there.",
        )
    live = [info for info in found if not info.is_over]
    if len(live) > 1 or (not live and len({info.folder for info in found}) > 1):
        told = "; ".join(f"{info.job_id} ({info.state.lower()}, {info.folder})" for info in live or found)
        raise JobError(
            f"There are several jobs of a run {run!r} at {jobs.address}: {told}.", remedy="Name one of them by its id."
        )
    return (live or found)[-1]


def refuse_second(jobs: Jobs, run: str) -> None:
    """Nothing, unless a job of that run is not over yet: JobError."""
    for info in jobs.list():
        if info.run == run and not info.is_over:
            raise JobError(
                f"The run {run!r} has a job at {jobs.address} already: {info.job_id}, {info.state.lower()}.",
                limit="A run belongs to one job at a time.",
                remedy=f"Follow it (`tenfold logs {run} --follow`), stop it (`tenfold stop {run}`), or set another "
                "name=...",
            )
