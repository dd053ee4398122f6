"""Logical resources of the cluster: plan the workers of a job, and wait until they are free."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import ray
import ray.exceptions
from ray.util.placement_group import placement_group, remove_placement_group

from mnistsum_ray.cluster.connection import started_cluster
from mnistsum_ray.cluster.nodes import Resources, on_node, usable_nodes
from mnistsum_ray.errors import RequestError, TryAgainError, counted, root_cause

_GROUP_CPU_SHARE: Final = 0.75
"""CPUs that a worker of a group reserves: the rest is for the tasks that feed it."""

_ASSUMED_LIMIT: Final = {"GPU": 16, "CPU": 128}
"""Resources that a cluster is assumed to grow to: what its autoscaler may add is not known."""

_MAX_WORKERS_PER_GPU: Final = 8
_WORKER_GPU_BYTES: Final = 4 * 2**30
"""GPU memory of a worker that scores: CUDA's own, and the activations of a batch of 2,048 rows."""
_ASSUMED_GPU_BYTES: Final = 16 * 2**30

_CUDA_SECONDS: Final = 120.0
"""Longest wait for the import of PyTorch on another node."""
_REPORT_SECONDS: Final = 10.0
"""Interval of the console lines that say what is waited for."""
_GRACE_SECONDS: Final = 1.0
"""Time in which Ray counts what was given back; no wait is shorter, and this one is silent."""
_EPSILON: Final = 1e-9
"""Ray rounds fractions of a resource to 0.0001, so a smaller difference is a rounding error."""


@dataclass(frozen=True)
class Gpu:
    """A GPU that PyTorch can use."""

    bf16: bool
    """It is faster with bfloat16 than with float32."""
    memory_bytes: int


@dataclass(frozen=True)
class ClusterResources:
    """Logical resources of the cluster at one moment."""

    nodes: tuple[Resources, ...]
    """Total of each node that has CPUs or GPUs."""
    can_grow: bool = False
    """Nodes may be added: it is not one that this process has started."""

    def total(self, kind: str) -> float:
        return sum(node.get(kind, 0.0) for node in self.nodes)

    def cpus_per_gpu(self) -> float:
        """CPUs for each GPU on the node with the fewest, since those of other nodes are of no use; infinite without GPUs."""
        return min((node.get("CPU", 0.0) / node["GPU"] for node in self.nodes if node.get("GPU")), default=math.inf)

    def workers_that_fit(self, bundle: Resources) -> int:
        """Number of workers that fit on the present nodes if each reserves this bundle on one node."""
        return sum(self.workers_on(node, bundle) for node in self.nodes)

    @staticmethod
    def workers_on(node: Resources, bundle: Resources) -> int:
        """Number of workers that fit on one node."""
        return min(int(node.get(kind, 0) / amount + _EPSILON) for kind, amount in bundle.items() if amount)

    def __str__(self) -> str:
        """A text such as `2 CPUs and 0 GPUs on 1 node`."""
        return f"{_format({kind: self.total(kind) for kind in ('CPU', 'GPU')})} on {counted(len(self.nodes), 'node')}"


@dataclass(frozen=True)
class WorkerRequest:
    """Workers that a job asks for."""

    workers: tuple[int, int] | None
    """Minimum and maximum number; None: as many as are of use."""
    use_gpu: bool | None
    """None: on GPUs if the cluster has any that PyTorch can use."""
    wait_seconds: float
    """Longest wait for resources."""
    group: bool = False
    """Workers that train together: the minimum of them starts at once, each with a GPU of its own,
    or one a node on CPUs. Otherwise a pool of workers that need no others: one is enough to start,
    several share a GPU, on CPUs there is one a core, and nodes that join later get workers too."""
    useful_gpus: int = 1
    """Number of GPUs above which a group is not faster."""


