"""One process of a group: it joins the others, builds the roles it is told to play, and does what they are asked."""

from __future__ import annotations

import gc
import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal, TypeVar

import psutil

from cluster.interfaces import tell_gloo

# Torch is imported late: it reads the number of threads from the environment, which `set_up` writes.

Made = TypeVar("Made")
Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True)
class Seat:
    """Where a worker sits."""

    node_id: str
    host: str  # the node's address
    pid: int
    num_cores: int  # that this process may use


@dataclass(slots=True)
class Site:
    """What a role's factory is told of the worker it is built in."""

    rank: int
    world_size: int
    device: Device
    threads: int
    made: dict[str, Any] = field(default_factory=dict[str, Any])  # what the roles of this worker share

    def once(self, name: str, make: Callable[[], Made]) -> Made:
        """What `make` gave when first called under this name: the frozen base is loaded once for all roles."""
        if name not in self.made:
            self.made[name] = make()
        return self.made[name]


class Worker:
    """The process of one rank. A plain class: `cluster/group.py` makes a Ray actor of it.

    In this order: `seat`, `set_up`, `join` (where the group is collective), then `ensure` and `call` as often as
    wanted. On CUDA the process sees only its own GPU, as device 0.
    """

    def __init__(self, group: str, rank: int, world_size: int, device: Device) -> None:
        self.group, self.rank, self.world_size = group, rank, world_size
        self.device: Device = device
        self._roles: dict[str, Any] = {}
        self._site: Site | None = None
        self._store: Any = None  # rank 0: it holds the port that the others connect to
        self._host = "127.0.0.1"

    def seat(self) -> Seat:
        """Where this worker was put."""
        import ray

        self._host = ray.util.get_node_ip_address()
        node_id = ray.get_runtime_context().get_node_id()
        return Seat(node_id, self._host, os.getpid(), len(os.sched_getaffinity(0)))

    def set_up(self, local_rank: int, threads: int, timeout_s: float, listen: bool) -> tuple[str, int] | None:
        """The address that the group meets at, of the worker told to listen; sets environment and threads of all."""
        os.environ |= {
            "OMP_NUM_THREADS": str(threads),
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": "0" if self.device == "cuda" else str(local_rank),
        }
        import torch
        from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

        torch.set_num_threads(threads)
        self._site = Site(self.rank, self.world_size, self.device, threads)
        if not listen:
            return None
        self._store = TCPStore(
            # Port 0, and the socket stays open: nobody can take the port before the others come.
            self._host, 0, self.world_size, True, timedelta(seconds=timeout_s), wait_for_workers=False
        )  # fmt: skip
        return self._host, self._store.port

    def join(self, address: tuple[str, int], timeout_s: float) -> None:
        """Returns when all workers of the group have met in one process group."""
        import torch
        from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

        host, port = address
        os.environ |= {"MASTER_ADDR": host, "MASTER_PORT": str(port)}
        tell_gloo(self._host)
        timeout = timedelta(seconds=timeout_s)
        if self._store is None:
            self._store = TCPStore(host, port, self.world_size, False, timeout)
        torch.distributed.init_process_group(
            "nccl" if self.device == "cuda" else "gloo",
            store=self._store,
            rank=self.rank,
            world_size=self.world_size,
            timeout=timeout,
        )

    def ensure(self, role: str, factory: str, settings: Any) -> None:
        """Builds the role if it is not there: `factory` ("module:function") is called with the site and `settings`."""
        assert self._site is not None, "set_up comes first"
        if role not in self._roles:
            module, _, name = factory.partition(":")
            self._roles[role] = getattr(importlib.import_module(module), name)(self._site, settings)

    def drop(self, role: str) -> None:
        """Forgets a role and gives its memory back."""
        role_object = self._roles.pop(role, None)
        _close(role_object)
        del role_object
        gc.collect()
        self.free_cache()

    def call(self, role: str, method: str, reply: bool, keywords: Mapping[str, Any], *values: Any) -> Any:
        """What the role's method returns; None if no `reply` is wanted, which spares the way through Ray."""
        result = getattr(self._roles[role], method)(*values, **keywords)
        return result if reply else None

    def stats(self) -> dict[str, float]:
        """Memory of this process in GiB: PSS now, and the CUDA peak since it started."""
        stats = {"pss_gib": psutil.Process().memory_full_info().pss / 2**30}
        if self.device == "cuda":
            import torch

            stats["cuda_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return stats

    def free_cache(self) -> None:
        """Gives the GPU's memory back that no tensor of this process uses."""
        from rlhf.device_memory import give_back

        give_back(self.device)

    def close(self) -> None:
        """Ends what the roles started (an engine's processes, for one) and leaves the process group."""
        for role in list(self._roles):
            _close(self._roles.pop(role))
        if self._store is not None:
            import torch

            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()


def _close(role: Any) -> None:
    shutdown = getattr(role, "shutdown", None)  # only what holds more than memory has one
    if shutdown is not None:
        shutdown()
