"""Before a run starts: whether its rows fit in memory, and whether they are those of the run that it goes on with or repeats."""

from collections.abc import Callable
from typing import Any, Final

import numpy as np

from mnistsum_ray.cluster.resources import inspect_cluster
from mnistsum_ray.data.order import Shuffle
from mnistsum_ray.errors import RequestError
from mnistsum_ray.storage.location import Location
from mnistsum_ray.training.artifacts import Checksums, read_data_files
from mnistsum_ray.training.fetch import ROW_BYTES, LoadedRows, load_rows, stream_rows
from mnistsum_ray.training.preflight import TrainingRun
from mnistsum_ray.training.resources import ResourcePlan

_USABLE_SHARE: Final = 0.8
"""Share of an object store that a run may plan to fill: Ray spills to disk above that."""

_MANY_READS: Final = 1.5


def prepare_rows(run: TrainingRun, plan: ResourcePlan, say: Callable[[str], None]) -> tuple[LoadedRows, Shuffle]:
    """Read the rows into memory, or prepare to stream them, after a check that they fit; and the order of the training rows.

    Raises:
        RequestError: they do not fit, or a row cannot be used.
        RowCountError: the files hold more or fewer rows than their footers say.
    """
    source, parameters = run.source, run.hyperparameters
    bounds = source.files.groups.bounds if source.files and run.streams else None
    shuffle = Shuffle(source.train, bounds, parameters.batch_size, parameters.shuffle_rows, parameters.seed)
    if not source.files or not run.streams:
        held = _check_memory(run, plan, source.rows, 0)
        loaded = load_rows(source)
        say(f"holding all {source.rows:,} rows in memory: {_megabytes(held)} in the object store of each node")
        return loaded, shuffle
    # The window that is trained on, and the one that is read ahead.
    window_rows = min(shuffle.window_steps * shuffle.batch_size, len(source.train))
    held = _check_memory(run, plan, 0, 2 * window_rows)
    say(
        f"streaming {len(source.train):,} training rows, shuffled in windows of {window_rows:,}; holds at most "
        f"{_megabytes(held)} of an object store"
    )
    _warn_of_reads(shuffle, say)
    return stream_rows(source.files), shuffle


def check_data(run: TrainingRun, read: Checksums, manifest: dict[str, Any], stored: dict[str, Any] | None) -> Checksums:
    """Check that the data are those of the run that is resumed or repeated.

    Args:
        run: the request.
        read: checksums of each file's rows; None for rows that are streamed.
        manifest: of the run that starts.
        stored: manifest of the run that is resumed; None for a new run.

    Returns:
        Checksums that streamed rows must have; None where any may be trained on.

    Raises:
        RequestError: they are others; names a file where it can.
    """
    data = manifest["data"]
    if stored is not None:
        return _check(run, read, data, "--resume", run.folder, stored["data"], "name the same data, or start another run")
    if run.reproduced is None:
        return None
    flag = f"--from-run {run.config.from_run}"
    return _check(run, read, data, flag, *run.reproduced, "name the data with --data, and the model will be another")


def _check(
    run: TrainingRun, read: Checksums, now: dict[str, Any], flag: str, folder: Location, then: dict[str, Any], advice: str
) -> Checksums:
    files, (table, expected) = run.source.files, read_data_files(folder, flag)
    changed = None
    if read is None and files and table is not None:
        # Before they are read, files can only be known by their footers and, in the same place, their times.
        same_place = flag == "--resume" and then["location"] == run.source.location
        changed = files.changed_file(table, same_place=same_place)
    elif read is not None and files and expected is not None and len(expected) == len(read) and (expected != read).any():
        changed = f"{files.location(int(np.flatnonzero(expected != read)[0])).display}: holds other rows than when the run began"
    if changed:
        raise RequestError(f"{flag}: {changed}; put it back as it was, or {advice}")
    key = "sha256" if read is not None and then["sha256"] else "footers_sha256"
    if now[key] != then.get(key) and (table is None or key == "sha256"):
        raise RequestError(
            f"{flag}: the data are not those of the run (SHA-256 {str(now[key])[:12]}…, the run has {str(then.get(key))[:12]}… "
            f"from {then['location']}); {advice}"
        )
    return expected if read is None else None


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
            # A streamed run holds two windows, spread over the nodes.
            rows = min(run.source.rows - 1, int(_USABLE_SHARE * store / ROW_BYTES / share / 2))
            advice = f"give --shuffle-rows {rows // 1000 * 1000 or rows}, so that rows are streamed, or {advice}"
        raise RequestError(
            f"{flag}: the run would hold {_megabytes(held)} of rows in the object store of a node, which has "
            f"{_megabytes(store)}; {advice}"
        )
    return held


def _megabytes(count: float) -> str:
    return f"{count / 2**20:,.0f} MiB"


def _warn_of_reads(shuffle: Shuffle, say: Callable[[str], None]) -> None:
    """Say so where row groups are read several times an epoch: a slice of one is read from the group's beginning."""
    assert shuffle.bounds is not None
    group, first, rows = shuffle.slices
    skipped = first - shuffle.rows.count_below(shuffle.bounds)[group]
    reads = float((skipped + rows).sum() / rows.sum())
    if reads > _MANY_READS:
        say(
            f"the row groups, of up to {int(np.diff(shuffle.bounds).max()):,} rows, are read {reads:.1f} times an epoch, since "
            f"--shuffle-rows is {shuffle.shuffle_rows:,}: give more, or write smaller row groups"
        )