@dataclass(frozen=True)
class WorkerPlan:
    """Workers of a job and what each of them reserves."""

    worker_range: tuple[int, int]
    """Minimum and maximum number. Fewer than the maximum run where fewer resources are free."""
    needed: int
    """Number of workers that have to fit for the job to start."""
    per_worker: Resources
    """What each reserves on one node: 1 / k GPU where k share one, which predicts for one while the others read and write."""
    gpu: Gpu | None = None
    """None for a job on CPUs."""

    @property
    def workers(self) -> int:
        """Maximum number of workers at the same time."""
        return self.worker_range[1]

    @property
    def use_gpu(self) -> bool:
        return "GPU" in self.per_worker

    def describe(self) -> str:
        """A text such as `1 CPU worker` or `2 to 4 GPU workers`."""
        low, high = self.worker_range
        number = str(low) if low == high else f"{low} to {high}"
        return f"{number} {'GPU' if self.use_gpu else 'CPU'} worker{'' if high == 1 else 's'}"


def reserve(request: WorkerRequest, say: Callable[[str], None]) -> WorkerPlan:
    """Plan the workers of a job by what it asks for and by what the cluster has, and wait until enough of them fit.

    Raises:
        RequestError: a cluster that this process has started is too small, or PyTorch finds no CUDA
            for `--use-gpu true`.
        TryAgainError: the cluster does not give the workers within `wait_seconds`.
    """
    cluster = inspect_cluster()
    gpu: Gpu | None = None
    if cluster.total("GPU") and request.use_gpu is not False:
        gpu = _ask_for_cuda(request, say)
    plan = plan_workers(request, cluster, gpu)
    gpus = int(cluster.total("GPU"))
    if plan.use_gpu and request.workers is None and plan.workers < gpus:
        say(f"running on {plan.workers} of {gpus} GPUs: with so small a batch more are no faster; --num-workers {gpus} takes all")
    wait_until_free(plan, request.wait_seconds, say)
    if plan.use_gpu and gpu is None:  # an autoscaler has started the nodes with GPUs meanwhile
        gpu = _ask_for_cuda(request, say)
    return replace(plan, gpu=gpu)


