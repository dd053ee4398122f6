"""What a worker process does with a task: read its parts, predict, commit each part, and report.

    driver ──parts `first`..`first + count - 1`──▶ Scorer: read, decode, predict, commit ──reports──▶ driver

Rows stay in the process that works on them. Nothing records what is done: a part is done when its output file exists, no matter
which process wrote it or how often.
"""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from torch import Tensor

from mnistsum_ray.data.parquet import to_parquet
from mnistsum_ray.errors import RunError, StorageError, UnusableFileError, one_line
from mnistsum_ray.model.device import cuda_index
from mnistsum_ray.model.heads import PREDICTION_FIELDS
from mnistsum_ray.model.inference import Predictions, Predictor
from mnistsum_ray.scoring.footers import REJECTION_FIELDS
from mnistsum_ray.scoring.parts import Part, parts_of
from mnistsum_ray.scoring.reader import BatchRows, DecodedPart, UnreadablePart, read_batches
from mnistsum_ray.scoring.stamp import KEY, PREDICTIONS, REJECTED, PredictionSpec, Stamp
from mnistsum_ray.scoring.totals import count_part
from mnistsum_ray.storage import conditional
from mnistsum_ray.storage.location import Location
from mnistsum_ray.storage.lock import FolderLock

REPORT_SCHEMA: Final = pa.schema(
    {
        "name": pa.string(),  # the input file
        "rows": pa.int64(),
        "rejected": pa.int64(),  # those of the rows that cannot be scored
        "started": pa.float64(),  # seconds since 1970
        "ended": pa.float64(),
        "unreadable": pa.string(),  # why the input file cannot be used
        "failed": pa.string(),  # why the run cannot go on
    }
)
"""One row per part."""

_MAX_CRASHES: Final = 3
"""Processes that may die while they score a part. Ray alone would start new ones for ever."""


@dataclass(frozen=True)
class ScoringJob:
    """Everything that the workers of a run need."""

    parts: "ray.ObjectRef[pa.Table]"
    """`parts.PART_SCHEMA`; tasks are ranges of it."""
    source: Location
    """The input's root."""
    output: Location
    """The folder where parts are committed."""
    spec: PredictionSpec
    weights: "ray.ObjectRef[dict[str, Tensor]]"
    batch_size: int | None
    crash_counter: Any
    """Handle of a `CrashCounter` actor."""
    lock: FolderLock
    """Checked before each write."""


class Scorer:
    """Scores tasks, in an actor of Ray Data."""

    def __init__(self, job: ScoringJob) -> None:
        self._job = job
        self._parts: pa.Table = ray.get(job.parts)
        self._node: str = ray.get_runtime_context().get_node_id()
        self._predictor: Predictor | None = None

    def __call__(self, task: pa.Table) -> Iterator[pa.Table]:
        """Score the parts of a task, a row with `first` and `count`; yield REPORT_SCHEMA.

        Errors are values and not raised: Ray Data wraps exceptions, and their types are lost on the way to the driver.
        """
        started = time.time()
        parts = parts_of(self._parts.slice(task["first"][0].as_py(), task["count"][0].as_py()))
        try:
            for batch in self._read(parts):
                # After the first read: the crash counter then also counts a process that dies while the model is loaded.
                if self._predictor is None:
                    self._predictor, started = _make_predictor(self._job), time.time()
                yield from self._commit(batch, self._predictor.predict(**vars(BatchRows.of(batch))), started)
        except StorageError as error:
            yield _report(parts[0], started, failed=f"--input {error}")

    def _read(self, parts: list[Part]) -> Iterator[list[DecodedPart | UnreadablePart]]:
        """Read parts in batches.

        After a crash in the task its parts are read one by one, so that a part that crashes every process is found and given up.
        """
        job, counter = self._job, self._job.crash_counter
        if ray.get(counter.begin.remote(f"task of {parts[0].output}", self._node)) == 1:
            yield from read_batches(job.source, parts, job.spec.columns)
            return
        for part in parts:
            # The crash in the whole task counts as each part's first.
            if ray.get(counter.begin.remote(part.output, self._node)) < _MAX_CRASHES:
                yield from read_batches(job.source, [part], job.spec.columns)
                counter.end.remote(part.output)
            else:
                reason = f"the process that scored it died {_MAX_CRASHES} times (out of memory? Ray's logs may tell)"
                yield [UnreadablePart(part, reason)]

    def _commit(self, batch: list[DecodedPart | UnreadablePart], predictions: Predictions, started: float) -> Iterator[pa.Table]:
        """Write the files of each part, and report it; also report parts that could not be read."""
        job, done = self._job, 0
        for part in batch:
            if isinstance(part, UnreadablePart):
                yield _report(part.part, started, unreadable=part.reason)
                continue
            start, done = done, done + len(part.numbers)
            try:
                job.lock.check()
                write_part(job, part, predictions.slice(start, done))
            except (OSError, RunError, UnusableFileError) as error:
                yield _report(part.part, started, failed=f"--output {job.output.display}: cannot be written: {one_line(error)}")
            except pa.ArrowException as error:
                yield _report(part.part, started, unreadable=f"cannot be written again: {one_line(error)}")
            else:
                yield _report(part.part, started, rejected=len(part.reasons))


