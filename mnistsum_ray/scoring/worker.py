"""What a worker process does with a work unit: read it, predict, commit each part, and report."""

import os
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import pyarrow as pa
import ray
import torch
from torch import Tensor

from mnistsum_ray.errors import one_line
from mnistsum_ray.model.device import cuda_index
from mnistsum_ray.model.inference import Predictor
from mnistsum_ray.model.predictions import Predictions
from mnistsum_ray.scoring.decode import DecodedPart, UnreadablePart
from mnistsum_ray.scoring.parts import Part, parts_of
from mnistsum_ray.scoring.provenance import PredictionSpec
from mnistsum_ray.scoring.reader import read_batches
from mnistsum_ray.scoring.writer import write_part
from mnistsum_ray.storage.location import Location
from mnistsum_ray.storage.lock import Fence

REPORT_SCHEMA: Final = pa.schema(
    {
        "name": pa.string(),  # the input file
        "output": pa.string(),
        "rows": pa.int64(),
        "rejected": pa.int64(),  # those of the rows that cannot be scored
        "started": pa.float64(),  # seconds since 1970
        "ended": pa.float64(),
        "unreadable": pa.string(),  # why the input file cannot be used
        "unwritable": pa.string(),  # why the output file cannot be written
    }
)
"""One row per part."""

_MAX_CRASHES: Final = 3
"""Processes that may die while they score a part. Ray alone would start new ones forever."""

ScoredPart = tuple[DecodedPart, Predictions] | UnreadablePart


@dataclass(frozen=True)
class WorkerContext:
    """Everything that a worker process needs, the same for all work units of a run."""

    source: Location
    """The input's root."""
    output: Location
    """The folder where parts are committed."""
    spec: PredictionSpec
    weights: ray.ObjectRef[dict[str, Tensor]]
    batch_size: int | None
    crash_counter: Any
    """Handle of a `CrashCounter` actor."""
    fence: Fence
    """Stops this run's workers from writing once another run holds the output."""
    conditional_writes: bool
    """Whether the storage of the output supports conditional writes."""
    run_id: str = field(default_factory=lambda: secrets.token_hex(8))
    """Identifies the run in a worker process, which outlives it."""


def read_work_unit(unit: pa.Table, context: WorkerContext) -> Iterator[list[DecodedPart | UnreadablePart]]:
    """Read a work unit in batches of parts.

    After a crash in the unit its parts are read one by one, so that a part that crashes every process is found and given up.
    """
    parts, counter = parts_of(unit), context.crash_counter
    if ray.get(counter.begin.remote(f"unit of {parts[0].output}")) == 1:
        yield from read_batches(context.source, parts, context.spec.columns)
        return
    for part in parts:
        # The crash in the whole unit counts as each part's first.
        if ray.get(counter.begin.remote(part.output)) < _MAX_CRASHES:
            yield from read_batches(context.source, [part], context.spec.columns)
            counter.end.remote(part.output)
        else:
            reason = f"the process that scored it died {_MAX_CRASHES} times (out of memory? Ray's logs may tell)"
            yield [UnreadablePart(part, reason)]


_kept: dict[str, tuple[Predictor, float]] = {}
"""The predictor of the run that this process last worked for, by `run_id`, and when it became ready, in seconds since 1970."""


def get_predictor(context: WorkerContext) -> tuple[Predictor, float]:
    """Return this process's predictor for the run, made on the first call, and the time when it became ready."""
    if context.run_id not in _kept:
        _kept.clear()
        _kept[context.run_id] = _make_predictor(context), time.time()
    return _kept[context.run_id]


def _make_predictor(context: WorkerContext) -> Predictor:
    gpus = [str(gpu) for gpu in ray.get_gpu_ids()]
    device = torch.device(f"cuda:{cuda_index(gpus[0], os.environ.get('CUDA_VISIBLE_DEVICES'))}" if gpus else "cpu")
    spec, weights = context.spec, ray.get(context.weights)
    return Predictor(weights, device, spec.precision, context.batch_size, spec.int8_maxima, spec.temperatures)


def split_predictions(batch: list[DecodedPart | UnreadablePart], predictions: Predictions) -> Iterator[ScoredPart]:
    """The parts of a batch in their order, each readable one with the predictions of its rows."""
    start = 0
    for part in batch:
        if isinstance(part, UnreadablePart):
            yield part
        else:
            end = start + len(part.numbers)
            yield part, predictions.slice(start, end)
            start = end


def commit_part(context: WorkerContext, scored: ScoredPart, started: float) -> pa.Table:
    """Write a part's files and report it; also report a part that could not be read.

    Errors are values of REPORT_SCHEMA and not raised: Ray Data wraps exceptions, and their types are lost on the way to the
    driver.
    """
    if isinstance(scored, UnreadablePart):
        return _report(scored.part, started, unreadable=scored.reason)
    decoded, predictions = scored
    try:
        context.fence.check()
        write_part(context.output, context.source, decoded, predictions, context.spec, new_only=context.conditional_writes)
    except OSError as error:
        return _report(decoded.part, started, unwritable=one_line(error))
    except pa.ArrowException as error:
        return _report(decoded.part, started, unreadable=f"cannot be written again: {one_line(error)}")
    return _report(decoded.part, started, rejected=len(decoded.reasons))


def _report(part: Part, started: float, *, rejected: int = 0, **failure: str) -> pa.Table:
    row = {"name": part.name, "output": part.output, "rows": part.rows, "rejected": rejected}
    row |= {"started": started, "ended": time.time(), **failure}
    return pa.Table.from_pylist([row], REPORT_SCHEMA)
