"""A Ray cluster of several nodes on this machine: each node in a network namespace, with an address of its own."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

PREFIX = "tenfold"  # of the namespaces' names, then the pid of the process that made them
SWITCH = "switch"  # the namespace with the bridge: the machine's own network has no part in it, nor have its rules
PORT = 6379
CPUS = 2  # logical, per node
START_S, END_S, PAUSE_S = 300.0, 20.0, 0.1
# A node is taken for dead when it has not answered three times; on a busy machine it may take seconds to answer.
HEALTH_MS = {"initial_delay": 0, "period": 1000, "timeout": 4000}
NUM_MISSES = 3


@dataclass(frozen=True, slots=True)
class Nodes:
    """Ray nodes that run, by name; the first one is the head."""

    names: tuple[str, ...]
    folder: Path  # of Ray
    environ: dict[str, str] = field(default_factory=dict[str, str])  # of every process of the cluster

    @property
    def address(self) -> str:
        """Where the cluster is reached, from inside."""
        return f"{self.address_of(self.names[0])}:{PORT}"

    @property
    def jobs(self) -> str:
        """Where its job server is reached, from inside."""
        return f"http://{self.address_of(self.names[0])}:8265"

    def pids(self) -> set[int]:
        """The processes of all nodes, but for workers that Ray keeps ready, which do nothing."""
        found = {pid for name in self.names for pid in _pids(_space(name))}
        return {pid for pid in found if not _name(pid).startswith("ray::IDLE")}

    def inside(self, name: str) -> list[str]:
        """What is put before a command that is to run on this node."""
        return ["ip", "netns", "exec", _space(name)]

    def address_of(self, name: str) -> str:
        return f"10.111.0.{self.names.index(name) + 1}"

    def popen(self, name: str, command: Sequence[str], **options: object) -> subprocess.Popen[str]:
        """A process on this node."""
        return subprocess.Popen([*self.inside(name), *command], env=self.environ, text=True, **options)  # type: ignore[call-overload]

    def cut(self, name: str) -> None:
        """Takes the node's link down: packets are lost, nobody is told."""
        _ip("-n", _space(SWITCH), "link", "set", name, "down")


def why_not() -> str:
    """Why this process cannot make namespaces; empty if it can."""
    if shutil.which("ip") is None:
        return "no `ip` here: install iproute2"
    if os.geteuid() != 0:
        return "network namespaces need root"
    probe = f"{PREFIX}-{os.getpid()}-probe"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"network namespaces cannot be made here: {made.stderr.strip()}"
    _ip("netns", "del", probe)
    return ""


@contextmanager
def nodes(resources: Mapping[str, Mapping[str, float]]) -> Iterator[Nodes]:
    """The nodes named, each with these resources of its own. Nothing of them is left when the block ends.

    What processes left that were killed (their names say whose they were) is ended first.
    """
    _end_those_of_the_dead()
    folder = Path(tempfile.mkdtemp(prefix="tn", dir="/tmp"))  # short, since the paths of Ray's sockets are long
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "WANDB_", "PYTEST_"))}
    environ = {
        **kept,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": os.urandom(32).hex(),
        "RAY_worker_niceness": "0",
        "RAY_health_check_failure_threshold": str(NUM_MISSES),
        **{f"RAY_health_check_{name}_ms": str(value) for name, value in HEALTH_MS.items()},
        "WANDB_MODE": "offline",
        "HF_HUB_OFFLINE": "1",
    }
    found = Nodes(tuple(resources), folder, environ)
    try:
        _connect(found)
        for name, own in resources.items():
            _start(found, name, own)
        yield found
    finally:
        for name in (*found.names, SWITCH):
            _end_all(_space(name))
        shutil.rmtree(folder, ignore_errors=True)


def _connect(nodes: Nodes) -> None:
    """Namespaces, one cable from each to a bridge, and addresses."""
    switch = _space(SWITCH)
    _ip("netns", "add", switch)
    _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
    _ip("-n", switch, "link", "set", "bridge", "up")
    for name in nodes.names:
        space = _space(name)
        _ip("netns", "add", space)
        _ip("link", "add", name, "netns", switch, "type", "veth", "peer", "name", "eth0", "netns", space)
        _ip("-n", switch, "link", "set", name, "master", "bridge", "up")
        _ip("-n", space, "addr", "add", f"{nodes.address_of(name)}/24", "dev", "eth0")
        _ip("-n", space, "link", "set", "lo", "up")
        _ip("-n", space, "link", "set", "eth0", "up")
        _ip("-n", space, "route", "add", "default", "dev", "eth0")  # who asks for its address asks for the way out


def _start(nodes: Nodes, name: str, resources: Mapping[str, float]) -> None:
    """Starts Ray on a node; returns when it runs."""
    place = (
        ["--head", f"--port={PORT}", f"--temp-dir={nodes.folder}", "--dashboard-host=0.0.0.0"]
        if name == nodes.names[0]
        else [f"--address={nodes.address}"]
    )
    command = [
        str(Path(sys.executable).parent / "ray"), "start", *place, f"--node-ip-address={nodes.address_of(name)}",
        f"--node-name={name}", f"--num-cpus={CPUS}", "--num-gpus=0", f"--resources={json.dumps(dict(resources))}",
        "--object-store-memory=100000000", "--disable-usage-stats",
    ]  # fmt: skip
    if name != nodes.names[0]:  # Ray's own files lie on a disk of each node's own, as they do elsewhere
        own = nodes.folder / f"disk-{name}"
        own.mkdir()
        mount = ["mount", "--bind", str(own), str(nodes.folder)]
        command = ["unshare", "--mount", "sh", "-c", f"{shlex.join(mount)} && exec {shlex.join(command)}"]
    log = nodes.folder / f"{name}.log"
    with log.open("w") as out:
        process = nodes.popen(name, command, stdout=out, stderr=subprocess.STDOUT)
        if process.wait(START_S):
            raise RuntimeError(f"Ray does not start on {name}:\n{log.read_text()}")


def _end_all(space: str) -> None:
    """Kills all processes of a namespace, and deletes it."""
    deadline = time.monotonic() + END_S
    while (pids := _pids(space)) and time.monotonic() < deadline:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(PAUSE_S)
    subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False)


def _end_those_of_the_dead() -> None:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False).stdout
    for space in (line.split()[0] for line in listed.splitlines() if line.startswith(f"{PREFIX}-")):
        pid = space.split("-")[1]
        if pid.isdecimal() and not Path(f"/proc/{pid}").exists():
            _end_all(space)


def _pids(space: str) -> list[int]:
    """Of the living processes in a namespace; none where there is no such namespace."""
    found = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True, check=False)
    return [int(pid) for pid in found.stdout.split() if _runs(int(pid))]


def _runs(pid: int) -> bool:
    """Whether it is more than a zombie, which is gone as soon as its parent looks."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def _space(name: str) -> str:
    return f"{PREFIX}-{os.getpid()}-{name}"


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")
