"""A group: n workers of one kind, as Ray actors in the run's placement group."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.failures import Asked, WorkerLost, explain, late
from cluster.placement import GroupPlan
from cluster.worker import Seat, Worker
from configs.schema import ClusterConfig
from rlhf.errors import PlacementError, TenfoldError

SETTLE_S = 10.0  # after one worker failed, for the others to end; those that do not wait for it, and never will
FETCH_S = 60.0  # to fetch a result that is there
CLOSE_S = 5.0  # for a worker to close what it started, before its process is killed
STATS_S = 60.0  # between two readings of the workers' memory
SMALL = 1000  # numbers, or characters, that go with each call
Values = tuple[Any, ...]


class Group:
    """The workers of one group, started and met; calls to them have a deadline and say what they waited for.

    Calls may come from several threads: all ranks get them in the same order, since two collective operations in
    different orders would wait for each other for ever. After a worker was lost or a call was late the group is dead:
    its processes are ended, and every later call says why.
    """

    def __init__(self, plan: GroupPlan, home: PlacementGroup, config: ClusterConfig, beside: int = 0) -> None:
        """`beside`: workers of other groups that compute at the same time on the same node, and share its cores."""
        self.plan, self._config, self._beside = plan, config, beside
        self._order = threading.Lock()
        self._num_calls, self._free = 0, threading.Condition()  # of roles, under way
        self._stats: dict[str, dict[str, float]] = {}
        self._stats_asked: dict[Any, int] = {}  # under way
        self._stats_time = 0.0  # when they were asked for
        self._dead, self._lost = "", ""  # why the group has ended; the node's address if by the loss of a worker
        device = "cuda" if plan.gpus else "cpu"
        kind = ray.remote(Worker)
        self._workers: list[Any] = [
            kind.options(
                num_cpus=plan.cpus,
                num_gpus=plan.gpus,
                scheduling_strategy=PlacementGroupSchedulingStrategy(home, placement_group_bundle_index=bundle),
            ).remote(plan.name, rank, plan.num_workers, device)
            for rank, bundle in enumerate(plan.bundles)
        ]
        self.seats: list[Seat] = []
        try:
            self._start()
        except BaseException:
            self.kill()
            raise

    def ensure(self, role: str, factory: str, settings: Any) -> None:
        """Builds a role in all workers, if it is not there."""
        refs = self._submit("ensure", [(role, factory, settings)] * self.plan.num_workers)
        self._await(refs, f"the start of {role}", self._config.call_s, "cluster.call_s")

    def drop(self, role: str) -> None:
        """Lets all workers forget a role."""
        refs = self._submit("drop", [(role,)] * self.plan.num_workers)
        self._await(refs, f"the end of {role}", self._config.call_s, "cluster.call_s")

    def call_all(self, role: str, method: str, *values: Any, **keywords: Any) -> list[Any]:
        """[num_workers] what every worker's role returned for the same values."""
        return self._call(role, method, dict.fromkeys(range(self.plan.num_workers), self._once(values)), keywords)

    def call_first(self, role: str, method: str, *values: Any, **keywords: Any) -> Any:
        """What rank 0 returned for what all workers were asked; the others' results stay where they are."""
        shared = dict.fromkeys(range(self.plan.num_workers), self._once(values))
        return self._call(role, method, shared, keywords, replies=(0,))[0]

    def call_each(self, role: str, method: str, values: Mapping[int, Values], **keywords: Any) -> list[Any]:
        """What the ranks named in `values` returned for values of their own, in that order."""
        return self._call(role, method, values, keywords)

    def call_one(self, rank: int, role: str, method: str, *values: Any, **keywords: Any) -> Any:
        """What one worker's role returned."""
        return self._call(role, method, {rank: values}, keywords)[0]

    def stats(self) -> dict[str, dict[str, float]]:
        """Memory of each worker in GiB, by `GROUP-RANK`, as it was when they were last asked and free.

        They are asked here, every `STATS_S` at most: reading its memory is work for a process. Only the first time, and
        only for workers that are free, this waits; else the answer is for the next time.
        """
        now = time.monotonic()
        if not self._stats_asked and (not self._stats or now - self._stats_time >= STATS_S):
            self._stats_asked, self._stats_time = self._submit("stats", [()] * self.plan.num_workers), now
        ready, _ = ray.wait(list(self._stats_asked), num_returns=self.plan.num_workers, timeout=0)
        if len(ready) == self.plan.num_workers or not (self._stats or self._num_calls):
            asked, self._stats_asked = self._stats_asked, {}
            found = self._await(asked, "memory", self._config.call_s, "cluster.call_s")
            self._stats = {f"{self.plan.name}-{rank}": stats for rank, stats in enumerate(found)}
        return self._stats

    def free_cache(self) -> None:
        """Gives the memory of the GPUs back that no tensor of the workers uses."""
        refs = self._submit("free_cache", [()] * self.plan.num_workers)
        self._await(refs, "its memory to be given back", self._config.call_s, "cluster.call_s")

    def kill(self) -> None:
        """Ends the workers: they may close what they started, then their processes are killed.

        Calls that other threads wait for end with them: when this returns, none of them is inside Ray any more.
        """
        if not self._dead:
            refs = [worker.close.remote() for worker in self._workers]
            ray.wait(refs, num_returns=len(refs), timeout=CLOSE_S)
        self._kill("it was released")
        with self._free:
            self._free.wait_for(lambda: self._num_calls == 0, SETTLE_S)

    def _start(self) -> None:
        deadline = time.monotonic() + self._config.wait_s
        num = self.plan.num_workers

        def left() -> float:
            return max(deadline - time.monotonic(), 0.0)

        def ask(method: str, values: Sequence[Values]) -> list[Any]:
            refs = self._submit(method, values)
            return self._await(refs, "its start", left(), "cluster.wait_s", self._config.wait_s)

        self.seats = ask("seat", [()] * num)
        on_node = Counter(seat.node_id for seat in self.seats)
        before: Counter[str] = Counter()
        set_up: list[Values] = []
        for rank, seat in enumerate(self.seats):
            threads = self._config.threads or max(seat.num_cores // (on_node[seat.node_id] + self._beside), 1)
            listens = self.plan.collective and rank == 0
            set_up.append((before[seat.node_id], threads, float(self._config.wait_s), listens))
            before[seat.node_id] += 1
        address = ask("set_up", set_up)[0]
        if self.plan.collective:
            ask("join", [(address, float(self._config.call_s))] * num)

    def _call(
        self,
        role: str,
        method: str,
        values: Mapping[int, Values],
        keywords: Mapping[str, Any],
        replies: Sequence[int] | None = None,
    ) -> list[Any]:
        wanted = range(self.plan.num_workers) if replies is None else replies
        asked = {rank: (role, method, rank in wanted, keywords, *own) for rank, own in values.items()}
        with self._under_way():
            refs = self._submit("call", list(asked.values()), list(asked))
            return self._await(refs, f"{role}.{method}", self._config.call_s, "cluster.call_s")

    @contextlib.contextmanager
    def _under_way(self) -> Iterator[None]:
        """Counts a call for as long as the block lasts."""
        with self._free:
            self._num_calls += 1
        try:
            yield
        finally:
            with self._free:
                self._num_calls -= 1
                self._free.notify_all()

    def _once(self, values: Values) -> Values:
        """The values as references where they are large, so that what goes to several workers is stored once.

        What is small goes with each call: a reference has to be fetched on every node.
        """
        if self.plan.num_workers == 1:
            return values
        return tuple(value if _is_small(value) else ray.put(value) for value in values)

    def _submit(self, method: str, values: Sequence[Values], ranks: Sequence[int] | None = None) -> dict[Any, int]:
        """The rank of each reference."""
        with self._order:
            if self._dead:
                # Whichever thread is told first, a loss is a loss.
                error = (WorkerLost if self._lost else PlacementError)(
                    f"The group {self.plan.name!r} has ended, because {self._dead}.",
                    remedy="Run the same command again: it goes on from what was committed.",
                )
                if isinstance(error, WorkerLost):
                    error.host = self._lost
                raise error
            return {
                getattr(self._workers[rank], method).remote(*own): rank
                for rank, own in zip(range(self.plan.num_workers) if ranks is None else ranks, values, strict=True)
            }

    def _await(
        self, refs: dict[Any, int], what: str, limit_s: float, setting: str, told_s: float | None = None
    ) -> list[Any]:
        """The results in order of `refs`. Raises soon after the first failure, and says what caused it."""
        deadline = time.monotonic() + limit_s
        results: dict[Any, Any] = {}
        failures: list[Exception] = []
        pending = list(refs)
        while pending:
            ready, pending = ray.wait(pending, num_returns=1, timeout=max(deadline - time.monotonic(), 0.0))
            if not ready:
                break
            try:
                results[ready[0]] = ray.get(ready[0], timeout=FETCH_S)
            except RayError as error:
                failures.append(explain(error, self._asked(refs[ready[0]], what)))
                failures[-1].__cause__ = error
                # The loss of one is why the others fail, or wait for ever: there is nothing more to learn from them.
                settle_s = 0.0 if isinstance(failures[-1], WorkerLost) else SETTLE_S
                deadline = min(deadline, time.monotonic() + settle_s)
        if failures:
            # Where one died in a collective operation the others raise, too: what we can name is the cause.
            failure = min(failures, key=lambda each: not isinstance(each, TenfoldError))
            if pending or isinstance(failure, WorkerLost):
                self._lost = self._lost or (failure.host if isinstance(failure, WorkerLost) else "")
                self._kill(f"a worker failed in {what}")
            raise failure
        if pending:
            self._kill(f"{what} was over its deadline")
            raise late([self._asked(refs[ref], what) for ref in pending], told_s or limit_s, setting)
        return [results[ref] for ref in refs]

    def _asked(self, rank: int, what: str) -> Asked:
        seat = self.seats[rank] if self.seats else Seat("", "unknown", 0, 0)
        return Asked(self.plan.name, rank, self.plan.num_workers, seat.host, seat.pid, what)

    def _kill(self, why: str) -> None:
        self._dead = self._dead or why
        for worker in self._workers:
            with contextlib.suppress(RayError, ValueError):
                ray.kill(worker)


def _is_small(value: object) -> bool:
    """Whether it is a number or the like, or not many of them, as the tokens of a prompt."""
    if isinstance(value, list | tuple):
        return len(value) <= SMALL and all(isinstance(part, int | float | None) for part in value)
    return isinstance(value, int | float | None) or (isinstance(value, str) and len(value) <= SMALL)
