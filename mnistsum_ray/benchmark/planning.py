"""Planning of very large runs on synthetic footers: seconds and memory of the driver, requests and bytes of the storage.

The planning code of the jobs runs as it is. Only what it plans for does not exist: the footers are made up, and no file is read.
"""

import hashlib
import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any, Final, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs

from mnistsum_ray.data.parquet_files import FILE_SCHEMA, ParquetFiles
from mnistsum_ray.data.pixels import PIXELS
from mnistsum_ray.data.row_ranges import RowRanges
from mnistsum_ray.data.sources import Source, source_of_files
from mnistsum_ray.scoring import inputs
from mnistsum_ray.scoring.footers import FOOTER_SCHEMA
from mnistsum_ray.scoring.parts import split_into_parts
from mnistsum_ray.scoring.provenance import COMMITTED_SCHEMA
from mnistsum_ray.scoring.reconcile import match_outputs, reconcile
from mnistsum_ray.scoring.work_units import make_work_units
from mnistsum_ray.storage.location import Location
from mnistsum_ray.training.schedule import Schedule
from mnistsum_ray.training.streaming import StreamedRows

_WORKERS: Final = 64
_SHUFFLE_ROWS: Final = 1_000_000
_TRAINING_BATCH: Final = 4096
_REQUESTS_PER_PIECE: Final = 4
"""Of S3: HEAD of the file, HEAD to open it, GET of its footer, and GET of the two columns, which lie side by side."""

_FOOTER_BYTES: Final = 64 * 1024
_ROW_BYTES: Final = PIXELS + 1
_SCORED_FILE_ROWS: Final = 1000
_MAX_ROWS_PER_FILE: Final = 8192
_LOCAL: Final = Location(pafs.LocalFileSystem(), "/data", "/data")

Measurement = dict[str, float]
T = TypeVar("T")


