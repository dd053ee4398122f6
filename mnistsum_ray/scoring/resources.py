"""Resources of a scoring run: workers, devices and precision."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch

from mnistsum_ray.cluster.gpu import check_cuda, drop_unusable_gpus, probe_gpu
from mnistsum_ray.cluster.resources import ClusterResources, inspect_cluster, wait_until_free
from mnistsum_ray.config import ScoreConfig
from mnistsum_ray.errors import RequestError
from mnistsum_ray.model.device import faster_with_bf16

_UNKNOWN_GPU_LIMIT: Final = 16
"""GPUs that a growing cluster is assumed to reach if its autoscaler does not publish a limit."""

_UNKNOWN_CPU_LIMIT: Final = 128
"""CPUs that a growing cluster is assumed to reach, for a run that scores on CPUs."""

_MAX_WORKERS_PER_GPU: Final = 8
_WORKER_GPU_BYTES: Final = 4 * 2**30
"""GPU memory of a worker: CUDA's own, and the activations of a batch of 2,048 rows."""
_UNKNOWN_GPU_BYTES: Final = 16 * 2**30


@dataclass(frozen=True)
class ScoringResourcePlan:
    """Resources that a scoring run reserves."""

    workers: int
    """Maximum number of workers at the same time; fewer run where fewer resources are free."""
    use_gpu: bool
    cpus_per_worker: float
    gpus_per_worker: float
    """1 / k where k workers share a GPU: while it predicts for one, the others read, decode and write."""

    @property
    def per_worker(self) -> dict[str, float]:
        """Resources that one worker reserves."""
        return {"CPU": self.cpus_per_worker} | ({"GPU": self.gpus_per_worker} if self.use_gpu else {})


def allocate_resources(config: ScoreConfig, say: Callable[[str], None]) -> tuple[ScoringResourcePlan, str]:
    """Plan the resources of a run, wait until the first worker fits, and choose the precision.

    Returns:
        The plan, and the configured precision or else the faster one of `bf16` and `fp32`.

    Raises:
        RequestError: the cluster can never give what the config asks for, or does not give it within `wait_seconds`.
    """
    use_gpu = False if config.precision == "int8" else config.use_gpu
    cluster, probe = drop_unusable_gpus(inspect_cluster(), use_gpu, config.wait_seconds, say)
    plan = plan_scoring_resources(config, cluster, probe.memory_bytes if probe else _UNKNOWN_GPU_BYTES)
    wait_until_free([plan.per_worker], config.wait_seconds, say)
    if plan.use_gpu and probe is None:  # The cluster had no GPU at first and got one during the wait.
        probe = probe_gpu(config.wait_seconds)
        check_cuda(probe, config.use_gpu)
    if config.precision:
        return plan, config.precision
    # Without GPUs, the CPU of this machine stands in for the CPUs of the nodes that score.
    bf16 = probe.bf16 if probe else faster_with_bf16(torch.device("cpu"))
    return plan, "bf16" if bf16 else "fp32"


def plan_scoring_resources(config: ScoreConfig, cluster: ClusterResources, gpu_bytes: int) -> ScoringResourcePlan:
    """Choose workers and devices: from the config where it says so, and otherwise from the cluster.

    By default a GPU is shared by as many workers as its memory of `gpu_bytes` and the CPUs of its node allow, at most 8.

    Raises:
        RequestError: the config asks for more than the cluster can ever have.
    """
    gpus, cpus = int(cluster.total.get("GPU", 0)), cluster.total.get("CPU", 0.0)
    use_gpu = (gpus > 0 and config.precision != "int8") if config.use_gpu is None else config.use_gpu
    if use_gpu and not gpus and not cluster.can_grow:
        raise RequestError(f"--use-gpu true: the cluster has no GPU ({cluster.describe()})")
    only_cpus = config.use_gpu is False or config.precision == "int8"
    limits = _growth_limits(cluster, use_gpu=use_gpu, only_cpus=only_cpus)
    # The plan is sized for the largest cluster. Until it has grown fewer workers run, and new nodes are used as they join.
    if not use_gpu:
        largest = max(1, int(max(cpus, limits.get("CPU", 0))))
        workers = config.num_workers or largest
        if workers > largest and not cluster.can_grow:
            raise RequestError(
                f"--num-workers {workers}: needs {workers} CPUs, one a worker; the cluster has {cluster.describe()}"
            )
        return ScoringResourcePlan(workers, False, min(1.0, max(cpus, limits.get("CPU", 1.0)) / workers), 0.0)
    largest = max(1, int(max(gpus, limits.get("GPU", 0))))
    cpus_per_gpu = min((node.get("CPU", 0.0) / node["GPU"] for node in cluster.gpu_nodes), default=float(_MAX_WORKERS_PER_GPU))
    sharing = max(1, min(_MAX_WORKERS_PER_GPU, int(cpus_per_gpu), gpu_bytes // _WORKER_GPU_BYTES))
    workers = config.num_workers or largest * sharing
    sharing = -(-workers // largest)
    return ScoringResourcePlan(workers, True, min(1.0, cpus_per_gpu / sharing), 1 / sharing)


def _growth_limits(cluster: ClusterResources, *, use_gpu: bool, only_cpus: bool) -> dict[str, float]:
    """Resources that the run may grow into. A run on CPUs does not start GPU nodes for their CPUs, unless it asks for CPUs."""
    if not cluster.can_grow:
        return {}
    if use_gpu:
        return {"GPU": float(_UNKNOWN_GPU_LIMIT)} | cluster.limits
    return {} if cluster.limits.get("GPU") and not only_cpus else {"CPU": float(_UNKNOWN_CPU_LIMIT)} | cluster.limits
