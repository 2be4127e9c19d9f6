"""Workers that train a model together, on Ray Train: its scaling and its failure policy, our loop and our run store."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.failures import WorkerLost, WorkerRaised
from cluster.nodes import nodes_there
from cluster.placement import Node, Placement, Resources, all_fit, place_crew
from cluster.recovery import missing
from cluster.reserve import give_back_all_but, living_actors, reservations
from configs.schema import Recipe
from rlhf.errors import PlacementError, TenfoldError
from rlhf.ports import Console
from rlhf.training import Job, Place, Report

LOOK_S = 0.2  # between two looks at what was reported
LOOK_AT_NODES_S = 2.0
STOP_S = 20.0  # for the workers to save and leave, once they are told to stop
CPU_OF_CHANNEL = 0  # it waits and passes on: with a part of one, workers that take all CPUs would find no place
CALLS_AT_ONCE = 4  # of the channel: fit, push, pull and stop


class RayCrew:
    """`model_context.Crew` on Ray Train. Used inside a `RaySession`.

    A worker that dies is started again with its whole group, `cluster.max_failures` times, and goes on from the newest
    checkpoint of the run store. A TenfoldError of a worker ends the job at once: it would come again.
    """

    def __init__(self, recipe: Recipe, console: Console, resources: Resources) -> None:
        """`resources`: what Ray counts. Raises PlacementError where the workers do not fit into them."""
        self._recipe, self._console = recipe, console
        self._unheard: deque[Report] = deque()
        plan = place_crew(recipe, resources)
        self._uses_gpus, self._num_workers = plan.gpus > 0, plan.num_workers
        self._bundles = Placement((plan,)).bundles
        self._channel: Any = None

    def train(self, job: Job, heard: Callable[[Report], None]) -> None:
        """Returns when the job is done. `heard` is called in this thread.

        Raises TenfoldError as a worker raised it; PlacementError where workers do not start, are silent for
        `cluster.call_s`, or died too often.
        """
        actors, groups = living_actors(), reservations()
        # Not soft: an actor that takes nothing would be put on any node.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        kind = ray.remote(Channel)  # beside the controller: no other node's loss ends it
        channel: Any = kind.options(
            num_cpus=CPU_OF_CHANNEL, max_concurrency=CALLS_AT_ONCE, scheduling_strategy=here
        ).remote()
        self._unheard.clear()
        self._channel = channel
        try:
            fitting = channel.fit.remote(self._options(job), [ray.put(job)])
            try:
                self._listen(channel, heard, fitting)
            except BaseException as error:
                if not isinstance(error, Exception):  # Ctrl-C, SIGTERM
                    self._wind_up(channel, heard, fitting)
                raise
        except RayTaskError as error:
            raise WorkerRaised(f"Ray Train raised {type(error.cause).__name__}: {error.cause}\n{error}") from error
        except RayError as error:
            raise PlacementError(
                f"The actor that runs Ray Train is lost: {str(error).strip().splitlines()[0]}",
                remedy="Check the memory of this node, then run the same command again: it goes on from the newest "
                "checkpoint.",
            ) from error
        finally:
            with contextlib.suppress(RayError):
                ray.kill(channel)  # its workers die with it
                give_back_all_but(actors, groups)
            shutil.rmtree(_own_files(job), ignore_errors=True)

    def stop(self) -> None:
        """Lets the workers save after the step that they are at, and leave; `train` returns then."""
        ray.get(self._channel.stop.remote(), timeout=self._recipe.cluster.call_s)

    def _options(self, job: Job) -> FitOptions:
        cluster = self._recipe.cluster
        return FitOptions(
            name=f"{job.recipe.name}-{job.stage}-{os.getpid()}",
            folder=_own_files(job),
            num_workers=self._num_workers,
            cpus_per_worker=cluster.cpus_per_worker,
            extra=cluster.resources.get("trainer", {}),
            strategy=cluster.strategy,
            uses_gpus=self._uses_gpus,
            threads=cluster.threads,
            timeout_s=cluster.call_s,
            max_failures=cluster.max_failures,
        )

    def _listen(self, channel: Any, heard: Callable[[Report], None], fitting: Any) -> None:
        cluster = self._recipe.cluster
        began = last = looked = time.monotonic()
        has_started, told = False, began
        before = nodes_there()
        while True:
            is_over = _is_done(fitting)
            self._unheard += ray.get(channel.pull.remote(), timeout=cluster.call_s)
            while self._unheard:
                last, has_started = time.monotonic(), True
                report = self._unheard.popleft()
                if report.error is not None:
                    ray.wait([fitting], timeout=STOP_S)  # Ray Train puts its things away
                    raise report.error
                heard(report)
            if is_over:
                _check(ray.get(fitting))
                return
            now = time.monotonic()
            if has_started and now - looked > LOOK_AT_NODES_S:
                looked = now
                self._check_nodes(before)
            if not has_started and now - began > cluster.wait_s:
                raise PlacementError(
                    f"Waited {cluster.wait_s} s for the workers of the training to start.",
                    limit=f"Asked for: {self._num_workers} workers of {cluster.cpus_per_worker} CPUs"
                    f"{' and a GPU each' if self._uses_gpus else ''}; Ray has {ray.available_resources()} left.",
                    remedy="Lower cluster.workers.trainer, bring nodes, or raise cluster.wait_s.",
                )
            if has_started and now - last > cluster.call_s:
                raise PlacementError(
                    f"The training was silent for {cluster.call_s} s.",
                    limit=f"The limit is cluster.call_s={cluster.call_s}.",
                    remedy="Raise it if a step takes so long; else see the logs of the workers.",
                )
            if not has_started and now - told > 30:
                told = now
                self._console.say(f"waiting for the workers, {now - began:.0f} s")
            time.sleep(LOOK_S)

    def _check_nodes(self, before: tuple[Node, ...]) -> None:
        """Raises WorkerLost where a node is gone and the rest cannot hold the workers: Ray Train would wait for it."""
        there = nodes_there()
        gone = missing(before, there)
        if gone and not self._recipe.cluster.autoscale and not all_fit(self._bundles, there):
            lost = WorkerLost(f"The nodes that are left do not hold {self._num_workers} workers of the training.")
            lost.host = gone[0].address
            raise lost

    def _wind_up(self, channel: Any, heard: Callable[[Report], None], fitting: Any) -> None:
        """Lets the workers finish their step and save; what they report until then counts."""
        self._console.say("stopping: the workers finish their step and save")
        deadline = time.monotonic() + STOP_S
        with contextlib.suppress(RayError, TenfoldError):
            ray.get(channel.stop.remote(), timeout=STOP_S)
            while time.monotonic() < deadline:
                is_over = _is_done(fitting)
                self._unheard += ray.get(channel.pull.remote(), timeout=STOP_S)
                while self._unheard:
                    heard(self._unheard.popleft())
                if is_over:
                    return
                time.sleep(LOOK_S)


@dataclass(frozen=True, slots=True)
class FitOptions:
    """What Ray Train is asked for."""

    name: str
    folder: Path  # for Ray Train's own files; all nodes see it
    num_workers: int
    cpus_per_worker: float
    extra: dict[str, float]  # per worker, of what only some nodes have
    strategy: str
    uses_gpus: bool
    threads: int | None
    timeout_s: int
    max_failures: int


class Channel:
    """What rank 0 reported and the controller has not read yet; and Ray Train itself.

    Its `fit` blocks. In a thread of the controller it could be in the middle of a call while Ray is shut down there,
    and the process could be aborted. With this actor end the processes that it started.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # each call has a thread
        self._reports: list[Report] = []
        self._stops = False

    def fit(self, options: FitOptions, job: list[Any]) -> Exception | None:
        """Returns when Ray Train is done, with what it raised. `job`: a reference, in a list so that it stays one."""
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.constants import RAY_CHDIR_TO_TRIAL_DIR
        from ray.train.torch import TorchTrainer

        from cluster.train_backend import OnOwnInterface

        # Workers stay where all others work: a run folder is `runs/NAME` where the recipe says no more.
        os.environ[RAY_CHDIR_TO_TRIAL_DIR] = "0"
        trainer = TorchTrainer(
            _worker,
            train_loop_config={
                "job": job[0],
                "channel": ray.get_runtime_context().current_actor,
                "threads": options.threads,
                "device": "cuda" if options.uses_gpus else "cpu",
            },
            scaling_config=ScalingConfig(
                num_workers=options.num_workers,
                use_gpu=options.uses_gpus,
                resources_per_worker={
                    "CPU": options.cpus_per_worker,
                    **({"GPU": 1} if options.uses_gpus else {}),
                    **options.extra,
                },
                placement_strategy=options.strategy.upper(),
            ),
            torch_config=OnOwnInterface(backend="nccl" if options.uses_gpus else "gloo", timeout_s=options.timeout_s),
            run_config=RunConfig(
                name=options.name,
                storage_path=str(options.folder),
                failure_config=FailureConfig(max_failures=options.max_failures),
            ),
        )
        try:
            trainer.fit()
        except Exception as error:
            return error
        return None

    def push(self, report: Report) -> bool:
        """Whether the work is to stop."""
        with self._lock:
            self._reports.append(report)
            return self._stops

    def pull(self) -> list[Report]:
        """The reports since the last call."""
        with self._lock:
            reports, self._reports = self._reports, []
            return reports

    def stop(self) -> None:
        """Lets the next `push` ask for the end."""
        with self._lock:
            self._stops = True


