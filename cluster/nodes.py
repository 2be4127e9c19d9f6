"""The nodes of the cluster, as Ray sees them now."""

from __future__ import annotations

from typing import Any

import ray

from cluster.placement import Node


def nodes_there() -> tuple[Node, ...]:
    """The nodes that live, by name."""
    found = [_node(node) for node in ray.nodes() if node["Alive"]]
    return tuple(sorted(found, key=lambda node: (node.name, node.address)))


def _node(node: dict[str, Any]) -> Node:
    amounts = {kind: float(amount) for kind, amount in node["Resources"].items()}
    return Node(str(node.get("NodeName") or node["NodeManagerAddress"]), str(node["NodeManagerAddress"]), amounts)
