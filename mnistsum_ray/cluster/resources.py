"""Logical resources: what a job asks for, and what is free."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import ray
import ray.exceptions
import torch
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from mnistsum_ray.cluster.connection import started_cluster
from mnistsum_ray.cluster.workarounds import free_cpus
from mnistsum_ray.config import TrainConfig
from mnistsum_ray.errors import RequestError, TryAgainError, counted, root_cause, spelled

_ROWS_PER_GPU: Final = 256
"""Rows of a step below which another GPU is of no use: the kernels of so small a network take as
long for 32 rows as for 256."""

_REPORT_SECONDS: Final = 10.0
"""Time between two lines about waiting, and the least wait."""

Resources = dict[str, float]
"""From kind (CPU, GPU, …) to amount."""


def on_this_node() -> dict[str, Any]:
    """Return options of a task or actor that reserves nothing, on this node."""
    node = ray.get_runtime_context().get_node_id()
    strategy = NodeAffinitySchedulingStrategy(node, soft=False)
    return {"num_cpus": 0, "scheduling_strategy": strategy}


def fits_in_store(rows_bytes: int) -> bool:
    """Return whether decoded rows take at most a third of Ray's object store.

    They lie there twice for a moment.
    """
    store: float = ray.cluster_resources().get("object_store_memory", 0.0)
    return rows_bytes <= store / 3


def usable_nodes() -> list[dict[str, Any]]:
    """Return Ray's entry of each living node that has CPUs or GPUs."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    return [node for node in alive if {"CPU", "GPU"} & node["Resources"].keys()]


@dataclass(frozen=True)
class ClusterResources:
    """Logical resources of the nodes that have CPUs or GPUs, and whether others may come."""

    nodes: tuple[Resources, ...]
    can_grow: bool = False  # true of every cluster that was joined, since some have autoscalers

    def total(self, kind: str) -> float:
        return sum(node.get(kind, 0.0) for node in self.nodes)

    def workers_that_fit(self, per_worker: Resources) -> int:
        """Return how many workers fit on the nodes; each reserves an amount of one kind."""
        ((kind, amount),) = per_worker.items()
        return sum(int(node.get(kind, 0.0) / amount + 1e-9) for node in self.nodes)

    def __str__(self) -> str:
        totals = {kind: self.total(kind) for kind in ("CPU", "GPU")}
        return f"{_format(totals)} on {counted(len(self.nodes), 'node')}"


def inspect_cluster() -> ClusterResources:
    nodes = tuple(node["Resources"] for node in usable_nodes())
    return ClusterResources(nodes, can_grow=not started_cluster())


def has_usable_gpu(use_gpu: bool | None, say: Callable[[str], None]) -> bool:
    """Return whether a job uses GPUs: as it is told, else if the cluster has any.

    If the cluster is this machine, PyTorch must see them too: Ray counts one on every Mac with
    Apple silicon, and NVIDIA's by their driver alone.

    RequestError: GPUs are asked for, and there will be none.
    """
    cluster = inspect_cluster()
    has_gpu = cluster.total("GPU") > 0
    is_this_machine = sum(node["Alive"] for node in ray.nodes()) == 1
    if has_gpu and use_gpu is not False and is_this_machine and not torch.cuda.is_available():
        problem = "Ray counts GPUs here, but PyTorch has no CUDA that fits their driver"
        if use_gpu:
            raise RequestError(f"--use-gpu true: {problem}; install one, or leave the flag out")
        say(f"running on CPUs: {problem}")
        return False
    if use_gpu and not has_gpu and not cluster.can_grow:
        raise RequestError(f"--use-gpu true: the cluster has no GPU ({cluster})")
    return has_gpu if use_gpu is None else use_gpu


@dataclass(frozen=True)
class WorkerPlan:
    """Workers of a job, and what each of them reserves and uses."""

    least: int
    most: int  # other than `least` in an elastic training, and in scoring, which begins with one
    per_worker: Resources  # {"CPU": n} or {"GPU": n}, and never both, as in Ray Train
    threads: int | None  # PyTorch's in a worker, which decide the last bits on CPUs; None: not set

    @property
    def use_gpu(self) -> bool:
        return "GPU" in self.per_worker

    @property
    def is_elastic(self) -> bool:
        return self.least < self.most

    @property
    def num_workers(self) -> int | tuple[int, int]:
        """N, or MIN and MAX: as the flag, config.yaml and Ray Train have it."""
        return (self.least, self.most) if self.is_elastic else self.most

    def __str__(self) -> str:
        number = f"{self.least} to " if self.is_elastic else ""
        kind = "GPU worker" if self.use_gpu else "CPU worker"
        threads = f" of {counted(self.threads, 'thread')}" if self.threads else ""
        return f"{number}{counted(self.most, kind)}{threads}"

    @property
    def needed(self) -> str:
        """What must be free for the job to start."""
        return ("" if self.least == 1 else f"{self.least} times ") + _format(self.per_worker)


