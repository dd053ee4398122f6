"""Decide which rows are held in memory and which are streamed, check that what is held fits, and read it."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import ray.data
from ray.data.dataset import MaterializedDataset

from mnistsum_ray.cluster.resources import inspect_cluster
from mnistsum_ray.data.sampling import RowIds
from mnistsum_ray.data.windowed_shuffle import WindowedShuffle
from mnistsum_ray.errors import RequestError
from mnistsum_ray.training.blocks import ROW_BYTES
from mnistsum_ray.training.in_memory import materialize_source
from mnistsum_ray.training.preflight import TrainingRun
from mnistsum_ray.training.resources import ResourcePlan
from mnistsum_ray.training.streaming import StreamedRows, held_rows

_USABLE_SHARE: Final = 0.8
"""Share of an object store that a run may plan to fill: Ray spills to disk above that."""

_MANY_READS: Final = 1.5


@dataclass(frozen=True)
class PreparedRows:
    """The rows of a run as its workers get them."""

    images: MaterializedDataset | None
    """Rows in the object store; None where all are streamed."""
    block_ids: RowIds
    """Row id of the first row of each block of `images`."""
    streamed: StreamedRows | None
    """Access to streamed rows; None where all rows are in memory."""
    fingerprint: str
    """SHA-256 of the data: pixels and digits of rows in memory, footers of streamed files."""
    lineage: ray.data.Dataset | None
    """See `MaterializedSource.lineage`."""


def prepare_rows(run: TrainingRun, plan: ResourcePlan, say: Callable[[str], None]) -> PreparedRows:
    """Read the rows that are held in memory, after a check that they fit.

    Raises:
        RequestError: they do not fit, or a row cannot be used.
        RowCountError: the files hold more or fewer rows than their footers say.
    """
    source, parameters = run.source, run.hyperparameters
    streamed = StreamedRows(source.files, parameters.shuffle_rows) if run.streams_held_out and source.files else None
    if streamed is None:
        held = _check_memory(run, plan, source.rows, 0)
        loaded = materialize_source(source)
        say(f"holding all {source.rows:,} rows in memory: {_megabytes(held)} in the object store of each node")
        return PreparedRows(loaded.images, loaded.first_ids, None, loaded.fingerprint, loaded.lineage)
    footers = streamed.files.fingerprint(source.splits)
    if not run.streams_training:
        held = _check_memory(run, plan, len(source.train), 0)
        say(
            f"holding the training rows in memory: {_megabytes(held)} in the object store of each node; the "
            f"{len(source.validation) + len(source.test):,} held-out rows are streamed for each evaluation"
        )
        loaded = materialize_source(source, source.train)
        fingerprint = hashlib.sha256(f"{loaded.fingerprint} {footers}".encode()).hexdigest()
        return PreparedRows(loaded.images, loaded.first_ids, streamed, fingerprint, loaded.lineage)
    shuffle = streamed.shuffle(source.train, parameters.batch_size, parameters.seed)
    window_rows = shuffle.window_rows * shuffle.lanes
    held = _check_memory(run, plan, 0, held_rows(shuffle, plan.workers[1]))
    say(
        f"streaming {len(source.train):,} training rows, shuffled in windows of {window_rows:,} in {shuffle.lanes} lanes; "
        f"holds at most {_megabytes(held)} of an object store"
    )
    _warn_of_reads(shuffle, plan.workers[1], say)
    return PreparedRows(None, np.empty(0, np.int64), streamed, footers, None)


def _check_memory(run: TrainingRun, plan: ResourcePlan, node_rows: int, cluster_rows: int) -> int:
    """Bytes of rows in the object store of one node: `node_rows` on each, and its workers' share of `cluster_rows`.

    Raises:
        RequestError: they do not fit into the store of some node; names `--shuffle-rows`.
    """
    cluster = inspect_cluster()
    share, store = 1.0, float("inf")
    if fitting := [(node, cluster.workers_on(node, plan.per_worker)) for node in cluster.nodes]:
        share = min(1.0, max(workers for _, workers in fitting) / plan.workers[0]) or 1.0
        store = min((node.get("object_store_memory", store) for node, workers in fitting if workers), default=store)
    held = int(node_rows + share * cluster_rows) * ROW_BYTES
    if held > _USABLE_SHARE * store:
        flag = f"--shuffle-rows {run.hyperparameters.shuffle_rows}" if run.source.files else f"--data {run.config.data}"
        advice = "start Ray with a larger --object-store-memory"
        if run.source.files and not run.config.resume:
            # A streamed run holds two to three times --shuffle-rows, spread over the nodes.
            rows = min(len(run.source.train) - 1, int(_USABLE_SHARE * store / ROW_BYTES / share / 3))
            advice = f"give --shuffle-rows {rows // 1000 * 1000 or rows}, so that rows are streamed, or {advice}"
        raise RequestError(
            f"{flag}: the run would hold {_megabytes(held)} of rows in the object store of a node, which has "
            f"{_megabytes(store)}; {advice}"
        )
    return held


def _megabytes(count: float) -> str:
    return f"{count / 2**20:,.0f} MiB"


def _warn_of_reads(shuffle: WindowedShuffle, workers: int, say: Callable[[str], None]) -> None:
    reads = shuffle.rows_read_per_row * max(1, -(-workers // shuffle.lanes))
    if reads > _MANY_READS:
        say(
            f"the row groups, of up to {shuffle.groups.largest:,} rows, are read {reads:.1f} times an epoch, since a window of a "
            f"lane holds {shuffle.window_rows:,} rows: give a larger --shuffle-rows, or write smaller row groups"
        )
