"""Nodes of the cluster, as Ray describes them, and how to run something on one of them."""

from collections.abc import Collection
from typing import Any, Final

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mnistsum_ray.cluster.connection import can_connect

Resources = dict[str, float]
"""From kind (CPU, GPU, …) to amount."""

HEAD: Final = "node:__internal_head__"
"""A resource that the head node alone has."""


def this_node() -> Resources:
    """Total resources of the node of this process."""
    node_id = ray.get_runtime_context().get_node_id()
    return next((dict(node["Resources"]) for node in ray.nodes() if node["NodeID"] == node_id), {})


def on_node(node: str | None = None) -> dict[str, Any]:
    """Options of a task or actor that reserves nothing and runs on one node alone: the one of this id, or of this process."""
    strategy = NodeAffinitySchedulingStrategy(node or ray.get_runtime_context().get_node_id(), soft=False)
    return {"num_cpus": 0, "scheduling_strategy": strategy}


def usable_nodes() -> list[dict[str, Any]]:
    """Ray's entry of each living node that has CPUs or GPUs."""
    return [node for node in ray.nodes() if node["Alive"] and any(node["Resources"].get(kind) for kind in ("CPU", "GPU"))]


def lost_nodes(drained: Collection[str] = ()) -> dict[str, str]:
    """Address by id of each node that the cluster has lost, or is about to lose. Ray itself notices a loss after the workers on
    other nodes have failed."""
    return {
        node["NodeID"]: node["NodeManagerAddress"]
        for node in ray.nodes()
        if not node["Alive"] or node["NodeID"] in drained or not can_connect(node["NodeManagerAddress"], node["NodeManagerPort"])
    }
