"""64 GPUs, as Ray counts them, on 8 nodes: every worker gets the place that was planned for it."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import ray
from ray.util.placement_group import placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from benchmarks.simulated_nodes import simulated_nodes
from cluster.placement import place
from cluster.ray_session import RaySession
from cluster.reserve import reserve
from configs.schema import ClusterConfig, Recipe
from rlhf.errors import PlacementError
from tests.fakes import SilentConsole
from tests.recipes import tiny_recipe

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

NODES, GPUS_PER_NODE = 8, 8


def recipe(folder: Path, generators: int) -> Recipe:
    """48 workers with a GPU each, and generators with two."""
    workers = {"policy": 24, "critic": 16, "reference": 4, "reward": 4, "generator": generators}
    return tiny_recipe(
        "model",
        folder,
        stages=["ppo"],
        generator={"tensor_parallel": 2},
        cluster={"placement": "separate", "workers": workers},
    )


def every_worker_of_64_gpus_has_its_place(folder: Path) -> None:
    with (
        simulated_nodes(NODES, cpus=8, gpus=GPUS_PER_NODE) as address,
        RaySession(ClusterConfig(address=address)) as session,
    ):
        assert (session.resources.cpus, session.resources.gpus) == (64, 64)
        with pytest.raises(PlacementError, match=r"takes 66 GPUs: 2 are missing\. There are 64\."):
            place(recipe(folder, generators=9), session.resources)
        placement = place(recipe(folder, generators=8), session.resources)
        home = reserve(placement, 60, SilentConsole())
        node_of: dict[int, str] = placement_group_table(home)["bundles_to_node_id"]
        taken: Counter[str] = Counter()
        for bundle, node in node_of.items():  # a generator's two GPUs are in one bundle, so on one node
            taken[node] += round(placement.bundles[bundle]["GPU"])
        assert list(taken.values()) == [GPUS_PER_NODE] * NODES

        def where() -> tuple[str, int]:
            return ray.get_runtime_context().get_node_id(), len(ray.get_gpu_ids())

        wanted, refs = [], []
        for node, bundle in {node: bundle for bundle, node in node_of.items()}.items():  # one of each node
            takes = placement.bundles[bundle]
            at = PlacementGroupSchedulingStrategy(home, placement_group_bundle_index=bundle)
            wanted.append((node, takes["GPU"]))
            asks = ray.remote(where).options(num_cpus=takes["CPU"], num_gpus=takes["GPU"], scheduling_strategy=at)
            refs.append(asks.remote())
        assert ray.get(refs, timeout=120) == wanted


def test_every_worker_of_64_gpus_has_its_place(tmp_path: Path) -> None:
    """In a process of its own, since the tests of this one share another Ray."""
    what = every_worker_of_64_gpus_has_its_place.__name__
    code = f"import sys, pathlib; from {__name__} import {what}; {what}(pathlib.Path(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=230, check=False)
    assert done.returncode == 0, done.stderr
