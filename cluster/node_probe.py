"""A cluster looked at by a worker on each node: facts, ways between them, an all-reduce, a generator's start."""

from __future__ import annotations

import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.checks import AllReduce, Findings, has_wandb_key
from cluster.node_facts import NodeFacts, node_facts, opened_port, why_unreachable
from cluster.worker import Worker
from rlhf.ports import Console

MIB, ROUNDS = 64, 5  # of the tensor that is summed, and how often
ASK_S, GENERATOR_S = 120.0, 300.0
WANDB_ADDRESS, WANDB_S = "https://api.wandb.ai", 10.0


class NodeProbe(Worker):
    """A worker that looks at its node."""

    def facts(self, ray_gpus: float, folders: Sequence[str]) -> NodeFacts:
        """What the node is."""
        return node_facts(self._host, ray_gpus, (ray.get_runtime_context().get_temp_dir(), *folders))

    def listen(self) -> int:
        """A port that is open on this node as long as the worker lives."""
        self._listener: socket.socket = opened_port(self._host)
        return self._listener.getsockname()[1]

    def unreachable(self, others: Sequence[tuple[str, int]]) -> list[tuple[str, str, str]]:
        """(this node, another, why) for those that do not answer."""
        found = [(self._host, host, why_unreachable(host, port)) for host, port in others]
        return [line for line in found if line[2]]

    def all_reduce(self) -> float:
        """Seconds that a sum of `MIB` over all workers takes, the median."""
        import torch
        import torch.distributed as dist

        values = torch.ones(MIB * 2**20 // 4, device=self.device)
        times: list[float] = []
        for _ in range(ROUNDS + 1):
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(values)
            if self.device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
            values.fill_(1.0)
        return statistics.median(times[1:])  # the first one opens the connections


def look(console: Console, folders: Sequence[str] = (), *, generates: bool = True) -> Findings:
    """What is found on the Ray that this process is connected to."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    with console.task("ask the nodes", len(nodes), "nodes"):
        kind: Any = ray.remote(NodeProbe)
        probes = [_on(node, kind, rank, len(nodes), 0) for rank, node in enumerate(nodes)]
        _get([probe.seat.remote() for probe in probes])
        gpus = [node["Resources"].get("GPU", 0.0) for node in nodes]
        asked = [probe.facts.remote(num, list(folders)) for probe, num in zip(probes, gpus, strict=True)]
        facts: list[NodeFacts] = _get(asked)
    with console.task("ways between the nodes"):
        ports = _get([probe.listen.remote() for probe in probes])
        ways = [(each.host, port) for each, port in zip(facts, ports, strict=True)]
        unreachable = [line for lines in _get([probe.unreachable.remote(ways) for probe in probes]) for line in lines]
    for probe in probes:
        ray.kill(probe)
    with console.task("all-reduce"):
        summed = _tried(lambda: _all_reduce(nodes, all(num >= 1 for num in gpus)))
    generator: float | str | None = None
    if generates:
        with console.task("a generator's start"):
            generator = _tried(lambda: _generator(any(num >= 1 for num in gpus)))
    return Findings(facts, unreachable, summed, generator, wandb_facts())


def _all_reduce(nodes: Sequence[Any], on_gpus: bool) -> AllReduce:
    # A node alone gets two workers, on a GPU each if it can be: with one of them there would be nothing to send.
    places = list(nodes) if len(nodes) > 1 else [nodes[0], nodes[0]]
    on_gpus = on_gpus and (len(nodes) > 1 or nodes[0]["Resources"].get("GPU", 0.0) >= 2)
    num = len(places)
    kind: Any = ray.remote(NodeProbe)
    workers = [_on(node, kind, rank, num, int(on_gpus)) for rank, node in enumerate(places)]
    try:
        _get([worker.seat.remote() for worker in workers])
        set_up = [
            worker.set_up.remote(rank if len(nodes) == 1 else 0, 1, ASK_S, rank == 0)
            for rank, worker in enumerate(workers)
        ]
        address = _get(set_up)[0]
        _get([worker.join.remote(address, ASK_S) for worker in workers])
        time_s = max(_get([worker.all_reduce.remote() for worker in workers]))
        return AllReduce(len(nodes), num, "nccl" if on_gpus else "gloo", MIB * 2**20, time_s)
    finally:
        for worker in workers:
            ray.kill(worker)


def warm_start() -> float:
    """Seconds until a vLLM engine with a tiny model, made here, has answered; in a process of its own."""
    from actors.generator import Generator
    from configs.model_stages import ModelSizes
    from configs.schema import GeneratorConfig, LoraConfig
    from rlhf.base_model import write_new_model
    from rlhf.chat import ChatTokenizer
    from rlhf.records import Message, Sampling
    from rlhf.templates import TEMPLATES
    from rlhf.tokenizer import train_tokenizer

    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="tenfold-doctor-") as folder:
        tokenizer = train_tokenizer(["one two three four"], 262)
        tokenizer.chat_template = TEMPLATES["roles"].jinja
        sizes = ModelSizes(hidden_size=128, num_layers=2, num_heads=4, num_key_value_heads=2, context_tokens=256)
        write_new_model(sizes, tokenizer, Path(folder) / "model", seed=0)
        config = GeneratorConfig(kv_cache_gib=0.03125, enforce_eager=True)
        generator = Generator(
            f"{folder}/model", config, LoraConfig(rank=8, alpha=8), dtype="float32", max_model_tokens=128, seed=0
        )
        prompt = ChatTokenizer(f"{folder}/model").prompt([Message("user", "one two")])
        (group,) = generator.answer([prompt], Sampling(n=10, max_answer_tokens=8), [0])
        assert len(group.answers) == 10
        generator.shutdown()
    return time.perf_counter() - began


def _generator(on_gpu: bool) -> float:
    # One call: what vLLM does to its process must not meet another task.
    task: Any = ray.remote(num_cpus=0, num_gpus=int(on_gpu), max_retries=0, max_calls=1)(warm_start)
    return ray.get(task.remote(), timeout=GENERATOR_S)


def wandb_facts() -> dict[str, str]:
    """Whether W&B answers this process, and whether it has a key for it (not which)."""
    import requests

    address = os.environ.get("WANDB_BASE_URL", WANDB_ADDRESS)
    error = ""
    try:
        requests.get(address, timeout=WANDB_S)
    except requests.RequestException as failure:
        error = type(failure).__name__
    return {"address": address, "error": error, "key": "set" if has_wandb_key() else ""}


def _on(node: Any, kind: Any, rank: int, num: int, gpus: int) -> Any:
    place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    device = "cuda" if gpus else "cpu"
    return kind.options(num_cpus=0, num_gpus=gpus, scheduling_strategy=place).remote("doctor", rank, num, device)


def _get(refs: Sequence[Any]) -> list[Any]:
    return ray.get(list(refs), timeout=ASK_S)


def _tried(call: Callable[[], Any]) -> Any:
    """What it returns, or why it failed."""
    try:
        return call()
    except (RayError, TimeoutError, AssertionError) as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[-300:]}"
