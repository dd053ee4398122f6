"""Workers of a training run, and memory for its rows."""

import os
import shutil
from pathlib import Path
from typing import Final

import ray

from mnistsum_ray.cluster.nodes import this_node, usable_nodes
from mnistsum_ray.cluster.resources import ClusterResources, WorkerPlan, WorkerRequest
from mnistsum_ray.config import TrainConfig
from mnistsum_ray.errors import RequestError, counted
from mnistsum_ray.training.pipeline import ROW_BYTES
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


def check_space(rows: int) -> str:
    """Check that the rows fit in the object stores of the cluster, and on disk what does not.

    Returns:
        The console line that says so.

    Raises:
        RequestError: the disk cannot hold what Ray would spill to it.
    """
    nodes = usable_nodes()
    stores = sum(node["Resources"].get("object_store_memory", 0.0) for node in nodes)
    needed = rows * ROW_BYTES
    spilled = needed - _USABLE_SHARE * stores
    line = f"reading {counted(rows, 'row')}: {_mebibytes(needed)}, and the object stores have {_mebibytes(stores)}"
    if spilled <= 0:
        return line
    # Ray spills into the folder of its session. Other nodes are taken to have as much room as this one.
    session = next(node["RayletSocketName"] for node in nodes if node["NodeID"] == ray.get_runtime_context().get_node_id())
    free = len(nodes) * shutil.disk_usage(Path(session).parent).free
    if spilled > free:
        raise RequestError(
            f"--data: {line}; Ray would spill {_mebibytes(spilled)} to disk, where {_mebibytes(free)} are free; start Ray "
            "with a larger --object-store-memory, or RAY_TMPDIR on a larger disk"
        )
    return f"{line}; Ray spills the rest to disk, where {_mebibytes(free)} are free"


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