def plan_workers(request: WorkerRequest, cluster: ClusterResources, gpu: Gpu | None = None) -> WorkerPlan:
    """Choose workers and devices: as requested, and where the request is silent by what the cluster has.

    `gpu` is None if there is none yet that PyTorch can use.

    Raises:
        RequestError: the request asks for more than the cluster can ever have.
    """
    use_gpu = gpu is not None if request.use_gpu is None else request.use_gpu
    kind = "GPU" if use_gpu else "CPU"
    present = int(cluster.total(kind))
    if use_gpu and not present and not cluster.can_grow:
        raise RequestError(f"--use-gpu true: the cluster has no GPU ({cluster})")
    sharing = 1
    if request.group:
        default = max(1, min(present, request.useful_gpus) if use_gpu else len(cluster.nodes))
        low, high = request.workers or (default, default)
    else:
        most = max(present, _ASSUMED_LIMIT[kind]) if cluster.can_grow else max(1, present)
        if use_gpu:
            sharing = workers_per_gpu(gpu.memory_bytes if gpu else _ASSUMED_GPU_BYTES, cluster.cpus_per_gpu())
        low, high = request.workers or (most * sharing,) * 2
        sharing = min(sharing, -(-high // max(1, present)))
    cpus = min(1.0, cluster.cpus_per_gpu() / sharing) if use_gpu else 1.0
    if request.group:
        cpus *= _GROUP_CPU_SHARE
    per_worker = {"CPU": cpus} | ({"GPU": 1 / sharing} if use_gpu else {})
    fitting = cluster.workers_that_fit(per_worker)
    if request.workers and low > fitting and not cluster.can_grow:
        each = _format(per_worker)
        raise RequestError(f"--num-workers {low}: only {fitting} of them, with {each} each, fit on the nodes ({cluster})")
    return WorkerPlan((low, high), low if request.group else 1, per_worker)


def workers_per_gpu(memory_bytes: int, cpus: float) -> int:
    """Workers of a pool that share a GPU: as many as its memory, and the CPUs of its node for each GPU, allow."""
    return max(1, int(min(_MAX_WORKERS_PER_GPU, cpus, memory_bytes // _WORKER_GPU_BYTES)))


def inspect_cluster() -> ClusterResources:
    """Resources of the cluster that this process is connected to."""
    return ClusterResources(tuple(node["Resources"] for node in usable_nodes()), can_grow=not started_cluster())


def explain_worker_silence() -> str:
    """Possible reasons why no worker reports, and the resources of the cluster, for a console line."""
    return f"they are being started or replaced, or wait for data; the cluster has {inspect_cluster()}, free: {_free()}"


def wait_until_free(plan: WorkerPlan, seconds: float, say: Callable[[str], None]) -> None:
    """Wait until the workers fit on what is free. Ray itself would wait without limit or message.

    A placement group asks for them, which is also what makes an autoscaler add nodes.

    Raises:
        TryAgainError: they do not fit after these seconds.
    """
    bundle = {kind: amount for kind, amount in plan.per_worker.items() if amount}
    need = _format({kind: amount * plan.needed for kind, amount in bundle.items()})
    if plan.needed > 1:
        need += f" ({_format(bundle)} on one node each)"
    seconds = max(seconds, _GRACE_SECONDS)
    started = time.monotonic()
    next_report = _GRACE_SECONDS
    group = placement_group([bundle] * plan.needed)
    try:
        while not group.wait(0.5):  # short, since no signal interrupts it
            waited = time.monotonic() - started
            if waited >= seconds:
                raise TryAgainError(
                    f"needs {need}, but after {waited:.0f} s only {_free()} are free ({inspect_cluster()}): other jobs hold the "
                    "rest, or the cluster has not grown, and `ray status` tells why; ask for fewer --num-workers or give more "
                    "--wait-seconds"
                )
            if waited >= next_report:
                next_report += _REPORT_SECONDS
                left = f"giving up in {seconds - waited:.0f} s"
                say(f"waiting for {need}; free now: {_free()} ({inspect_cluster()}); {left}; `ray status` tells why")
    finally:
        remove_placement_group(group)


def _ask_for_cuda(request: WorkerRequest, say: Callable[[str], None]) -> Gpu | None:
    """The GPU of a node that counts some, if PyTorch can use it; else None, with a console line.

    Ray counts one on every Mac with Apple silicon, and NVIDIA's by their driver, whichever build
    of PyTorch is installed.
    """

    def ask() -> Gpu | None:
        import torch

        from mnistsum_ray.model.device import faster_with_bf16

        if not torch.cuda.is_available():
            return None
        device = torch.device("cuda")
        return Gpu(faster_with_bf16(device), torch.cuda.get_device_properties(device).total_memory)

    node = next(node for node in usable_nodes() if node["Resources"].get("GPU"))
    # Its process ends with the task, and gives back the memory of the GPU.
    answer = ray.remote(max_calls=1)(ask).options(**on_node(node["NodeID"])).remote()
    try:
        gpu: Gpu | None = ray.get(answer, timeout=_CUDA_SECONDS)
    except ray.exceptions.RayError as error:
        where = f"node {node['NodeManagerAddress']} does not say whether PyTorch has CUDA there"
        raise TryAgainError(f"{where}: {root_cause(error)}; --use-gpu false runs on CPUs") from error
    if gpu is None:
        problem = f"Ray counts GPUs on node {node['NodeManagerAddress']}, but PyTorch has no CUDA there"
        if request.use_gpu:
            raise RequestError(f"--use-gpu true: {problem}; install a CUDA build that fits its driver, or leave --use-gpu out")
        say(f"running on CPUs: {problem}")
    return gpu


def _free() -> str:
    free = ray.available_resources()
    return _format({kind: free.get(kind, 0.0) for kind in ("CPU", "GPU")})


def _format(resources: Resources) -> str:
    """Amounts and kinds, such as `1 CPU and 0 GPUs`."""
    return " and ".join(f"{amount:g} {kind}{'' if amount == 1 else 's'}" for kind, amount in resources.items())
