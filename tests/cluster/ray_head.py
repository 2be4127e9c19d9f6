"""A Ray head of a test's own: ports, folder and token of its own, in a home of its own, ended by process id."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import requests

TOKEN = "0123456789abcdef" * 4
END_S = 20.0


@dataclass(frozen=True, slots=True)
class RayHead:
    """A head that runs."""

    address: str  # of its job server
    folder: Path  # its sessions and their logs
    environ: dict[str, str]  # of a process that is at home there: its token is found, and nothing of the test's own

    def processes(self) -> dict[int, psutil.Process]:
        """The processes of this cluster by their ids: they carry its mark, or descend from those that do.

        One that names itself, as Ray's do, may write over its environment.
        """
        found: dict[int, psutil.Process] = {}
        for process in psutil.process_iter():
            try:
                if process.environ().get("TENFOLD_TEST_HEAD") == str(self.folder):
                    found |= {each.pid: each for each in (process, *process.children(recursive=True))}
            except psutil.Error:
                continue
        return found

    def names(self) -> list[str]:
        """Those processes, as `ps` would show them."""
        told: list[str] = []
        for process in self.processes().values():
            try:
                told.append(" ".join(process.cmdline())[:160])
            except psutil.Error:
                continue
        return told


@contextmanager
def ray_head(folder: Path, num_cpus: int = 8) -> Iterator[RayHead]:
    """A head in this folder, whose path must be short; none of its processes is left after the block."""
    home = folder / "home"
    (home / ".ray").mkdir(parents=True)
    (home / ".ray" / "auth_token").write_text(TOKEN)
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "WANDB_", "COV_", "PYTEST_"))
    }
    environ = kept | {
        "HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "TENFOLD_TEST_HEAD": str(folder),
        "RAY_worker_niceness": "0",
        "RAY_DISABLE_IMPORT_WARNING": "1",
    }
    ports = free_ports(4)
    command = [
        str(Path(sys.executable).parent / "ray"), "start", "--head", "--node-ip-address=127.0.0.1",
        f"--port={ports[0]}", f"--dashboard-port={ports[1]}", f"--dashboard-agent-listen-port={ports[2]}",
        f"--ray-client-server-port={ports[3]}", f"--num-cpus={num_cpus}", "--num-gpus=0",
        f"--temp-dir={folder / 'r'}", "--disable-usage-stats", "--object-store-memory=200000000",
    ]  # fmt: skip
    head = RayHead(f"http://127.0.0.1:{ports[1]}", folder / "r", environ)
    head = RayHead(head.address, folder, environ)
    try:
        subprocess.run(command, env=environ, check=True, capture_output=True, text=True, timeout=100)
        assert requests.get(f"{head.address}/api/jobs/", timeout=20).status_code == 401
        yield head
    finally:
        left = list(head.processes().values())
        for process in left:
            if process.is_running():
                process.terminate()
        _, alive = psutil.wait_procs(left, timeout=END_S)
        for process in alive:
            process.kill()
        psutil.wait_procs(alive, timeout=END_S)


def free_ports(num: int) -> list[int]:
    """So many ports that nobody listens on now."""
    sockets = [socket.socket() for _ in range(num)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
