"""Workers of a training run, and memory for its rows."""

import os
from typing import Final

from mnistsum_ray.cluster.nodes import this_node
from mnistsum_ray.cluster.resources import ClusterResources, WorkerPlan, WorkerRequest
from mnistsum_ray.config import TrainConfig
from mnistsum_ray.errors import RequestError
from mnistsum_ray.training.fetch import ROW_BYTES
from mnistsum_ray.training.preflight import TrainingRun

_ROWS_PER_GPU: Final = 256
"""Rows of a step below which another GPU is of no use: the kernels of so small a network take as long for 32 rows as for 256."""

_USABLE_SHARE: Final = 0.8
"""Share of an object store that a run may plan to fill: Ray spills to disk above that."""


def worker_request(config: TrainConfig, batch_size: int) -> WorkerRequest:
    """The group of workers that a run with this global batch size asks for."""
    return WorkerRequest(
        config.worker_range, config.use_gpu, config.wait_seconds, group=True, useful_gpus=max(1, batch_size // _ROWS_PER_GPU)
    )


def check_memory(run: TrainingRun, cluster: ClusterResources) -> str:
    """Check that the rows, or two windows of streamed ones, fit in the object store of each node.

    Returns the console line that says so; raises RequestError that names `--shuffle-rows` or `--data`.
    """
    source, shuffle = run.source, run.shuffle
    # The window that is trained on, and the one that is read ahead.
    rows = 2 * shuffle.window_rows if shuffle.streamed else source.rows
    stores = [node.get("object_store_memory", float("inf")) for node in (*cluster.nodes, this_node())]
    needed, store = _mebibytes(rows * ROW_BYTES), min(stores)
    if rows * ROW_BYTES > _USABLE_SHARE * store:
        flag, advice = f"--data {run.config.data}", "start Ray with a larger --object-store-memory"
        if source.files:
            flag = f"--shuffle-rows {run.hyperparameters.shuffle_rows}"
            fewer = int(_USABLE_SHARE * store / ROW_BYTES / 2)
            advice = f"give --shuffle-rows {fewer}, so that rows are streamed, or {advice}"
        raise RequestError(
            f"{flag}: the run would hold {needed} of rows in the object store of a node, which has {_mebibytes(store)}; {advice}"
        )
    if not shuffle.streamed:
        return f"holding all {source.rows:,} rows in memory: {needed} in the object store of each node"
    windows = f"shuffled in windows of {shuffle.window_rows:,}"
    return f"streaming {len(source.train):,} training rows, {windows}; holds at most {needed} of an object store"


def choose_threads(run: TrainingRun, plan: WorkerPlan, cluster: ClusterResources) -> int | None:
    """Threads of each worker of a run. On CPUs they decide its bits: they are those of the run that is resumed, if it has as many
    workers. Ray spreads those of a new run over the largest nodes.

    None on GPUs and for elastic runs: what each worker's node has for it.
    """
    low, high = plan.worker_range
    stored = run.stored or {}
    if plan.use_gpu:
        return None
    if run.config.threads or low != high:
        return run.config.threads
    if (stored.get("num_workers"), stored.get("use_gpu")) == ([low, high], False):
        threads: int | None = stored["threads"]
        return threads
    here, cores = this_node(), os.cpu_count() or 1
    nodes = [node for node in cluster.nodes if cluster.workers_on(node, plan.per_worker)]
    # Ray can be told of more CPUs than there are, and with as many threads a step takes minutes.
    cpus = sorted(int(min(node["CPU"], cores) if node == here else node["CPU"]) for node in nodes)[-high:]
    return max(1, cpus[0] // -(-high // len(cpus))) if cpus else None


def _mebibytes(count: float) -> str:
    return f"{count / 2**20:,.0f} MiB"
