"""What the cluster has and what a run takes of it; what can never run is refused before anything starts."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import ray
from ray.autoscaler.sdk import request_resources

from mnistsum_ray.config import Refusal, ScoreConfig, TrainConfig

_DATA_CPU_SHARE: Final = 0.25
"""What is left of the CPUs for the data tasks at least: with all reserved by training workers, they would wait for ever."""

_POLL_SECONDS: Final = 2.0
_SAY_SECONDS: Final = 15.0


@dataclass(frozen=True)
class Cluster:
    """Logical resources: now, free at this moment, and the most that an autoscaler may reach."""

    nodes: tuple[dict[str, float], ...]
    """What each node has in all, of those that have CPUs."""
    total: dict[str, float]
    free: dict[str, float]
    ceiling: dict[str, float]

    @property
    def can_grow(self) -> bool:
        return any(self.ceiling.get(kind, 0) > self.total.get(kind, 0) for kind in ("CPU", "GPU"))

    def places(self, each: dict[str, float]) -> int:
        """How many workers that reserve so much each fit on the nodes as they are."""
        return sum(min(int(node.get(kind, 0) / amount + 1e-9) for kind, amount in each.items() if amount) for node in self.nodes)

    def describe(self) -> str:
        now = (
            f"{_count(self.total, 'CPU')} and {_count(self.total, 'GPU')} on {len(self.nodes)} node{'s' * (len(self.nodes) != 1)}"
        )
        most = f", at most {_count(self.ceiling, 'CPU')} and {_count(self.ceiling, 'GPU')} after growing" if self.can_grow else ""
        return now + most


@dataclass(frozen=True)
class Allotment:
    """What a run takes."""

    workers: tuple[int, int]
    use_gpu: bool
    cpus_per_worker: float
    data_cpus_per_worker: float
    """What the task that feeds a worker reserves: little, so that it fits in beside the workers."""

    @property
    def per_worker(self) -> dict[str, float]:
        """What each training worker reserves."""
        return {"CPU": self.cpus_per_worker} | ({"GPU": 1.0} if self.use_gpu else {})

    def bundles(self) -> list[dict[str, float]]:
        """The same, piece by piece, each of which has to fit on one node."""
        return [self.per_worker, {"CPU": self.data_cpus_per_worker}] * self.workers[0]


def look() -> Cluster:
    """Ask the cluster that this process is connected to."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    total = dict(ray.cluster_resources())
    return Cluster(
        nodes=tuple(dict(node["Resources"]) for node in alive if node["Resources"].get("CPU")),
        total=total,
        free=dict(ray.available_resources()),
        ceiling={kind: max(total.get(kind, 0), limit) for kind, limit in (total | _autoscaler_limits()).items()},
    )


def _autoscaler_limits() -> dict[str, float]:
    # What Ray Train itself asks when it explains why a worker group does not start; there is no public call.
    from ray._private.state import state

    limits = state.get_max_resources_from_cluster_config()
    return {kind: float(limit) for kind, limit in (limits or {}).items()}


def allot(config: TrainConfig, cluster: Cluster) -> Allotment:
    """Decide workers and devices: what the config says, and otherwise what the cluster has.

    Raises:
        Refusal: more is asked for than the cluster can ever have.
    """
    gpus = int(cluster.ceiling.get("GPU", 0))
    use_gpu = gpus > 0 if config.use_gpu is None else config.use_gpu
    if use_gpu and not gpus:
        raise Refusal(f"--use-gpu true: the cluster has no GPU ({cluster.describe()})")
    # On CPUs one worker a node, with a thread a core, does what many workers would without copying gradients about.
    fitting = int(cluster.total.get("GPU", 0)) if use_gpu else len(cluster.nodes)
    workers = config.worker_range or (max(1, fitting), max(1, fitting))
    most = gpus if use_gpu else int(cluster.ceiling.get("CPU", 0))
    if workers[0] > most:
        kind = "GPU" if use_gpu else "CPU"
        raise Refusal(
            f"--num-workers {workers[0]}: needs {workers[0]} {kind}s, one a worker; the cluster has {cluster.describe()}"
        )
    workers = (workers[0], min(workers[1], most))
    cpus = cluster.ceiling.get("CPU", 0.0) / workers[1]
    allotment = Allotment(
        workers=workers,
        use_gpu=use_gpu,
        cpus_per_worker=min(1.0, (1 - _DATA_CPU_SHARE) * cpus),
        data_cpus_per_worker=min(_DATA_CPU_SHARE, _DATA_CPU_SHARE * cpus),
    )
    fitting = cluster.places(allotment.per_worker)
    if workers[0] > fitting and not cluster.can_grow:
        each = " and ".join(_count(allotment.per_worker, kind) for kind in allotment.per_worker)
        raise Refusal(
            f"--num-workers {workers[0]}: only {fitting} of them, with {each} each, fit on the nodes ({cluster.describe()})"
        )
    return allotment


