"""A training worker's place in the worker group, and the settings of its process."""

from dataclasses import dataclass

import ray
import ray.train
import ray.train.torch
import torch

from mnistsum_ray.model.device import disable_tf32, enable_determinism, tune_malloc
from mnistsum_ray.model.distributed import all_reduce_sum


@dataclass(frozen=True)
class Worker:
    """Rank, size of the worker group, and the device of this worker."""

    rank: int
    world_size: int
    device: torch.device
    cpus: int
    """This worker's share of the CPUs of its node."""

    def all_agree(self, value: bool) -> bool:
        """True on every worker if the value is true on every worker."""
        return bool(all_reduce_sum(torch.tensor(float(value), device=self.device)).item() == self.world_size)


def setup_worker() -> Worker:
    """Set up this process as a training worker: exact float32 on GPUs; threads, determinism and memory on CPUs."""
    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    disable_tf32()
    cpus = max(1, cpus_of_node() // context.get_local_world_size())
    if device.type == "cpu":
        # Ray sets one thread per reserved CPU, and a worker reserves less than one CPU, see resources.py.
        torch.set_num_threads(cpus)
        enable_determinism()
        tune_malloc()
    return Worker(context.get_world_rank(), context.get_world_size(), device, cpus)


def cpus_of_node() -> int:
    """CPUs of the node of this process."""
    node_id = ray.get_runtime_context().get_node_id()
    cpus = next((node["Resources"].get("CPU", 1) for node in ray.nodes() if node["NodeID"] == node_id), 1)
    return max(1, int(cpus))
