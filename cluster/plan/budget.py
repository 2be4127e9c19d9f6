"""The budget that a plan is made for: so many GPUs, so many on a node, of one kind."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from cluster.plan.devices import Device


@dataclass(frozen=True, slots=True)
class Budget:
    """GPUs that a run may take. The last node may have fewer than the others. Without GPUs, the machine's memory."""

    num_gpus: int
    gpus_per_node: int
    device: Device
    cpus: float = math.inf  # that Ray counts

    def __post_init__(self) -> None:
        assert self.num_gpus >= 0 and self.gpus_per_node > 0
        assert self.num_gpus == 0 or not self.device.is_cpu

    @property
    def nodes(self) -> list[int]:
        """GPUs of each node."""
        whole, rest = divmod(self.num_gpus, self.gpus_per_node)
        return [self.gpus_per_node] * whole + ([rest] if rest else [])

    def holds(self, num_singles: int, num_wide: int, width: int) -> bool:
        """Whether so many workers of one GPU, and so many that need `width` GPUs of one node, find a place."""
        if num_singles + num_wide * width > self.num_gpus:
            return False
        return num_wide <= sum(gpus // width for gpus in self.nodes)

    def of(self, num_gpus: int) -> Budget:
        """The same cluster with another number of GPUs."""
        return replace(self, num_gpus=num_gpus)
