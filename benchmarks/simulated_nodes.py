"""A Ray cluster of many nodes on this machine, with GPUs that Ray counts and nobody has."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

# Ray would start a worker per CPU on every node, before one is asked for, and run all of them at a niceness of 15.
_SYSTEM_CONFIG = {"enable_worker_prestart": False, "worker_niceness": 0}


@contextmanager
def simulated_nodes(num_nodes: int, cpus: float, gpus: int) -> Iterator[str]:
    """The address of a cluster of `num_nodes`, each with so many CPUs and GPUs as Ray counts; it ends with the block.

    Every node has a raylet and an object store of its own, so that what goes to another node takes the way of the
    network. Start it in a process without another Ray.
    """
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
    from ray.cluster_utils import Cluster

    # As `ray start` has it by default. Where the driver alone asks for a token it refuses the cluster's calls, and Ray
    # takes every actor for forgotten.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp", ignore_cleanup_errors=True) as folder:
        os.environ["RAY_TMPDIR"] = folder  # a short path: those of Ray's sockets are long
        node = {"num_cpus": cpus, "num_gpus": gpus, "object_store_memory": 256 << 20}
        head = node | {"include_dashboard": False, "_system_config": _SYSTEM_CONFIG}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            for _ in range(num_nodes - 1):
                cluster.add_node(**node)
            address = cluster.address
            assert address is not None
            yield address
        finally:
            cluster.shutdown()
            del os.environ["RAY_TMPDIR"]