@dataclass(frozen=True)
class ScoreAllotment:
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


def allot_scoring(config: ScoreConfig, cluster: Cluster) -> ScoreAllotment:
    """Decide actors, readers and devices: what the config says, and otherwise what the cluster has.

    Raises:
        Refusal: more is asked for than the cluster can ever have.
    """
    gpus, cpus = int(cluster.ceiling.get("GPU", 0)), cluster.ceiling.get("CPU", 0.0)
    use_gpu = gpus > 0 if config.use_gpu is None else config.use_gpu
    if use_gpu and not gpus:
        raise Refusal(f"--use-gpu true: the cluster has no GPU ({cluster.describe()})")
    most = gpus if use_gpu else max(1, int(cpus))
    actors = config.num_workers or most
    if actors > most:
        kind = "GPU" if use_gpu else "CPU"
        raise Refusal(f"--num-workers {actors}: needs {actors} {kind}s, one a worker; the cluster has {cluster.describe()}")
    readers = (max(1, int(cpus) - 1) if use_gpu else 0) if config.num_readers is None else config.num_readers
    if use_gpu and not readers:
        raise Refusal("--num-readers 0: a GPU would wait for its data; give at least 1")
    # Actors that held every CPU would starve the tasks that read for them, for ever.
    tasks_share = 0.0 if not readers else 1.0 if use_gpu else _DATA_CPU_SHARE
    return ScoreAllotment(
        actors=actors,
        use_gpu=use_gpu,
        cpus_per_actor=0.0 if use_gpu and readers else min(1.0, (1 - tasks_share) * cpus / actors),
        readers=readers,
        cpus_per_task=min(1.0, tasks_share * cpus / (readers + 1)),
    )


def wait_until_free(bundles: list[dict[str, float]], seconds: float, say: Callable[[str], None]) -> None:
    """Wait until so much is free, since Ray would wait for ever and say nothing of it.

    Raises:
        Refusal: it is not, after so many seconds.
    """
    need = {kind: sum(bundle.get(kind, 0) for bundle in bundles) for kind in bundles[0]}
    started = time.monotonic()
    said = -_SAY_SECONDS
    asked = False
    try:
        while True:
            cluster = look()
            missing = {kind: amount for kind, amount in need.items() if cluster.free.get(kind, 0) < amount - 1e-9}
            if not missing:
                return
            waited = time.monotonic() - started
            wanted = " and ".join(_count(need, kind) for kind in need)
            free = " and ".join(_count(cluster.free, kind) for kind in need)
            if waited >= seconds:
                raise Refusal(
                    f"needs {wanted}, but after {waited:.0f} s only {free} are free ({cluster.describe()}): other jobs hold the "
                    "rest, or the cluster has not grown; ask for fewer --num-workers or give more --wait-seconds"
                )
            if cluster.can_grow and not asked:
                request_resources(bundles=bundles)
                asked = True
            if waited - said >= _SAY_SECONDS:
                say(f"waiting for {wanted}; free now: {free} ({cluster.describe()}); giving up in {seconds - waited:.0f} s")
                said = waited
            time.sleep(min(_POLL_SECONDS, max(0.1, seconds - waited)))
    finally:
        if asked:
            request_resources(bundles=[])  # it would hold the nodes for ever; from here on Ray asks for its own


def describe_wait() -> str:
    """Why the workers may be silent, and what the cluster has."""
    cluster = look()
    return (
        f"they are being started or replaced, or wait for data; the cluster has {cluster.describe()}, "
        f"free: {cluster.free.get('CPU', 0):g} CPUs, {cluster.free.get('GPU', 0):g} GPUs"
    )


def _count(resources: dict[str, float], kind: str) -> str:
    amount = resources.get(kind, 0)
    return f"{amount:g} {kind}{'s' * (amount != 1)}"