def _worker(config: dict[str, Any]) -> None:
    """The whole work of one rank, in a process that Ray Train started."""
    from ray.train import get_context

    where = get_context()
    place = Place(where.get_world_rank(), where.get_world_size())
    cores = len(os.sched_getaffinity(0))
    threads = config["threads"] or max(cores // where.get_local_world_size(), 1)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch

    torch.set_num_threads(threads)
    channel = config["channel"]

    def tell(report: Report) -> bool:
        return ray.get(channel.push.remote(report))

    from actors.model_trainer import work

    try:
        work(ray.get(config["job"]), place, config["device"], tell)
    except TenfoldError as error:
        # Ray Train would start all again, and the same error would come.
        tell(Report("failed", error=error))


def _is_done(fitting: Any) -> bool:
    done, _ = ray.wait([fitting], timeout=0)
    return bool(done)


def _own_files(job: Job) -> Path:
    """Where Ray Train may keep its own files while it works."""
    return job.folder.resolve() / ".ray-train"


def _check(error: Exception | None) -> None:
    if error is None:
        return
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    died = [failure for failure in failures.values() if isinstance(failure, RayError)]
    if failures and not died:
        rank, first = next(iter(failures.items()))
        raise WorkerRaised(f"Worker {rank} of the training raised {type(first).__name__}: {first}\n{error}") from error
    raise PlacementError(
        f"The training ended too often: {str(error).strip().splitlines()[-1]}",
        remedy="Check the memory of the nodes (a process that takes too much is killed), then run the same command "
        "again: it goes on from the newest checkpoint. cluster.max_failures says how often workers are started again.",
    ) from error
