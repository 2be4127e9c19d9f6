"""What `tenfold doctor` makes of what it finds: each line ok, or what to do. Pure functions; nothing is asked here."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

from cluster.node_facts import NodeFacts

SHM_GIB = 2.0  # Ray's object store, and the ranks of NCCL on a node
DISK_GIB = 10.0  # Ray's logs and spilled objects, checkpoints
OPEN_FILES = 4096  # below it Ray itself warns: a socket per worker on every node
PYTHON = "3.11"
SLOW_GBYTES_S = 0.05  # an all-reduce below it: half of what 1 Gbit/s carries
NEEDED = ("ray", "torch", "transformers", "peft", "deepspeed", "vllm")


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the doctor's."""

    name: str
    state: Literal["ok", "mend"]
    found: str
    do: str = ""  # what to do, where something is to be mended
    node: str = ""  # the address of the node, where it is about one

    def __str__(self) -> str:
        where = f"{self.node}: " if self.node else ""
        return f"{self.state:<5} {self.name:<14} {where}{self.found}{f'. {self.do}' if self.do else ''}"

    def to_json(self) -> dict[str, str]:
        return dict(asdict(self))


@dataclass(frozen=True, slots=True)
class AllReduce:
    """A sum over all nodes, measured."""

    num_nodes: int
    num_workers: int
    backend: str
    num_bytes: int
    time_s: float  # of one, the median

    @property
    def bus_gbytes_s(self) -> float:
        """What each worker sends in a second, 2 (n - 1) / n of the bytes: the bus bandwidth of NVIDIA's nccl-tests."""
        n = self.num_workers
        return 2 * (n - 1) / n * self.num_bytes / self.time_s / 1e9


@dataclass(frozen=True, slots=True)
class Findings:
    """What was found on a cluster."""

    nodes: Sequence[NodeFacts]
    unreachable: Sequence[tuple[str, str, str]] = ()  # (from, to, why)
    all_reduce: AllReduce | str = "not tried"  # or why it failed
    generator: float | str | None = None  # seconds to a first answer, or why there was none; None: not asked for
    wandb: Mapping[str, str] = field(default_factory=dict[str, str])  # "address", "key", "error"


def examine(found: Findings) -> list[Check]:
    """All lines for what was found, in the order in which they are to be read."""
    lines = [check for facts in found.nodes for check in node_checks(facts)]
    lines += versions_agree(found.nodes)
    lines.append(reach(found.nodes, found.unreachable))
    lines.append(collective(found.all_reduce))
    if found.generator is not None:
        lines.append(generator(found.generator))
    return [*lines, wandb(found.wandb)]


def node_checks(facts: NodeFacts) -> list[Check]:
    """The lines of one node."""
    return [
        _versions(facts),
        _accelerators(facts),
        _at_least(
            "shared memory", facts.shm_gib, SHM_GIB, facts.host, "/dev/shm",
            "Give the container more: `docker run --shm-size=8g`, in Kubernetes an emptyDir of medium Memory there",
        ),
        *(
            _at_least(
                "disk", free, DISK_GIB, facts.host, f"free at {path}",
                "Free some, or put it elsewhere: `ray start --temp-dir`, `runs` of the recipe",
            )
            for path, free in facts.disk_gib.items()
        ),
        _open_files(facts),
    ]  # fmt: skip


def _versions(facts: NodeFacts) -> Check:
    missing = [name for name in NEEDED if name not in facts.versions]
    told = ", ".join([f"Python {facts.python}", *(f"{name} {facts.versions[name]}" for name in facts.versions)])
    if not facts.python.startswith(f"{PYTHON}."):
        return Check(
            "versions", "mend", told, f"Tenfold needs Python {PYTHON}: set the node up from the lock", facts.host
        )
    if missing:
        do = f"Missing: {', '.join(missing)}. Install requirements/cpu.lock or gpu.lock with --no-deps"
        return Check("versions", "mend", told, do, facts.host)
    return Check("versions", "ok", told, node=facts.host)


