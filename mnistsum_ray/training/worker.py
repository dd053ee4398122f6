"""TODO training.worker"""

import numpy as np
import ray
import ray.exceptions
import ray.train
import ray.train.torch
import torch


def set_cpu_threads(workers_on_node: int) -> None:
    """Have a CPU worker use its node's cores, shared with its neighbours, and not just those that it reserves."""
    torch.set_num_threads(max(1, _node_cpus() // workers_on_node))


def _node_cpus() -> int:
    here = ray.get_runtime_context().get_node_id()
    cpus = next((node["Resources"].get("CPU", 1) for node in ray.nodes() if node["NodeID"] == here), 1)
    return max(1, int(np.floor(cpus)))
