"""TODO training.resources"""

from dataclasses import dataclass

from mnistsum_ray.cluster.resources import TASKS_CPU_SHARE, Cluster, count_of
from mnistsum_ray.config import TrainConfig
from mnistsum_ray.errors import RequestError


@dataclass(frozen=True)
class ResourcePlan:
    """What a run takes."""

    workers: tuple[int, int]
    use_gpu: bool
    cpus_per_worker: float

    @property
    def per_worker(self) -> dict[str, float]:
        """What each training worker reserves."""
        return {"CPU": self.cpus_per_worker} | ({"GPU": 1.0} if self.use_gpu else {})

    def bundles(self) -> list[dict[str, float]]:
        """The same for as many as are needed to begin, each of which has to fit on one node."""
        return [self.per_worker] * self.workers[0]


def plan_resources(config: TrainConfig, cluster: Cluster) -> ResourcePlan:
    """Decide workers and devices: what the config says, and otherwise what the cluster has.

    Raises:
        RequestError: more is asked for than the cluster can ever have.
    """
    gpus = int(cluster.total.get("GPU", 0))
    use_gpu = gpus > 0 if config.use_gpu is None else config.use_gpu
    if use_gpu and not gpus and not cluster.can_grow:
        raise RequestError(f"--use-gpu true: the cluster has no GPU ({cluster.describe()})")
    # On CPUs one worker a node, with a thread a core, does what many workers would without copying gradients about.
    here = max(1, gpus if use_gpu else len(cluster.nodes))
    workers = config.worker_range or (here, here)
    most = gpus if use_gpu else int(cluster.total.get("CPU", 0))
    if workers[0] > most and not cluster.can_grow:
        kind = "GPU" if use_gpu else "CPU"
        raise RequestError(
            f"--num-workers {workers[0]}: needs {workers[0]} {kind}s, one a worker; the cluster has {cluster.describe()}"
        )
    cpus = (1 - TASKS_CPU_SHARE) * _cpus_a_worker(cluster, workers[1], use_gpu=use_gpu)
    # Machines that are still to come bring their own CPUs; GPU nodes that are there are taken to be like those.
    unknown = cluster.can_grow and not (use_gpu and cluster.gpu_nodes)
    plan = ResourcePlan(workers, use_gpu, cpus_per_worker=1.0 if unknown else min(1.0, cpus))
    fitting = cluster.places(plan.per_worker)
    if workers[0] > fitting and not cluster.can_grow:
        each = " and ".join(count_of(plan.per_worker, kind) for kind in plan.per_worker)
        raise RequestError(
            f"--num-workers {workers[0]}: only {fitting} of them, with {each} each, fit on the nodes ({cluster.describe()})"
        )
    return plan


def _cpus_a_worker(cluster: Cluster, workers: int, *, use_gpu: bool) -> float:
    """CPUs of a node for each worker on it: of the GPU nodes the scarcest, since CPUs elsewhere are no use to a GPU worker."""
    if not use_gpu:
        return cluster.total.get("CPU", 0.0) / max(1, min(workers, int(cluster.total.get("CPU", 0))))
    return min((node.get("CPU", 0.0) / min(node["GPU"], workers) for node in cluster.gpu_nodes), default=0.0)
