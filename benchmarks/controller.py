"""What the controller itself adds to a step of PPO, from 8 to 64 workers, and what overlapped generation saves.

    python -m benchmarks.controller [--workers 8 16 32 64] [--json FILE]        (in the repository's root)

The loop of the stage `ppo`, its run store, its handles and its groups are the real ones, on a Ray cluster of 8
simulated nodes of 8 GPUs each. What the workers compute is stood in for: generating, a forward pass and an update
sleep for as long as the options say, and answer with as much data as real ones would. Half of the workers generate, a
quarter are the policy's, and critic and reference have an eighth each; each worker brings a prompt to the batch, so
that data grows with workers. A step's seconds run from one row of metrics to the next, so that nothing is left out.

In turns, a step should take generate + forward + update; what it takes more is the controller's. With
`ppo.max_staleness: 1` it should take the longer one of generate and forward + update. benchmarks/README.md explains.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

from benchmarks.simulated_nodes import simulated_nodes
from benchmarks.stand_ins import FACTORIES, SECONDS, CountedWorker, StandInSeconds
from cluster import group
from cluster.console import LineConsole
from cluster.ray_session import RaySession
from cluster.run import termination_interrupts
from cluster.team import RayTeam
from configs.schema import ClusterConfig, Recipe
from rlhf.data import Prompts
from rlhf.records import Message, Prompt
from rlhf.stages import ppo
from rlhf.stages.context import Context
from rlhf.store import RunStore

NODES, GPUS_PER_NODE, CPUS_PER_NODE = 8, 8, 8
WARM_UP = 2  # steps; of the overlapped loop the first writes two batches
OVERHEAD_LIMIT_S, AHEAD_LIMIT = 1.0, 1.1


@dataclass(frozen=True, slots=True)
class Measured:
    """Medians over the steps, in seconds."""

    workers: int
    start_s: float  # until all workers were there
    turns_s: float  # a step in turns
    overhead_s: float  # of which nobody computes
    cpu_s: float  # of a core, that the controller's process took of a step in turns
    ahead_s: float  # a step whose next answers are written beside it
    ahead_ratio: float  # to the longer one of generating and training
    nodes: list[int]  # workers on each


class Clock:
    """`ports.Tracker`: when each row came, and what this process had computed by then."""

    def __init__(self, store: RunStore) -> None:
        self.times: list[float] = []
        self.cpu_times: list[float] = []
        self._store = store

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        self._store.log(stage, step, metrics)
        self.times.append(time.perf_counter())
        self.cpu_times.append(time.process_time())

    def table(
        self, stage: str, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[object]]
    ) -> None: ...


def per_step(times: Sequence[float]) -> float:
    """Median from row to row, after the warm-up."""
    return statistics.median(b - a for a, b in itertools.pairwise(times[WARM_UP - 1 :]))


def main(argv: Sequence[str] | None = None) -> int:
    """0 if the controller stays inside its limits; prints a table, and writes it as JSON too where `--json` says."""
    options = _parse(argv)
    seconds = StandInSeconds(options.generate_s, options.forward_s, options.update_s, options.adapter_mib)
    found: list[Measured] = []
    with (
        simulated_nodes(NODES, CPUS_PER_NODE, GPUS_PER_NODE) as address,
        RaySession(ClusterConfig(address=address)) as session,
        patch.object(group, "Worker", CountedWorker),
    ):
        for workers in options.workers:
            with tempfile.TemporaryDirectory(prefix="tenfold-controller-") as folder:
                (Path(folder) / SECONDS).write_text(json.dumps(asdict(seconds)))
                found.append(measure(options, workers, address, Path(folder), seconds, session))
            print(table(found, seconds), flush=True)
            if options.json:  # as soon as it is known
                shown = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
                rows = [asdict(one) for one in found]
                options.json.write_text(json.dumps({"options": shown, "measured": rows}, indent=2) + "\n")
    problems = list(over_limits(found))
    print("\n".join(problems or ["all inside the limits"]))
    return int(bool(problems))


def measure(
    options: argparse.Namespace,
    workers: int,
    address: str,
    folder: Path,
    seconds: StandInSeconds,
    session: RaySession,
) -> Measured:
    """Both loops on one team of so many workers."""
    console = LineConsole()
    recipes = [make_recipe(options, workers, address, folder, age) for age in (0, 1)]
    began = time.perf_counter()
    clocks: list[Clock] = []
    with RayTeam(recipes[1], console, session.resources, factories=FACTORIES) as team:
        team.prepare("policy", "critic", "reference", "generator")
        start_s = time.perf_counter() - began
        handles = (team.policy, team.critic, team.reference, team.generator)
        nodes = Counter(seat.node_id for handle in handles for seat in handle.group.seats)
        for recipe in recipes:
            with RunStore.open(recipe.runs, recipe, console.warn) as store:
                clock = Clock(store)
                # No chat template: nothing is evaluated, so nothing is encoded.
                ppo.run(Context(recipe, team, store, cast(Any, None), make_prompts(options, workers), clock, console))
            clocks.append(clock)
    turns_s, ahead_s = (per_step(clock.times) for clock in clocks)
    longer = max(seconds.generate_s, seconds.train_s)
    overhead_s = turns_s - seconds.generate_s - seconds.train_s
    return Measured(
        workers=workers,
        start_s=start_s,
        turns_s=turns_s,
        overhead_s=overhead_s,
        cpu_s=per_step(clocks[0].cpu_times),
        ahead_s=ahead_s,
        ahead_ratio=ahead_s / longer,
        nodes=list(nodes.values()),
    )


def make_recipe(options: argparse.Namespace, workers: int, address: str, folder: Path, max_staleness: int) -> Recipe:
    """PPO with a critic and a reference, scored by a rule, on so many workers with a GPU each."""
    eighth = workers // 8
    return Recipe.model_validate(
        {
            "name": f"controller-{max_staleness}",
            "runs": str(folder),
            "stages": ["ppo"],
            "model": {"path": "stand-in"},
            "data": {"prompts": "stand-in"},
            "sampling": {"n": 10, "max_answer_tokens": options.answer_tokens},
            "rules": [{"name": "short"}],
            "ppo": {
                "num_steps": options.steps + WARM_UP,
                "num_prompts": workers,
                "max_staleness": max_staleness,
                "score": "rules",
                "save_every": options.steps + WARM_UP,
            },
            "cluster": {
                "address": address,
                "placement": "separate",
                "workers": {"policy": 2 * eighth, "critic": eighth, "reference": eighth, "generator": 4 * eighth},
                "threads": 1,
                "wait_s": 1800,
            },
        }
    )


def make_prompts(options: argparse.Namespace, workers: int) -> Prompts:
    """Four batches of prompts, all of one length."""
    names = [f"prompt {index}" for index in range(4 * workers)]
    tokens = tuple(range(options.prompt_tokens))
    return Prompts(tuple(Prompt(name, (Message("user", name),), tokens) for name in names), ())


def table(found: Sequence[Measured], seconds: StandInSeconds) -> str:
    """A row for each number of workers."""
    lines = [
        f"\ngenerate {seconds.generate_s:g} s, forward {seconds.forward_s:g} s, update {seconds.update_s:g} s: "
        f"in turns {seconds.generate_s + seconds.train_s:g} s, side by side "
        f"{max(seconds.generate_s, seconds.train_s):g} s",
        f"{'workers':>8}{'nodes':>8}{'start':>10}{'in turns':>11}{'overhead':>11}{'a worker':>11}{'its CPU':>10}"
        f"{'ahead':>10}{'ratio':>8}",
    ]
    lines += [
        f"{one.workers:8d}{len(one.nodes):8d}{one.start_s:8.1f} s{one.turns_s:9.2f} s{one.overhead_s:9.3f} s"
        f"{1000 * one.overhead_s / one.workers:8.1f} ms{one.cpu_s:8.2f} s{one.ahead_s:8.2f} s{one.ahead_ratio:8.2f}"
        for one in found
    ]
    return "\n".join(lines) + "\n"


def over_limits(found: Sequence[Measured]) -> list[str]:
    """What is more than it may be, in words."""
    problems = [
        f"{one.workers} workers: the controller's own {one.overhead_s:.2f} s a step are over {OVERHEAD_LIMIT_S:g} s"
        for one in found
        if one.overhead_s > OVERHEAD_LIMIT_S
    ]
    problems += [
        f"{one.workers} workers: with answers ahead a step takes {one.ahead_ratio:.2f} of the longer part, over "
        f"{AHEAD_LIMIT:g}"
        for one in found
        if one.ahead_ratio > AHEAD_LIMIT
    ]
    first, last = found[0], found[-1]
    if last.overhead_s * first.workers > first.overhead_s * last.workers:
        problems.append(
            f"from {first.workers} to {last.workers} workers the overhead grows from {first.overhead_s:.3f} s to "
            f"{last.overhead_s:.3f} s: more than they do"
        )
    return problems


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", nargs="+", type=int, default=[8, 16, 32, 64], help="multiples of 8, up to 64")
    parser.add_argument("--steps", type=int, default=5, help="that are measured, of each loop")
    parser.add_argument("--generate-s", type=float, default=10.0)
    parser.add_argument("--forward-s", type=float, default=2.0)
    parser.add_argument("--update-s", type=float, default=7.0)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--answer-tokens", type=int, default=64)
    parser.add_argument("--adapter-mib", type=int, default=20, help="rank 16 on 135M parameters, in float32")
    parser.add_argument("--json", type=Path, help="a file for all numbers")
    options = parser.parse_args(argv)
    if wrong := [num for num in options.workers if num % 8 or not 8 <= num <= NODES * GPUS_PER_NODE]:
        parser.error(f"--workers {wrong[0]}: it must be a multiple of 8, up to {NODES * GPUS_PER_NODE}")
    return options


if __name__ == "__main__":
    with termination_interrupts():  # so that Ray's processes end with this one
        sys.exit(main())
