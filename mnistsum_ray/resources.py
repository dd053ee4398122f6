"""What the cluster has and what a run takes of it; what can never run is refused before anything starts."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final

import ray
import ray.exceptions
from ray.autoscaler.sdk import request_resources

from mnistsum_ray.config import ScoreConfig, TrainConfig
from mnistsum_ray.errors import Refusal, last_line

_TASKS_CPU_SHARE: Final = 0.25
"""What is left of the CPUs for other tasks at least: with all reserved by actors, those would wait for ever."""

_NODE_GROUP: Final = "ray.io/node-group"

_UNKNOWN_LIMIT: Final = 16
"""GPUs that a growing cluster is taken to reach where its autoscaler does not say how many."""

_READERS_PER_GPU: Final = 8
"""CPUs that are taken to come with each GPU, likewise."""

_UNKNOWN_LIMIT_CPUS: Final = 128
"""The same of CPUs, where a run scores on those."""

_MOST: Final = 4096
"""Of anything: an autoscaler's configuration may say that there is no limit."""

_PROBE_SECONDS: Final = 60.0
"""A process on another node has PyTorch to import first."""

_POLL_SECONDS: Final = 2.0
_SAY_SECONDS: Final = 15.0


@dataclass(frozen=True)
class Cluster:
    """Logical resources, in all and free at this moment."""

    nodes: tuple[dict[str, float], ...]
    """What each node has in all, of those that have CPUs or GPUs."""
    total: dict[str, float]
    free: dict[str, float]
    can_grow: bool
    """Whether an autoscaler may add nodes."""
    limits: dict[str, float] = field(default_factory=dict)
    """What the cluster can grow to, of the kinds for which its autoscaler says so."""

    @property
    def gpu_nodes(self) -> tuple[dict[str, float], ...]:
        return tuple(node for node in self.nodes if node.get("GPU"))

    def without_gpus(self) -> "Cluster":
        """The same cluster, for a job that cannot use its GPUs."""
        nodes = tuple({kind: amount for kind, amount in node.items() if kind != "GPU"} for node in self.nodes)
        total, free, limits = (
            {kind: amount for kind, amount in of.items() if kind != "GPU"} for of in (self.total, self.free, self.limits)
        )
        return replace(self, nodes=nodes, total=total, free=free, limits=limits)

    def places(self, each: dict[str, float]) -> int:
        """How many workers that reserve so much each fit on the nodes as they are."""
        return sum(min(int(node.get(kind, 0) / amount + 1e-9) for kind, amount in each.items() if amount) for node in self.nodes)

    def describe(self) -> str:
        """The cluster in words: `2 CPUs and 0 GPUs on 1 node`."""
        cpus, gpus = (_count(self.total, kind) for kind in ("CPU", "GPU"))
        growing = ", and may grow" if self.can_grow else ""
        return f"{cpus} and {gpus} on {len(self.nodes)} node{'s' * (len(self.nodes) != 1)}{growing}"


@dataclass(frozen=True)
class Allotment:
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


def look() -> Cluster:
    """Ask the cluster that this process is connected to."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    return Cluster(
        nodes=tuple(dict(node["Resources"]) for node in alive if any(node["Resources"].get(kind) for kind in ("CPU", "GPU"))),
        total=dict(ray.cluster_resources()),
        free=dict(ray.available_resources()),
        # What starts nodes by themselves, `ray up` and KubeRay, labels them with their kind.
        can_grow=any(_NODE_GROUP in node["Labels"] for node in alive),
        limits=_limits(),
    )


def _limits() -> dict[str, float]:
    """What the autoscaler's configuration allows; empty where there is none. Ray Data and Ray Train ask the same way."""
    from ray._private.state import state  # no public way to ask; of Ray 2.60

    limits = state.get_max_resources_from_cluster_config() or {}
    return {kind: float(min(amount, _MOST)) for kind, amount in limits.items() if amount}


@dataclass(frozen=True)
class GpuProbe:
    """What PyTorch finds on a node that has a logical GPU of Ray."""

    cuda: bool
    bf16: bool
    """Whether bfloat16 is faster there than float32."""
    torch: str
    """PyTorch's version."""


def usable(
    cluster: Cluster, use_gpu: bool | None, wait_seconds: float, say: Callable[[str], None]
) -> tuple[Cluster, GpuProbe | None]:
    """The cluster, without GPUs that PyTorch cannot use, and what it finds there; None where no GPU was asked for or is there.

    Ray counts a GPU on every Mac with Apple silicon, and NVIDIA's by their driver whichever PyTorch is installed.

    Args:
        cluster: as `look` gives it.
        use_gpu: the request; None takes GPUs where they can be used.
        wait_seconds: how long to wait for a GPU to become free to ask.
        say: takes a line for the console.

    Raises:
        Refusal: GPUs are asked for and PyTorch cannot use them, or none becomes free.
    """
    if use_gpu is False or not cluster.total.get("GPU"):
        return cluster, None
    wait_until_free([{"GPU": 1.0}], wait_seconds, say)
    probe = probe_gpu(wait_seconds)
    if probe.cuda:
        return cluster, probe
    refuse_without_cuda(probe, use_gpu)
    say(f"running on CPUs: {_no_cuda(probe, cluster)}")
    return cluster.without_gpus(), None