def plan_training(files: int, rows_per_file: int) -> Measurement:
    """Plan training on files of one row group each, for 64 workers.

    Returns:
        Seconds for splits and fingerprint, until the first window of a worker is known, and for all windows of an epoch of one
        worker and of all; of an epoch, requests and bytes per training row; and the memory of this process.
    """
    source, opened = _timed(lambda: _training_source(files, rows_per_file))
    assert source.files is not None
    _, fingerprint = _timed(lambda: source.files and source.files.fingerprint(source.splits))
    rows = StreamedRows(source.files, _SHUFFLE_ROWS)
    schedule = Schedule(
        rows=source.train,
        batch_size=_TRAINING_BATCH,
        lanes=rows.lanes(source.train, _TRAINING_BATCH),
        seed=0,
        distortion=0.0,
        epochs=1,
        rank=0,
        world_size=_WORKERS,
    )
    shuffle = rows.shuffle(source.train, _TRAINING_BATCH, 0)
    _, first = _timed(lambda: next(rows.window_tasks(schedule)))
    tasks, epoch = _timed(lambda: sum(1 for _ in rows.window_tasks(schedule)))
    _, resumed = _timed(lambda: next(shuffle.windows(0, schedule.my_lanes, shuffle.steps // 2)))
    windows, all_windows = _timed(lambda: list(shuffle.windows(0, range(shuffle.lanes))))
    pieces = sum(len(window.slices) for window in windows)
    read = shuffle.rows_read_per_row * _ROW_BYTES + pieces * _FOOTER_BYTES / len(source.train)
    return {
        "training_rows": len(source.train),
        "lanes": shuffle.lanes,
        "splits_seconds": opened,
        "fingerprint_seconds": fingerprint,
        "first_window_seconds": first,
        "first_window_after_resume_seconds": resumed,
        "epoch_of_a_worker_seconds": epoch,
        "tasks_of_a_worker": tasks,
        "epoch_of_all_lanes_seconds": all_windows,
        "requests_per_1000_rows": 1000 * _REQUESTS_PER_PIECE * pieces / len(source.train),
        "bytes_read_per_row": read,
        "memory_mib": _peak_memory(),
    }


def _training_source(files: int, rows_per_file: int) -> Source:
    rows = np.full(files, rows_per_file)
    columns: list[Any] = [
        [f"train/part-{index:06d}.parquet" for index in range(files)],
        rows * _ROW_BYTES,
        np.arange(files) * 10**9,
        [_sha256(index) for index in range(files)],
        rows,
        pa.ListArray.from_arrays(pa.array(np.arange(files + 1), pa.int32()), pa.array(rows)),
        ["digit"] * files,
    ]
    table = pa.Table.from_arrays([pa.array(column) for column in columns], schema=FILE_SCHEMA)
    return source_of_files(ParquetFiles(_LOCAL, table), {"": RowRanges.of([0], [files * rows_per_file])}, "/data")


def plan_scoring(files: int) -> Measurement:
    """Plan, resume and reconcile the scoring of many files whose rows have all been scored.

    Returns:
        Seconds of each, and the memory of this process.
    """
    table = _scoring_files(files)
    (parts, errors), split = _timed(lambda: split_into_parts(table, _MAX_ROWS_PER_FILE))
    assert not errors
    units, grouped = _timed(lambda: len(make_work_units(parts, _MAX_ROWS_PER_FILE, _WORKERS)))
    committed = _committed(parts)
    matched, match = _timed(lambda: match_outputs(parts, committed, "{}"))
    (result, totals), reconciled = _timed(lambda: reconcile(table, matched))
    assert result.num_rows == files
    return {
        "files": files,
        "rows": totals.scored_rows,
        "units": units,
        "plan_seconds": split,
        "work_units_seconds": grouped,
        "match_seconds": match,
        "reconcile_seconds": reconciled,
        "memory_mib": _peak_memory(),
    }


def _scoring_files(files: int) -> pa.Table:
    rows = np.full(files, _SCORED_FILE_ROWS)
    listed: list[Any] = [[f"day={index // 1000:05d}/part-{index:07d}.parquet" for index in range(files)], rows * _ROW_BYTES, rows]
    table = pa.Table.from_arrays([pa.array(column) for column in listed], schema=inputs.FILE_SCHEMA)
    groups = pa.ListArray.from_arrays(pa.array(np.arange(files + 1), pa.int32()), pa.array(rows))
    footers: dict[str, Any] = {
        "rows": rows,
        "group_rows": groups,
        "bytes": rows * _ROW_BYTES,
        "footer_sha256": [_sha256(index) for index in range(files)],
        "error": pa.nulls(files, pa.string()),
        "missing_column": pa.nulls(files, pa.string()),
    }
    for field in FOOTER_SCHEMA:
        table = table.append_column(field, pa.array(footers[field.name], field.type))
    return table


def _committed(parts: pa.Table) -> pa.Table:
    """The output files of all parts, as an earlier run has left them."""
    count = parts.num_rows
    histogram, frequency = [50] * 20, [100] * 10
    counts = json.dumps(
        {"consistent": 1000, "digit_prob": histogram, "sum_prob": histogram, "digits": frequency, "numbers": frequency}
        | {"unsure": [[0.5, row, 1, 2] for row in range(3)]},
        separators=(",", ":"),  # as `read_committed` writes them
    )
    values: dict[str, Any] = {name: parts[name] for name in COMMITTED_SCHEMA.names if name in parts.column_names}
    values |= {"error": pa.nulls(count, pa.string()), "source": parts["name"], "rejected": np.zeros(count, np.int64)}
    values |= {"spec": pa.repeat("{}", count), "counts": pa.repeat(counts, count)}
    values |= {"scored_in_file": parts["rows"], "rejected_in_file": np.zeros(count, np.int64)}
    return pa.table(values, COMMITTED_SCHEMA)


def _sha256(index: int) -> str:
    return hashlib.sha256(str(index).encode()).hexdigest()


def _timed(compute: Callable[[], T]) -> tuple[T, float]:
    started = time.perf_counter()
    return compute(), time.perf_counter() - started


def _peak_memory() -> float:
    """The most memory that this process has had, in MiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
