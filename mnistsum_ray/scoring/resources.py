"""Resources of a scoring run: workers, readers, devices and precision."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch

from mnistsum_ray.cluster.gpu import check_cuda, drop_unusable_gpus, probe_gpu
from mnistsum_ray.cluster.resources import TASKS_CPU_SHARE, ClusterResources, inspect_cluster, wait_until_free
from mnistsum_ray.config import ScoreConfig
from mnistsum_ray.errors import RequestError
from mnistsum_ray.model.device import faster_with_bf16

_UNKNOWN_GPU_LIMIT: Final = 16
"""GPUs that a growing cluster is assumed to reach if its autoscaler does not publish a limit."""

_UNKNOWN_CPU_LIMIT: Final = 128
"""CPUs that a growing cluster is assumed to reach, for a run that scores on CPUs."""

_READERS_PER_GPU: Final = 8
"""CPUs that are assumed to come with each GPU of a growing cluster that publishes no limit."""


@dataclass(frozen=True)
class ScoringResourcePlan:
    """Resources that a scoring run reserves."""

    workers: int
    """Maximum number of workers that predict at the same time; fewer run where fewer resources are free."""
    use_gpu: bool
    cpus_per_worker: float
    readers: int
    """Maximum number of tasks that read and decode for the workers; 0: each worker reads by itself."""
    cpus_per_task: float
    """CPUs that each reading and each writing task reserves."""

    @property
    def per_worker(self) -> dict[str, float]:
        """Resources that one worker reserves."""
        return {"CPU": self.cpus_per_worker} | ({"GPU": 1.0} if self.use_gpu else {})

    def bundles(self) -> list[dict[str, float]]:
        """Resources that one worker, one reader and one writer need; each bundle has to fit on one node."""
        return [self.per_worker, *([{"CPU": self.cpus_per_task}] * (2 if self.readers else 0))]


def allocate_resources(config: ScoreConfig, say: Callable[[str], None]) -> tuple[ScoringResourcePlan, str]:
    """Plan the resources of a run, wait until the first worker fits, and choose the precision.

    Returns:
        The plan, and the configured precision or else the faster one of `bf16` and `fp32`.

    Raises:
        RequestError: the cluster can never give what the config asks for, or does not give it within `wait_seconds`.
    """
    use_gpu = False if config.precision == "int8" else config.use_gpu
    cluster, probe = drop_unusable_gpus(inspect_cluster(), use_gpu, config.wait_seconds, say)
    plan = plan_scoring_resources(config, cluster)
    wait_until_free(plan.bundles(), config.wait_seconds, say)
    if plan.use_gpu and probe is None:  # The cluster had no GPU at first and got one during the wait.
        probe = probe_gpu(config.wait_seconds)
        check_cuda(probe, config.use_gpu)
    if config.precision:
        return plan, config.precision
    # Without GPUs, the CPU of this machine stands in for the CPUs of the nodes that score.
    bf16 = probe.bf16 if probe else faster_with_bf16(torch.device("cpu"))
    return plan, "bf16" if bf16 else "fp32"


def plan_scoring_resources(config: ScoreConfig, cluster: ClusterResources) -> ScoringResourcePlan:
    """Choose workers, readers and devices: from the config where it says so, and otherwise from the cluster.

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
    max_workers = max(1, int(max(gpus, limits.get("GPU", 0)) if use_gpu else max(cpus, limits.get("CPU", 0))))
    workers = config.num_workers or max_workers
    if workers > max_workers and not cluster.can_grow:
        kind = "GPU" if use_gpu else "CPU"
        raise RequestError(
            f"--num-workers {workers}: needs {workers} {kind}s, one a worker; the cluster has {cluster.describe()}"
        )
    if cluster.can_grow:  # New nodes bring their own CPUs.
        cpus = max(cpus, limits.get("CPU", float(workers * (_READERS_PER_GPU if use_gpu else 1))))
    readers = (max(1, int(cpus) - 1) if use_gpu else 0) if config.num_readers is None else config.num_readers
    if use_gpu and not readers:
        raise RequestError("--num-readers 0: a GPU would wait for its data; give at least 1")
    # If the workers reserved every CPU, the tasks that read for them would wait forever.
    tasks_share = 0.0 if not readers else 1.0 if use_gpu else TASKS_CPU_SHARE
    return ScoringResourcePlan(
        workers=workers,
        use_gpu=use_gpu,
        cpus_per_worker=0.0 if use_gpu and readers else min(1.0, (1 - tasks_share) * cpus / workers),
        readers=readers,
        cpus_per_task=min(1.0, tasks_share * cpus / (readers + 1)),
    )


def _growth_limits(cluster: ClusterResources, *, use_gpu: bool, only_cpus: bool) -> dict[str, float]:
    """Resources that the run may grow into. A run on CPUs does not start GPU nodes for their CPUs, unless it asks for CPUs."""
    if not cluster.can_grow:
        return {}
    if use_gpu:
        return {"GPU": float(_UNKNOWN_GPU_LIMIT)} | cluster.limits
    return {} if cluster.limits.get("GPU") and not only_cpus else {"CPU": float(_UNKNOWN_CPU_LIMIT)} | cluster.limits