def _make_predictor(job: ScoringJob) -> Predictor:
    gpus = [str(gpu) for gpu in ray.get_gpu_ids()]
    device = torch.device(f"cuda:{cuda_index(gpus[0], os.environ.get('CUDA_VISIBLE_DEVICES'))}" if gpus else "cpu")
    spec, weights = job.spec, ray.get(job.weights)
    return Predictor(weights, device, spec.precision, job.batch_size, spec.int8_maxima)


def _report(part: Part, started: float, *, rejected: int = 0, **failure: str) -> pa.Table:
    row = {"name": part.name, "rows": part.rows, "rejected": rejected, "started": started, "ended": time.time(), **failure}
    return pa.Table.from_pylist([row], REPORT_SCHEMA)


def write_part(job: ScoringJob, decoded: DecodedPart, predictions: Predictions) -> None:
    """Write a part: the rejected rows first and the predictions last, so that a part is done when its predictions exist.

    Args:
        job: names the folders and what made the predictions.
        decoded: the part.
        predictions: one per good row of the part, in the same order.

    Raises:
        OSError: a file cannot be written, or another run has written another file of that name.
    """
    stamp = Stamp.of_part(decoded.part, job.source, len(decoded.reasons), job.spec, count_part(decoded, predictions))
    name = decoded.part.output
    if decoded.reasons:
        _write(job, job.output / REJECTED / name, _rejected_table(decoded, stamp.source), stamp)
    _write(job, job.output / PREDICTIONS / name, _prediction_table(decoded, predictions), stamp)


def _prediction_table(decoded: DecodedPart, predictions: Predictions) -> pa.Table:
    table = decoded.passthrough
    for field, values in zip(PREDICTION_FIELDS, predictions.columns(decoded.numbers), strict=True):
        table = table.append_column(field, pa.array(values, field.type))
    return table


def _rejected_table(decoded: DecodedPart, source: str) -> pa.Table:
    source_rows = np.fromiter(decoded.reasons, np.int64) + decoded.part.first_row
    added = ([source] * len(source_rows), source_rows, list(decoded.reasons.values()))
    # Input columns of these names are renamed to `input_<name>`; DuckDB and Spark do not tell upper case from lower case.
    names = decoded.rejected.column_names
    taken = {name.lower() for name in (*names, *REJECTION_FIELDS.names)}
    table = decoded.rejected.rename_columns(
        [_free_name(name, taken) if name.lower() in REJECTION_FIELDS.names else name for name in names]
    )
    for field, values in zip(REJECTION_FIELDS, added, strict=True):
        table = table.append_column(field, pa.array(values, field.type))
    return table


def _free_name(name: str, taken: set[str]) -> str:
    return _free_name(f"input_{name}", taken) if name.lower() in taken else name


def _write(job: ScoringJob, place: Location, table: pa.Table, stamp: Stamp) -> None:
    # The entry of Hugging Face lists the input's columns, and `datasets` refuses a file that has other columns.
    metadata = {key: value for key, value in (table.schema.metadata or {}).items() if key not in (b"huggingface", KEY)}
    data = to_parquet(table.replace_schema_metadata(metadata | stamp.to_metadata()))
    if not job.lock.conditional_writes:
        place.write_bytes(data)
        return
    try:
        conditional.put_if_absent(place, data.to_pybytes())
    except conditional.ConflictError:
        # An earlier process of this run may have written the same rows before it died, on other hardware with other last bits.
        written = Stamp.from_metadata(pq.read_metadata(pa.BufferReader(place.read_bytes())).metadata)
        if written is None or replace(written, counts=stamp.counts) != stamp:
            raise OSError(f"{place.display} was written by another run") from None
