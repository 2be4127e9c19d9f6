"""A cluster's jobs in memory: what they say, and when they end, is written down before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from cluster.jobs import Job, JobError, JobInfo, Parts


class FakeJobs:
    """`Jobs` of a cluster that exists in this object only."""

    address = "http://head:8265"
    limit_bytes = 1024**2

    def __init__(self, *infos: JobInfo) -> None:
        self.infos = {info.job_id: info for info in infos}
        self.submitted: list[Job] = []
        self.packages: list[bytes] = []
        self.said: dict[str, str] = {}
        self.connections: list[list[str]] = []  # what each call of `tail` gives before it breaks or ends
        self.stops: list[str] = []
        self.terminated: list[str] = []
        self.heeds_sigterm = True
        self.looks_until_over = 2  # calls of `info` after a stop that still say "running"
        self.has: dict[str, list[Parts]] = {}  # what `parts` says, call by call; the last for good
        self.workers: frozenset[tuple[str, int]] = frozenset()

    def submit(self, job: Job) -> None:
        self.submitted.append(job)
        with open(str(job.runtime_env["working_dir"]), "rb") as package:
            self.packages.append(package.read())
        self.infos[job.job_id] = JobInfo(job.job_id, "RUNNING", job.metadata, started_ms=len(self.infos))

    def list(self) -> Sequence[JobInfo]:
        return tuple(self.infos.values())

    def info(self, job_id: str) -> JobInfo:
        if job_id in self.stops or (job_id in self.terminated and self.heeds_sigterm):
            if self.looks_until_over <= 0:
                self.infos[job_id] = replace(self.infos[job_id], state="STOPPED")
            self.looks_until_over -= 1
        return self.infos[job_id]

    def logs(self, job_id: str) -> str:
        return self.said.get(job_id, "")

    def tail(self, job_id: str) -> Iterator[str]:
        yield from self.connections.pop(0)
        if self.connections:
            raise ConnectionError("broken")
        self.infos[job_id] = replace(self.infos[job_id], state="SUCCEEDED", exit_code=0)

    def terminate(self, info: JobInfo) -> bool:
        self.terminated += [info.job_id] if info.pid else []
        return bool(info.pid)

    def stop(self, job_id: str) -> None:
        if self.infos[job_id].is_over:
            raise JobError("over")
        self.stops.append(job_id)

    def parts(self, info: JobInfo) -> Parts:
        told = self.has.get(info.job_id, [Parts()])
        return told.pop(0) if len(told) > 1 else told[0]

    def alive(self, processes: frozenset[tuple[str, int]]) -> frozenset[tuple[str, int]]:
        return processes & self.workers
