"""Logical resources of the cluster: plan the workers of a job, and wait until they are free."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from mnistsum_ray.cluster.connection import started_cluster
from mnistsum_ray.cluster.nodes import Resources, on_node, usable_nodes
from mnistsum_ray.config import ScoreConfig, TrainConfig
from mnistsum_ray.errors import RequestError, TryAgainError, counted

_TRAINING_CPUS: Final = 0.75
"""CPUs that a training worker reserves: the rest is for the tasks that feed it."""

_ASSUMED_LIMIT: Final = {"GPU": 16, "CPU": 128}
"""What a cluster is assumed to grow to: its autoscaler's limits are not known."""

_MAX_WORKERS_PER_GPU: Final = 8
_WORKER_GPU_BYTES: Final = 4 * 2**30
"""GPU memory of a worker that scores: CUDA's own, and the activations of 2,048 rows."""

_CUDA_SECONDS: Final = 120.0
"""Longest wait for the import of PyTorch on another node."""
_REPORT_SECONDS: Final = 10.0


@dataclass(frozen=True)
class Gpu:
    """A GPU that PyTorch can use; with `bf16` it is faster in bfloat16."""

    bf16: bool
    memory_bytes: int


@dataclass(frozen=True)
class ClusterResources:
    """Logical resources of the nodes that have CPUs or GPUs, and whether others may come."""

    nodes: tuple[Resources, ...]
    can_grow: bool = False
    """Taken to be so of every cluster that was joined: it may have an autoscaler."""

    def total(self, kind: str) -> float:
        return sum(node.get(kind, 0.0) for node in self.nodes)

    def workers_that_fit(self, per_worker: Resources) -> int:
        """Number of workers that fit on the nodes; each reserves an amount of one kind."""
        ((kind, amount),) = per_worker.items()
        # Where k share a GPU, 1 / (1 / k) may be less than k.
        return sum(int(node.get(kind, 0.0) / amount + 1e-9) for node in self.nodes)

    def __str__(self) -> str:
        totals = {kind: self.total(kind) for kind in ("CPU", "GPU")}
        return f"{_format(totals)} on {counted(len(self.nodes), 'node')}"


@dataclass(frozen=True)
class WorkerPlan:
    """Workers of a job and what each of them reserves."""

    worker_range: tuple[int, int]
    """Number that has to fit for the job to start, and maximum number."""
    per_worker: Resources
    """Reserved: CPU, or GPU without a CPU beside it, as in Ray Train; 1 / k where k share one."""
    gpu: Gpu | None = None

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
        number = "" if low == high else f"{low} to "
        return number + counted(high, "GPU worker" if self.use_gpu else "CPU worker")

    def shortage(self, waited: float) -> str:
        """Message that the workers could not be had: what is there and what is missing."""
        free = f"after {waited:.0f} s only {describe_free()}"
        why = "other jobs hold the rest, or the cluster has not grown, and `ray status` tells why"
        advice = "ask for fewer --num-workers or give more --wait-seconds"
        return f"needs {self._needed()}, but {free}: {why}; {advice}"

    @contextmanager
    def reserved(self, seconds: float, say: Callable[[str], None]) -> Iterator[None]:
        """Wait for what the workers need, and hold it for the block, by a placement group.

        Ray would wait without limit or message. After these seconds it is a TryAgainError.
        """
        started = time.monotonic()
        next_report = 0.0
        group = placement_group([self.per_worker] * self.worker_range[0])
        try:
            # Ray takes up to a second to count what was given back.
            while not group.wait(1.0):
                waited = time.monotonic() - started
                if waited >= seconds:
                    raise TryAgainError(self.shortage(waited))
                if waited >= next_report:
                    next_report = waited + _REPORT_SECONDS
                    left = f"giving up in {seconds - waited:.0f} s"
                    say(f"waiting for {self._needed()}; only {describe_free()}; {left}")
            yield
        finally:
            remove_placement_group(group)

    def _needed(self) -> str:
        number = self.worker_range[0]
        return ("" if number == 1 else f"{number} times ") + _format(self.per_worker)


@contextmanager
def reserve(
    config: TrainConfig | ScoreConfig, say: Callable[[str], None], useful_gpus: int = 1
) -> Iterator[WorkerPlan]:
    """Plan a job's workers, wait until enough of them fit, and hold their resources for the block.

    While they are held no other job takes them, and no autoscaler removes a node as idle. A
    training is not faster on more than `useful_gpus`.

    Raises:
        RequestError: a cluster that this process has started is too small, or PyTorch finds no CUDA
            for `--use-gpu true`.
        TryAgainError: the cluster does not give the workers within `wait_seconds`.
    """
    while True:
        cluster = inspect_cluster()
        gpu: Gpu | None = None
        if cluster.total("GPU") and config.use_gpu is not False:
            gpu = find_gpu(config.use_gpu, say)
        plan = plan_workers(config, cluster, gpu, useful_gpus)
        needed, most = plan.worker_range
        elastic = isinstance(config, TrainConfig) and cluster.can_grow and most > needed
        if elastic and cluster.workers_that_fit(plan.per_worker) < most:
            # Ray Train asks for all of them at once, and Ray's autoscaler v2 grants all or none.
            limit = f"only if the autoscaler's limits allow all {most} workers"
            say(f"more than {needed} workers run as nodes come, {limit}")
        with plan.reserved(config.wait_seconds, say):
            # Else nodes with GPUs came while it waited: plan again, now that CUDA can be asked for.
            if gpu or not plan.use_gpu:
                yield plan
                return