def plan_training(
    config: TrainConfig,
    batch_size: int,
    say: Callable[[str], None],
    stored_threads: int | None = None,
    *,
    is_kept: bool,
) -> WorkerPlan:
    """Choose the workers of a training: as requested, else by what the cluster has free.

    If rows are not kept, but read in each epoch, a CPU is left to the tasks that read. A run that
    is resumed keeps its `stored_threads`, or what the nodes have of them.

    RequestError: these workers can never be had, or are more than the rows of a batch.
    """
    cluster = inspect_cluster()
    use_gpu = has_usable_gpu(config.use_gpu, say)
    asked = config.num_workers
    if asked is None:
        asked = _gpus_of_use(cluster, batch_size, say) if use_gpu else 1
    least, most = asked if isinstance(asked, tuple) else (asked, asked)
    if most > batch_size:
        raise RequestError(f"--num-workers {most}: more than the rows of a batch ({batch_size})")
    if use_gpu:
        plan = WorkerPlan(least, most, {"GPU": 1.0}, config.threads)
    else:
        nodes = [int(node.get("CPU", 0)) for node in cluster.nodes]
        all_threads = max(1, _cpus(nodes, most, leave_one=not is_kept))
        threads = config.threads or min(stored_threads or all_threads, all_threads)
        if cluster.can_grow and not config.threads and not stored_threads:
            # Who holds the rest may be the very trial of Ray Tune that this training is.
            free = free_cpus()
            free_threads = _cpus(free, most, leave_one=not is_kept)
            if 0 < free_threads < threads:
                found = f"{sum(free)} of {counted(sum(nodes), 'CPU')} are free"
                advice = f"--threads {threads} waits for more"
                say(f"{found}: {counted(free_threads, 'thread')}; {advice}")
                threads = free_threads
        plan = WorkerPlan(least, most, {"CPU": float(threads)}, threads)
    fitting = cluster.workers_that_fit(plan.per_worker)
    if least > fitting and not cluster.can_grow:
        raise RequestError(
            f"--num-workers {least}: the cluster ({cluster}) has room for "
            f"{counted(fitting, 'worker')} with {_format(plan.per_worker)} each; "
            "lower --num-workers or --threads"
        )
    left = cluster.total("CPU") - least * plan.per_worker.get("CPU", 0.0)
    if not is_kept and left < 1 and not cluster.can_grow:
        raise RequestError(
            f"--cache {spelled(config.cache)}: rows are read in each epoch, and {plan} leave no "
            "CPU for that; give fewer --num-workers or --threads, or --cache true"
        )
    return plan


def _gpus_of_use(cluster: ClusterResources, batch_size: int, say: Callable[[str], None]) -> int:
    """Return the number of GPUs that a batch can use; say if others stay unused."""
    present = int(cluster.total("GPU"))
    used = max(1, min(present, batch_size // _ROWS_PER_GPU))
    if used < present:
        small = f"a batch of {batch_size} rows is too small for more"
        say(f"using {used} of {counted(present, 'GPU')}: {small}; raise --batch-size")
    return used


def _cpus(nodes: list[int], workers: int, *, leave_one: bool) -> int:
    """Return the CPUs of each worker: all of a node, or an equal share of a node's."""
    cpus_of_nodes = sorted(filter(None, nodes), reverse=True)
    if not cpus_of_nodes:  # nodes will come, and nobody knows of which size
        return 0
    cpus_of_used = cpus_of_nodes[:workers]  # of the largest nodes, with a worker or more on each
    workers_of_node = math.ceil(workers / len(cpus_of_used))
    all_used = len(cpus_of_used) == len(cpus_of_nodes)
    cpus = (min(cpus_of_used) - (leave_one and all_used)) // workers_of_node
    if len(cpus_of_nodes) > 1 and all_used and not leave_one:
        cpus -= 1  # stays free for the tasks that read again what was lost with a node
    return cpus


def wait_for(wanted: Resources, purpose: str, seconds: float, say: Callable[[str], None]) -> None:
    """Wait until a task gets these, else TryAgainError: Ray Data would wait without a word."""
    seconds = max(seconds, _REPORT_SECONDS)  # a process may have to start
    needed = f"{_format(wanted)}, for {purpose}"
    # Outside the placement group of a trial of Ray Tune, if this process is one.
    strategy = PlacementGroupSchedulingStrategy(None)
    cpus, gpus = wanted.get("CPU", 0), wanted.get("GPU", 0)
    options = {"num_cpus": cpus, "num_gpus": gpus, "scheduling_strategy": strategy}
    probe = ray.remote(**options)(lambda _: None)
    # 1 MiB, which the task must fetch: a node that has just come may not reach this process yet.
    argument = ray.put(bytes(2**20))
    started = said = time.monotonic()
    failed = ""
    task = probe.remote(argument)
    while True:
        try:
            ray.get(task, timeout=_REPORT_SECONDS)
            return
        except ray.exceptions.GetTimeoutError:
            pass
        except ray.exceptions.RayError as error:  # e.g. its node was lost
            failed = f"; a task that asked for it failed ({root_cause(error)})"
            time.sleep(1)
            task = probe.remote(argument)
        now = time.monotonic()
        if now - started >= seconds:
            ray.cancel(task)
            raise TryAgainError(shortage(needed, now - started) + failed)
        if now - said >= _REPORT_SECONDS:
            said = now
            left = seconds - (now - started)
            say(f"waiting for {needed}; only {describe_free()}{failed}; giving up in {left:.0f} s")


def shortage(needed: str, waited: float) -> str:
    """Return the message that something could not be had: what exists, and what is missing."""
    return (
        f"needs {needed}, but after {waited:.0f} s only {describe_free()}: other jobs hold the "
        "rest (`ray list actors`), or the cluster has not grown (`ray status`); give more "
        "--wait-seconds, or ask for less"
    )


def describe_free() -> str:
    """Return what is free of what there is."""
    free = ray.available_resources()
    amounts = _format({kind: free.get(kind, 0.0) for kind in ("CPU", "GPU")})
    return f"{amounts} are free ({inspect_cluster()})"


def _format(resources: Resources) -> str:
    """Return amounts and kinds, such as `1 CPU and 0 GPUs`."""
    amounts = (f"{n:g} {kind}{'' if n == 1 else 's'}" for kind, n in resources.items())
    return " and ".join(amounts)