def _accelerators(facts: NodeFacts) -> Check:
    there = len(facts.gpus)
    told = ", ".join(facts.gpus) or f"no GPU; {facts.num_cores} cores, {facts.memory_gib:.0f} GiB"
    do = ""
    if there != facts.torch_gpus:
        do = (
            f"The driver shows {there}, torch sees {facts.torch_gpus} (torch {facts.versions.get('torch', 'missing')})"
            ": install requirements/gpu.lock, and a driver that its CUDA accepts"
        )
    elif there != facts.ray_gpus:
        do = f"Ray counts {facts.ray_gpus:g}: start the node without --num-gpus, or with {there}"
    return Check("accelerators", "mend" if do else "ok", told, do, facts.host)


def _at_least(name: str, have: float, limit: float, node: str, what: str, do: str) -> Check:
    told = f"{have:.1f} GiB {what}"
    if have >= limit:
        return Check(name, "ok", told, node=node)
    return Check(name, "mend", told, f"At least {limit:g} GiB are needed. {do}", node)


def _open_files(facts: NodeFacts) -> Check:
    told = f"{facts.open_files} may be open"
    if facts.open_files >= OPEN_FILES:
        return Check("open files", "ok", told, node=facts.host)
    return Check("open files", "mend", told, "Run `ulimit -n 65536` before `ray start`", facts.host)


def versions_agree(nodes: Sequence[NodeFacts]) -> list[Check]:
    """A line for each package whose version differs between nodes."""
    names = sorted({name for facts in nodes for name in facts.versions})
    lines: list[Check] = []
    for name in names:
        by_version: dict[str, list[str]] = {}
        for facts in nodes:
            by_version.setdefault(facts.versions.get(name, "none"), []).append(facts.host)
        if len(by_version) > 1:
            told = "; ".join(f"{version} on {', '.join(hosts)}" for version, hosts in by_version.items())
            lines.append(Check("versions", "mend", f"{name} {told}", "Set all nodes up from one lock, or one image"))
    return lines


def reach(nodes: Sequence[NodeFacts], unreachable: Sequence[tuple[str, str, str]]) -> Check:
    """Whether every node reaches a port that is opened on every other."""
    if unreachable:
        told = "; ".join(f"{there} is not reached from {here} ({why})" for here, there, why in unreachable)
        do = "Open all ports between the nodes: torch and Ray choose free ones (1024 to 65535)"
        return Check("ports", "mend", told, do)
    pairs = len(nodes) * (len(nodes) - 1)
    told = f"{pairs} ways between {len(nodes)} nodes are open" if pairs else "a free port can be opened and reached"
    return Check("ports", "ok", told)


def collective(result: AllReduce | str) -> Check:
    """The line of the all-reduce."""
    name = "all-reduce"
    if isinstance(result, str):
        return Check(name, "mend", result, "Look at the ports, and at GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME")
    where = f"{result.num_nodes} nodes" if result.num_nodes > 1 else "one node"
    told = (
        f"{result.num_workers} workers on {where}, {result.backend}, {result.num_bytes / 2**20:.0f} MiB in "
        f"{result.time_s:.3f} s: {result.bus_gbytes_s:.2f} GB/s"
    )
    if result.bus_gbytes_s < SLOW_GBYTES_S:
        return Check(name, "mend", told, f"Below {SLOW_GBYTES_S:g} GB/s: is it the network that was meant?")
    return Check(name, "ok", told)


def generator(result: float | str) -> Check:
    """The line of the generator's start."""
    if isinstance(result, str):
        return Check("generator", "mend", result, "`vllm` has to start on a node; see the worker's log in Ray's folder")
    return Check("generator", "ok", f"vLLM answered {result:.0f} s after its start, with a tiny model")


def wandb(found: Mapping[str, str]) -> Check:
    """The line of W&B, which matters where a key is set."""
    at, error, has_key = found.get("address", "W&B"), found.get("error", ""), bool(found.get("key"))
    if not has_key:
        reached = f"; {at} does not answer" if error else f"; {at} answers"
        return Check("W&B", "ok", f"no WANDB_API_KEY: runs are kept offline{reached}")
    if error:
        do = "Open the way there, set WANDB_BASE_URL, or WANDB_MODE=offline and `wandb sync` later"
        return Check("W&B", "mend", f"{at} does not answer ({error})", do)
    return Check("W&B", "ok", f"{at} answers, and there is a key")


def exit_code(checks: Sequence[Check]) -> int:
    """0, or 1 if something is to be mended."""
    return int(any(check.state == "mend" for check in checks))


def has_wandb_key(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether W&B would take a run of this process."""
    return bool(environ.get("WANDB_API_KEY"))
