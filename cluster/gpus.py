"""Which GPUs there are, for a plan: of this machine or of a Ray cluster. Nothing is started, torch is not imported."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cluster.plan.budget import Budget
    from cluster.plan.devices import Device
    from cluster.ray_session import RaySession
    from configs.schema import Recipe

GPUS_PER_NODE = 8  # where nobody says


def budget_of(recipe: Recipe, session: RaySession | None) -> Budget | None:
    """The GPUs that a run would find; None where they cannot be told apart from one another or are of no known kind."""
    if session is None and recipe.cluster.address is None:
        return budget_here()
    return _of_ray(session)


def budget_here() -> Budget | None:
    """This machine's GPUs, as nvidia-smi tells them without starting anything; its memory where there is none."""
    from cluster.plan.budget import Budget
    from cluster.preview import gpus_here

    if not gpus_here():
        return Budget(0, GPUS_PER_NODE, this_machine())
    told = told_by_driver()
    if not told or len(set(told)) > 1:
        return None
    return Budget(len(told), len(told), _device_of(*told[0]))


def told_by_driver() -> list[tuple[str, float]]:
    """(name, MiB) of each GPU here; empty where nvidia-smi cannot be asked."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
        rows = [row.rsplit(",", 1) for row in told.strip().splitlines()]
        return [(name.strip(), float(mib)) for name, mib in rows]
    except (OSError, ValueError, subprocess.SubprocessError):
        return []


def _device_of(name: str, mib: float) -> Device:
    """The device of that name; of another name, the nearest with the memory that the driver tells."""
    from cluster.plan.devices import GPUS, find_device

    near = min(GPUS.values(), key=lambda device: abs(device.usable_gib - mib / 1024))
    label = near.label_gb if abs(near.usable_gib - mib / 1024) < 0.05 * near.usable_gib else round(mib / 1024)
    return find_device(name, label)


def _of_ray(session: RaySession | None) -> Budget | None:
    """What a Ray cluster counts: nodes with as many GPUs each, of a kind that Ray names."""
    import ray

    from cluster.plan.budget import Budget
    from cluster.plan.devices import find_device
    from rlhf.errors import PlacementError

    if session is None or not ray.is_initialized():
        return None
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = [int(node.get("GPU", 0)) for node in nodes if node.get("GPU", 0)]
    if not gpus:
        return Budget(0, GPUS_PER_NODE, this_machine()) if len(nodes) == 1 else None
    kinds = {
        name.partition(":")[2] for node in nodes if node.get("GPU", 0) for name in node if "accelerator_type:" in name
    }
    if len(kinds) != 1:
        return None
    try:
        device = find_device(kinds.pop())
    except PlacementError:
        return None
    return Budget(sum(gpus), min(gpus), device)  # ranks of one engine then find a node


def this_machine() -> Device:
    """This machine's processors and the memory that is not in use."""
    import psutil

    from cluster.plan.devices import GIB, this_cpu

    return this_cpu(psutil.virtual_memory().total / GIB, len(os.sched_getaffinity(0)))
