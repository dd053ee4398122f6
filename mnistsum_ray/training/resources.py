"""Resources of a training run: number of workers, devices, what each worker reserves, and memory for the rows."""

from dataclasses import dataclass
from typing import Final

import numpy as np

from mnistsum_ray.cluster.resources import TASKS_CPU_SHARE, ClusterResources, format_resource
from mnistsum_ray.config import TrainConfig
from mnistsum_ray.data.order import Shuffle
from mnistsum_ray.errors import RequestError
from mnistsum_ray.training.fetch import ROW_BYTES
from mnistsum_ray.training.preflight import TrainingRun

_ROWS_PER_GPU: Final = 256
"""Rows of a step below which another GPU is of no use: the kernels of so small a network take as long for 32 rows as for 256."""

_USABLE_SHARE: Final = 0.8
"""Share of an object store that a run may plan to fill: Ray spills to disk above that."""

_MANY_READS: Final = 1.5


@dataclass(frozen=True)
class ResourcePlan:
    """Workers of a training run and what each of them reserves."""

    workers: tuple[int, int]
    """Minimum and maximum number; different only for an elastic run."""
    use_gpu: bool
    cpus_per_worker: float

    @property
    def per_worker(self) -> dict[str, float]:
        """Logical resources that each worker reserves."""
        return {"CPU": self.cpus_per_worker} | ({"GPU": 1.0} if self.use_gpu else {})

    def bundles(self) -> list[dict[str, float]]:
        """Resource bundles that the run needs to start; each has to fit on one node."""
        return [self.per_worker] * self.workers[0]

    def describe(self) -> str:
        """The workers in words: `1 CPU worker`, `2 to 4 GPU workers`."""
        low, high = self.workers
        number = str(low) if low == high else f"{low} to {high}"
        return f"{number} {'GPU' if self.use_gpu else 'CPU'} worker{'s' * (high != 1)}"


def plan_resources(config: TrainConfig, cluster: ClusterResources, batch_size: int) -> ResourcePlan:
    """Plan workers and devices by the config, and where it is silent by what the cluster has.

    Args:
        config: the request.
        cluster: what there is.
        batch_size: rows of a step, all workers together. By default a GPU gets at least _ROWS_PER_GPU of them.

    Raises:
        RequestError: the config asks for more than the cluster can ever have.
    """
    gpus = int(cluster.total.get("GPU", 0))
    use_gpu = gpus > 0 if config.use_gpu is None else config.use_gpu
    if use_gpu and not gpus and not cluster.can_grow:
        raise RequestError(f"--use-gpu true: the cluster has no GPU ({cluster.describe()})")
    # On CPUs one worker a node, with a thread for each core, is as fast as many, which would exchange gradients.
    default = max(1, min(gpus, batch_size // _ROWS_PER_GPU) if use_gpu else len(cluster.nodes))
    workers = config.worker_range or (default, default)
    available = gpus if use_gpu else int(cluster.total.get("CPU", 0))
    kind = "GPU" if use_gpu else "CPU"
    if workers[0] > (cluster.limits.get(kind, workers[0]) if cluster.can_grow else available):
        raise RequestError(
            f"--num-workers {workers[0]}: needs {workers[0]} {kind}s, one a worker; the cluster has {cluster.describe()}"
        )
    cpus = (1 - TASKS_CPU_SHARE) * _cpus_for_each(cluster, workers[1], use_gpu=use_gpu)
    # Nodes that an autoscaler adds bring their own CPUs. New GPU nodes are assumed to be like the present ones.
    unknown = cluster.can_grow and not (use_gpu and cluster.gpu_nodes)
    plan = ResourcePlan(workers, use_gpu, cpus_per_worker=1.0 if unknown else min(1.0, cpus))
    fitting = cluster.workers_that_fit(plan.per_worker)
    if workers[0] > fitting and not cluster.can_grow:
        each = " and ".join(format_resource(plan.per_worker, kind) for kind in plan.per_worker)
        raise RequestError(
            f"--num-workers {workers[0]}: only {fitting} of them, with {each} each, fit on the nodes ({cluster.describe()})"
        )
    return plan


def _cpus_for_each(cluster: ClusterResources, workers: int, *, use_gpu: bool) -> float:
    """CPUs for each worker. With GPUs those of the scarcest GPU node: CPUs of other nodes are of no use to its workers."""
    if not use_gpu:
        cpus = cluster.total.get("CPU", 0.0)
        return cpus / max(1, min(workers, int(cpus)))
    return min((node.get("CPU", 0.0) / min(node["GPU"], workers) for node in cluster.gpu_nodes), default=0.0)


def check_memory(run: TrainingRun, plan: ResourcePlan, cluster: ClusterResources) -> list[str]:
    """Check that the rows, or two windows of streamed ones, fit in the object store of each node; console lines that say so.

    Raises:
        RequestError: they do not fit; names `--shuffle-rows` or `--data`.
    """
    source, shuffle = run.source, run.shuffle
    share, store = 1.0, float("inf")
    if fitting := [(node, cluster.workers_on(node, plan.per_worker)) for node in cluster.nodes]:
        share = min(1.0, max(workers for _, workers in fitting) / plan.workers[0]) or 1.0
        store = min((node.get("object_store_memory", store) for node, workers in fitting if workers), default=store)
    # Every node may get all rows in memory. The window that is trained on, and the one that is read ahead, are spread over them.
    rows = int(share * 2 * shuffle.window_rows) if shuffle.streamed else source.rows
    held = _mebibytes(rows * ROW_BYTES)
    if rows * ROW_BYTES > _USABLE_SHARE * store:
        flag = f"--shuffle-rows {run.hyperparameters.shuffle_rows}" if source.files else f"--data {run.config.data}"
        advice = "start Ray with a larger --object-store-memory"
        if source.files and not run.config.resume:
            fewer = min(source.rows - 1, int(_USABLE_SHARE * store / ROW_BYTES / share / 2))
            advice = f"give --shuffle-rows {fewer // 1000 * 1000 or fewer}, so that rows are streamed, or {advice}"
        raise RequestError(
            f"{flag}: the run would hold {held} of rows in the object store of a node, which has {_mebibytes(store)}; {advice}"
        )
    if not shuffle.streamed:
        return [f"holding all {source.rows:,} rows in memory: {held} in the object store of each node"]
    streaming = (
        f"streaming {len(source.train):,} training rows, shuffled in windows of {shuffle.window_rows:,}; holds at most "
        f"{held} of an object store"
    )
    return [streaming, *_warnings_of_reads(shuffle)]


def _mebibytes(count: float) -> str:
    return f"{count / 2**20:,.0f} MiB"


def _warnings_of_reads(shuffle: Shuffle) -> list[str]:
    """A line if row groups are read several times an epoch: a slice of one is read from the group's beginning."""
    assert shuffle.bounds is not None
    group, first, rows = shuffle.slices
    skipped = first - shuffle.rows.count_below(shuffle.bounds)[group]
    reads = float((skipped + rows).sum() / rows.sum())
    if reads <= _MANY_READS:
        return []
    return [
        f"the row groups, of up to {int(np.diff(shuffle.bounds).max()):,} rows, are read {reads:.1f} times an epoch, since "
        f"--shuffle-rows is {shuffle.shuffle_rows:,}: give more, or write smaller row groups"
    ]
