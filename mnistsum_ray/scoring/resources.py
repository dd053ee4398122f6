"""TODO scoring.resources"""

from dataclasses import dataclass
from typing import Final

from mnistsum_ray.cluster.resources import TASKS_CPU_SHARE, Cluster
from mnistsum_ray.config import ScoreConfig
from mnistsum_ray.errors import RequestError

_UNKNOWN_LIMIT: Final = 16
"""GPUs that a growing cluster is taken to reach where its autoscaler does not say how many."""

_READERS_PER_GPU: Final = 8
"""CPUs that are taken to come with each GPU, likewise."""

_UNKNOWN_LIMIT_CPUS: Final = 128
"""The same of CPUs, where a run scores on those."""


@dataclass(frozen=True)
class ScoringResourcePlan:
    """What a scoring run takes."""

    actors: int
    """The most at once; fewer work where no more are free."""
    use_gpu: bool
    cpus_per_actor: float
    readers: int
    """Tasks that read for the actors; 0: each actor reads by itself."""
    cpus_per_task: float
    """What each task that reads, and each that writes, reserves."""

    @property
    def per_actor(self) -> dict[str, float]:
        """What each actor reserves."""
        return {"CPU": self.cpus_per_actor} | ({"GPU": 1.0} if self.use_gpu else {})

    def bundles(self) -> list[dict[str, float]]:
        """What one actor needs to get on, piece by piece, each of which has to fit on one node."""
        return [self.per_actor, *([{"CPU": self.cpus_per_task}] * (2 if self.readers else 0))]


def plan_scoring_resources(config: ScoreConfig, cluster: Cluster) -> ScoringResourcePlan:
    """Decide actors, readers and devices: what the config says, and otherwise what the cluster has.

    Raises:
        RequestError: more is asked for than the cluster can ever have.
    """
    gpus, cpus = int(cluster.total.get("GPU", 0)), cluster.total.get("CPU", 0.0)
    use_gpu = (gpus > 0 and config.precision != "int8") if config.use_gpu is None else config.use_gpu
    if use_gpu and not gpus and not cluster.can_grow:
        raise RequestError(f"--use-gpu true: the cluster has no GPU ({cluster.describe()})")
    only_cpus = config.use_gpu is False or config.precision == "int8"
    limits = _worth_growing_to(cluster, use_gpu=use_gpu, only_cpus=only_cpus)
    # Sized for what the cluster can grow to: fewer work until then, and none is missing when the machines have come.
    most = max(1, int(max(gpus, limits.get("GPU", 0)) if use_gpu else max(cpus, limits.get("CPU", 0))))
    actors = config.num_workers or most
    if actors > most and not cluster.can_grow:
        kind = "GPU" if use_gpu else "CPU"
        raise RequestError(f"--num-workers {actors}: needs {actors} {kind}s, one a worker; the cluster has {cluster.describe()}")
    if cluster.can_grow:  # machines that are still to come bring their own
        cpus = max(cpus, limits.get("CPU", float(actors * (_READERS_PER_GPU if use_gpu else 1))))
    readers = (max(1, int(cpus) - 1) if use_gpu else 0) if config.num_readers is None else config.num_readers
    if use_gpu and not readers:
        raise RequestError("--num-readers 0: a GPU would wait for its data; give at least 1")
    # Actors that held every CPU would starve the tasks that read for them, for ever.
    tasks_share = 0.0 if not readers else 1.0 if use_gpu else TASKS_CPU_SHARE
    return ScoringResourcePlan(
        actors=actors,
        use_gpu=use_gpu,
        cpus_per_actor=0.0 if use_gpu and readers else min(1.0, (1 - tasks_share) * cpus / actors),
        readers=readers,
        cpus_per_task=min(1.0, tasks_share * cpus / (readers + 1)),
    )


def _worth_growing_to(cluster: Cluster, *, use_gpu: bool, only_cpus: bool) -> dict[str, float]:
    """What a scoring run may use of a cluster that grows. Nodes with GPUs are not worth having for their CPUs."""
    if not cluster.can_grow:
        return {}
    if use_gpu:
        return {"GPU": float(_UNKNOWN_LIMIT)} | cluster.limits
    return {} if cluster.limits.get("GPU") and not only_cpus else {"CPU": float(_UNKNOWN_LIMIT_CPUS)} | cluster.limits
