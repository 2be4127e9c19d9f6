"""Whether a long run grows: memory, file descriptors and shared memory of every process over 200 steps of PPO.

    python -m benchmarks.memory [--steps 200] [--json FILE]

Runs the tiny recipe (real Ray, vLLM and DeepSpeed, critic and W&B offline) as a process of its own, looks at every
process of its tree after each step, and prints per process the median resident memory of steps 21 - 40 and of the last
20, with their ratio, and both numbers of open descriptors. It exits with 1 if a process grew by more than 5 %, or if
descriptors or shared memory segments became more.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import psutil

from configs.load import dump_recipe
from tests.recipes import tiny_recipe
from tests.tiny import make_tiny_model

EARLY = range(20, 40)  # steps, counted from 0
LATE = 20
MAY_GROW = 1.05


@dataclass
class Process:
    """What was seen of one process, step by step."""

    name: str
    rss_mib: dict[int, float] = field(default_factory=dict[int, float])
    fds: dict[int, int] = field(default_factory=dict[int, int])


def main() -> int:
    """0 if nothing grew."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tenfold-memory-") as folder:
        processes, segments = watch(Path(folder), options.steps)
    rows = [row(pid, process, options.steps) for pid, process in processes.items()]
    rows = [found for found in rows if found]
    early = median(segments[step] for step in EARLY if step in segments)
    late = median(segments[step] for step in range(options.steps - LATE, options.steps) if step in segments)
    print(f"{'process':44} {'MiB early':>10} {'MiB late':>10} {'ratio':>7} {'fds':>5} {'fds late':>8}")
    for found in sorted(rows, key=lambda found: -float(str(found["late_mib"]))):
        print(
            f"{found['name']!s:44} {found['early_mib']:10.1f} {found['late_mib']:10.1f} {found['ratio']:7.3f} "
            f"{found['early_fds']:5} {found['late_fds']:8}"
        )
    print(f"shared memory segments: {early:g} -> {late:g}")
    if options.json:
        options.json.write_text(json.dumps({"processes": rows, "segments": [early, late]}, indent=2))
    grew = [found for found in rows if found["ratio"] > MAY_GROW or found["late_fds"] > found["early_fds"]]  # type: ignore[operator]
    return int(bool(grew) or late > early)


def watch(folder: Path, num_steps: int) -> tuple[dict[int, Process], dict[int, int]]:
    """(what was seen of each process, by pid; shared memory segments by step) of one run."""
    recipe = tiny_recipe(
        make_tiny_model(folder / "model"),
        folder,
        stages=["ppo"],
        ppo={"num_steps": num_steps, "score": "rules", "save_every": 10, "optimizer": {"lr": 1e-5}},
        tracker={"mode": "offline"},
    )
    path = folder / "tiny.yaml"
    path.write_text(dump_recipe(recipe))
    with (folder / "log").open("w") as log:
        run = subprocess.Popen([sys.executable, "-m", "cluster.cli", "run", str(path)], stdout=log, stderr=log)
    processes: dict[int, Process] = {}
    segments: dict[int, int] = {}
    for step in steps(Path(recipe.runs) / recipe.name / "events.jsonl", run):
        segments[step] = look(processes, run.pid, step)
        if step % 20 == 19:
            print(f"step {step + 1} of {num_steps}", file=sys.stderr)
    if run.wait():
        raise SystemExit(f"the run failed:\n{(folder / 'log').read_text()[-3000:]}")
    return processes, segments


def steps(events: Path, run: subprocess.Popen[bytes]) -> Iterator[int]:
    """Each step of PPO as soon as its update has ended."""
    seen = 0
    while run.poll() is None:
        lines = events.read_text().splitlines() if events.exists() else []
        for line in lines[seen:]:
            event = json.loads(line)
            if (event.get("phase"), event["what"]) == ("update", "end"):
                yield event["step"]
        seen = len(lines)
        time.sleep(0.02)


def look(processes: dict[int, Process], pid: int, step: int) -> int:
    """The number of shared memory segments that the tree below `pid` has; notes memory and descriptors."""
    segments: set[str] = set()
    root = psutil.Process(pid)
    for process in [root, *root.children(recursive=True)]:
        try:
            name = " ".join(process.cmdline()[:4])[-44:] or process.name()
            found = processes.setdefault(process.pid, Process(name))
            found.rss_mib[step] = process.memory_info().rss / 2**20
            found.fds[step] = process.num_fds()
            segments |= {m.path for m in process.memory_maps() if m.path.startswith("/dev/shm")}
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return len(segments)


def row(pid: int, process: Process, num_steps: int) -> dict[str, object]:
    """The figures of one process; empty for one that did not live through both spans."""
    spans: dict[str, list[int]] = defaultdict(list)
    for step in process.rss_mib:
        if step in EARLY:
            spans["early"].append(step)
        if step >= num_steps - LATE:
            spans["late"].append(step)
    if not spans["early"] or not spans["late"]:
        return {}
    early, late = (median(process.rss_mib[step] for step in spans[span]) for span in ("early", "late"))
    return {
        "pid": pid,
        "name": process.name,
        "early_mib": early,
        "late_mib": late,
        "ratio": late / early,
        "early_fds": int(median(process.fds[step] for step in spans["early"])),
        "late_fds": int(median(process.fds[step] for step in spans["late"])),
    }


if __name__ == "__main__":
    raise SystemExit(main())