def plan_workers(
    config: TrainConfig | ScoreConfig,
    cluster: ClusterResources,
    gpu: Gpu | None,
    useful_gpus: int,
) -> WorkerPlan:
    """Choose workers and devices: as requested, else by what the cluster has.

    Those that train start together; of those that score, one is enough to start. `gpu` is None if
    there is none yet that PyTorch can use. Errors are those of `reserve`.
    """
    low, high = 0, 0  # not asked for
    if isinstance(config.num_workers, int):
        low = high = config.num_workers
    elif config.num_workers:
        low, high = config.num_workers
    use_gpu = gpu is not None if config.use_gpu is None else config.use_gpu
    kind = "GPU" if use_gpu else "CPU"
    present = int(cluster.total(kind))
    if use_gpu and not present and not cluster.can_grow:
        raise RequestError(f"--use-gpu true: the cluster has no GPU ({cluster})")
    if isinstance(config, TrainConfig):
        useful = min(present, useful_gpus) if use_gpu else len(cluster.nodes)
        workers = (low or max(1, useful), high or max(1, useful))
        plan = WorkerPlan(workers, {kind: 1.0 if use_gpu else _TRAINING_CPUS}, gpu)
    else:
        limit = max(1, present)
        if cluster.can_grow:
            limit = max(present, _ASSUMED_LIMIT[kind])
        per_device = 1  # workers on a CPU, or on a GPU as its memory and the cores beside it allow
        if gpu:
            cores = int(cluster.total("CPU") / present)
            in_memory = gpu.memory_bytes // _WORKER_GPU_BYTES
            per_device = max(1, min(_MAX_WORKERS_PER_GPU, cores, in_memory))
        most = high or per_device * limit
        # If fewer were asked for, each gets a larger share.
        per_device = min(per_device, math.ceil(most / max(1, present)))
        plan = WorkerPlan((1, most), {kind: 1 / per_device}, gpu)
    fitting = cluster.workers_that_fit(plan.per_worker)
    if low > fitting and not cluster.can_grow:
        fit = f"only {fitting} of them, with {_format(plan.per_worker)} each, fit on the nodes"
        raise RequestError(f"--num-workers {low}: {fit} ({cluster})")
    return plan


def inspect_cluster() -> ClusterResources:
    """Resources of the cluster that this process is connected to."""
    nodes = tuple(node["Resources"] for node in usable_nodes())
    return ClusterResources(nodes, can_grow=not started_cluster())


def explain_worker_silence() -> str:
    """Possible reasons why no worker reports, for a console line."""
    return f"they are being started or replaced, or wait for data; {describe_free()}"


def describe_free() -> str:
    free = ray.available_resources()
    amounts = _format({kind: free.get(kind, 0.0) for kind in ("CPU", "GPU")})
    return f"{amounts} are free ({inspect_cluster()})"


def _format(resources: Resources) -> str:
    """Amounts and kinds, such as `1 CPU and 0 GPUs`."""
    amounts = (f"{n:g} {kind}{'' if n == 1 else 's'}" for kind, n in resources.items())
    return " and ".join(amounts)


def find_gpu(use_gpu: bool | None, say: Callable[[str], None]) -> Gpu | None:
    """The GPU of a node that counts some, if PyTorch can use it; None where none is to be used.

    Ray counts one on every Mac with Apple silicon, and NVIDIA's by their driver alone.

    RequestError: `use_gpu` is true, and there is none and none can come, or PyTorch has no CUDA.
    """
    cluster = inspect_cluster()
    if not cluster.total("GPU") and use_gpu and not cluster.can_grow:
        raise RequestError(f"--use-gpu true: the cluster has no GPU ({cluster})")
    if not cluster.total("GPU") or use_gpu is False:
        return None

    def ask() -> Gpu | None:
        import torch

        from mnistsum_ray.model.device import faster_with_bf16

        if not torch.cuda.is_available():
            return None
        memory = torch.cuda.get_device_properties(0).total_memory
        return Gpu(faster_with_bf16(torch.device("cuda")), memory)

    node = next(node for node in usable_nodes() if node["Resources"].get("GPU"))
    # Its process ends with the task, and gives back the memory of the GPU.
    answer = ray.remote(max_calls=1)(ask).options(**on_node(node["NodeID"])).remote()
    gpu: Gpu | None = ray.get(answer, timeout=_CUDA_SECONDS)
    if gpu is None:
        problem = f"Ray counts GPUs on node {node['NodeManagerAddress']}, but PyTorch has no CUDA"
        if use_gpu:
            advice = "install a CUDA build that fits its driver, or leave --use-gpu out"
            raise RequestError(f"--use-gpu true: {problem} there; {advice}")
        say(f"running on CPUs: {problem} there")
    return gpu