def probe_gpu(wait_seconds: float) -> GpuProbe:
    """Ask a node with a free GPU whether PyTorch has CUDA there.

    Raises:
        Refusal: none answered for so long, since another job has taken the GPU meanwhile, or the node was lost.
    """
    asked = ray.remote(num_gpus=1, num_cpus=0)(_probe).remote()
    try:
        found: GpuProbe = ray.get(asked, timeout=max(_PROBE_SECONDS, wait_seconds))
    except ray.exceptions.GetTimeoutError:
        ray.cancel(asked)
        raise Refusal(
            f"no GPU was free as a whole for {max(_PROBE_SECONDS, wait_seconds):.0f} s; other jobs hold them, so wait, or give "
            "more --wait-seconds"
        ) from None
    except ray.exceptions.RayError as error:
        raise Refusal(f"the node with a GPU could not be asked whether PyTorch has CUDA there: {last_line(error)}") from None
    return found


def _probe() -> GpuProbe:
    import torch

    from mnistsum_ray.device import faster_with_bf16

    cuda = torch.cuda.is_available()
    return GpuProbe(cuda, cuda and faster_with_bf16(torch.device("cuda")), torch.__version__)


def refuse_without_cuda(probe: GpuProbe, use_gpu: bool | None) -> None:
    """Raise Refusal where GPUs are asked for and PyTorch has no CUDA there."""
    if use_gpu and not probe.cuda:
        raise Refusal(f"--use-gpu true: {_no_cuda(probe, look())}; install a CUDA build of PyTorch there, or leave --use-gpu out")


def _no_cuda(probe: GpuProbe, cluster: Cluster) -> str:
    return f"Ray counts {_count(cluster.total, 'GPU')}, but PyTorch {probe.torch} has no CUDA there"


def allot(config: TrainConfig, cluster: Cluster) -> Allotment:
    """Decide workers and devices: what the config says, and otherwise what the cluster has.

    Raises:
        Refusal: more is asked for than the cluster can ever have.
    """
    gpus = int(cluster.total.get("GPU", 0))
    use_gpu = gpus > 0 if config.use_gpu is None else config.use_gpu
    if use_gpu and not gpus and not cluster.can_grow:
        raise Refusal(f"--use-gpu true: the cluster has no GPU ({cluster.describe()})")
    # On CPUs one worker a node, with a thread a core, does what many workers would without copying gradients about.
    here = max(1, gpus if use_gpu else len(cluster.nodes))
    workers = config.worker_range or (here, here)
    most = gpus if use_gpu else int(cluster.total.get("CPU", 0))
    if workers[0] > most and not cluster.can_grow:
        kind = "GPU" if use_gpu else "CPU"
        raise Refusal(
            f"--num-workers {workers[0]}: needs {workers[0]} {kind}s, one a worker; the cluster has {cluster.describe()}"
        )
    cpus = (1 - _TASKS_CPU_SHARE) * _cpus_a_worker(cluster, workers[1], use_gpu=use_gpu)
    # Machines that are still to come bring their own CPUs; GPU nodes that are there are taken to be like those.
    unknown = cluster.can_grow and not (use_gpu and cluster.gpu_nodes)
    allotment = Allotment(workers, use_gpu, cpus_per_worker=1.0 if unknown else min(1.0, cpus))
    fitting = cluster.places(allotment.per_worker)
    if workers[0] > fitting and not cluster.can_grow:
        each = " and ".join(_count(allotment.per_worker, kind) for kind in allotment.per_worker)
        raise Refusal(
            f"--num-workers {workers[0]}: only {fitting} of them, with {each} each, fit on the nodes ({cluster.describe()})"
        )
    return allotment


def _cpus_a_worker(cluster: Cluster, workers: int, *, use_gpu: bool) -> float:
    """CPUs of a node for each worker on it: of the GPU nodes the scarcest, since CPUs elsewhere are no use to a GPU worker."""
    if not use_gpu:
        return cluster.total.get("CPU", 0.0) / max(1, min(workers, int(cluster.total.get("CPU", 0))))
    return min((node.get("CPU", 0.0) / min(node["GPU"], workers) for node in cluster.gpu_nodes), default=0.0)


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
    gpus, cpus = int(cluster.total.get("GPU", 0)), cluster.total.get("CPU", 0.0)
    use_gpu = (gpus > 0 and config.precision != "int8") if config.use_gpu is None else config.use_gpu
    if use_gpu and not gpus and not cluster.can_grow:
        raise Refusal(f"--use-gpu true: the cluster has no GPU ({cluster.describe()})")
    only_cpus = config.use_gpu is False or config.precision == "int8"
    limits = _worth_growing_to(cluster, use_gpu=use_gpu, only_cpus=only_cpus)
    # Sized for what the cluster can grow to: fewer work until then, and none is missing when the machines have come.
    most = max(1, int(max(gpus, limits.get("GPU", 0)) if use_gpu else max(cpus, limits.get("CPU", 0))))
    actors = config.num_workers or most
    if actors > most and not cluster.can_grow:
        kind = "GPU" if use_gpu else "CPU"
        raise Refusal(f"--num-workers {actors}: needs {actors} {kind}s, one a worker; the cluster has {cluster.describe()}")
    if cluster.can_grow:  # machines that are still to come bring their own
        cpus = max(cpus, limits.get("CPU", float(actors * (_READERS_PER_GPU if use_gpu else 1))))
    readers = (max(1, int(cpus) - 1) if use_gpu else 0) if config.num_readers is None else config.num_readers
    if use_gpu and not readers:
        raise Refusal("--num-readers 0: a GPU would wait for its data; give at least 1")
    # Actors that held every CPU would starve the tasks that read for them, for ever.
    tasks_share = 0.0 if not readers else 1.0 if use_gpu else _TASKS_CPU_SHARE
    return ScoreAllotment(
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
