"""The Ray Data side of scoring: units of the plan in, one report a part out; rows stay in the processes that work on them.

    CPUs   units ──tasks: read, predict, commit──▶ reports
    GPUs   units ──tasks: read──▶ ──actor: predict──▶ ──tasks: commit──▶ reports

On CPUs a row never leaves its process, which keeps the model for its next task. Beside a GPU many tasks read, decode and write
for one actor. Nothing here decides what is done: that a part is committed stands in its own file (commit.py), whoever wrote it
and however often.
"""

import io
import os
import pickle
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch
from ray.data import ActorPoolStrategy, TaskPoolStrategy
from torch import Tensor

from mnistsum_ray.cluster.data_context import quiet_ray_data
from mnistsum_ray.errors import one_line
from mnistsum_ray.model.device import cuda_index
from mnistsum_ray.model.inference import Predictions, Predictor
from mnistsum_ray.scoring.plan import Part, parts_of
from mnistsum_ray.scoring.provenance import PredictionSpec
from mnistsum_ray.scoring.reader import DecodedPart, UnreadablePart, read_together
from mnistsum_ray.scoring.resources import ScoringResourcePlan
from mnistsum_ray.scoring.writer import write_part
from mnistsum_ray.storage.location import Location
from mnistsum_ray.storage.lock import Fence

REPORT_SCHEMA: Final = pa.schema(
    {
        "name": pa.string(),
        "output": pa.string(),
        "rows": pa.int64(),
        "started": pa.float64(),  # seconds since 1970
        "ended": pa.float64(),
        "unreadable": pa.string(),  # why the file cannot be used after all
        "unwritable": pa.string(),  # why the output cannot be written
    }
)

_TRIES: Final = 3
"""So many processes may die under a part; Ray alone would replace them for ever."""

_BLOCK_BYTES: Final = 2**20
"""What is handed from reader to actor is handed on at once, and not gathered into larger blocks."""

_Scored = tuple[DecodedPart, Predictions] | UnreadablePart


@dataclass(frozen=True)
class WorkerContext:
    """What every process is told."""

    source: Location
    output: Location
    request: PredictionSpec
    weights: ray.ObjectRef[dict[str, Tensor]]
    batch_size: int | None
    attempts: Any
    """Handle of an `Attempts` actor."""
    fence: Fence
    conditional: bool
    """Whether the storage of the output knows conditional writes."""
    name: str = field(default_factory=lambda: secrets.token_hex(8))
    """Of the run, so that a process knows whose model it keeps."""


def stream_reports(
    units: list[pa.Table], work: WorkerContext, resource_plan: ScoringResourcePlan, actors_now: int
) -> Iterator[pa.Table]:
    """Score units, each a `plan.PART_SCHEMA` table; yields REPORT_SCHEMA tables as parts are done, in any order."""
    quiet_ray_data()
    context = ray.data.DataContext.get_current()
    block_bytes = context.target_max_block_size
    context.execution_options.preserve_order = False
    context.target_max_block_size = _BLOCK_BYTES
    try:
        yield from _stream(units, work, resource_plan, actors_now)
    finally:
        context.target_max_block_size = block_bytes  # a training in the same process needs blocks that are left whole


def _stream(
    units: list[pa.Table], work: WorkerContext, resource_plan: ScoringResourcePlan, actors_now: int
) -> Iterator[pa.Table]:
    dataset = ray.data.from_arrow(units)
    # On CPUs tasks and not actors: they begin in the processes that Ray has ready, and work on every node as it comes.
    predictors = {"compute": TaskPoolStrategy(size=resource_plan.actors), "num_cpus": resource_plan.cpus_per_actor}
    on_cpus: dict[str, Any] = {"batch_format": "pyarrow", "fn_args": (work,)}
    if not resource_plan.readers:
        dataset = dataset.map_batches(_read_predict_commit, batch_size=None, **predictors, **on_cpus)
    else:
        readers = {"compute": TaskPoolStrategy(size=resource_plan.readers), "num_cpus": resource_plan.cpus_per_task}
        dataset = dataset.map_batches(_read, batch_size=None, **readers, **on_cpus)
        if resource_plan.use_gpu:
            actors = ActorPoolStrategy(
                min_size=1,
                max_size=resource_plan.actors,
                initial_size=min(resource_plan.actors, max(1, actors_now)),
                max_tasks_in_flight_per_actor=2,  # one in hand and the next at hand; more would leave the last ones to a few
            )
            on_gpus: dict[str, Any] = {"compute": actors, "num_cpus": resource_plan.cpus_per_actor, "num_gpus": 1}
            dataset = dataset.map_batches(_Predict, batch_size=1, fn_constructor_args=(work,), batch_format="pyarrow", **on_gpus)
        else:
            dataset = dataset.map_batches(_predict_parcel, batch_size=1, **predictors, **on_cpus)
        dataset = dataset.map_batches(_commit, batch_size=1, **readers, **on_cpus)
    yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow")


def _read_once(unit: pa.Table, work: WorkerContext) -> Iterator[list[DecodedPart | UnreadablePart]]:
    """Read a unit; if a process has died under it before, part by part, so that one that kills is found out."""
    parts = parts_of(unit)
    if ray.get(work.attempts.begin.remote(f"unit of {parts[0].output}")) == 1:
        yield from read_together(work.source, parts, work.request.columns)
        return
    for part in parts:
        if ray.get(work.attempts.begin.remote(part.output)) < _TRIES:  # the first time was that of the whole unit
            yield from read_together(work.source, [part], work.request.columns)
            work.attempts.end.remote(part.output)  # it was not this one
        else:
            yield [UnreadablePart(part, f"the process that scored it died {_TRIES} times (out of memory? Ray's logs may tell)")]


def _read_predict_commit(unit: pa.Table, work: WorkerContext) -> Iterator[pa.Table]:
    started = time.time()
    for together in _read_once(unit, work):  # counted as begun before the model is there: that may be what kills
        predictor, ready = _kept_predictor(work)
        for scored in _predict(predictor, together):
            yield _committed(work, scored, max(started, ready))


_kept: dict[str, tuple[Predictor, float]] = {}
"""In a worker process: the predictor of the run that it last worked for, by the run's name, and since when it is ready."""


def _kept_predictor(work: WorkerContext) -> tuple[Predictor, float]:
    if work.name not in _kept:
        _kept.clear()
        _kept[work.name] = _predictor(work), time.time()
    return _kept[work.name]


def _read(unit: pa.Table, work: WorkerContext) -> Iterator[pa.Table]:
    started = time.time()
    for together in _read_once(unit, work):
        yield _parcel(started, together)


class _Predict:
    def __init__(self, work: WorkerContext) -> None:
        self._work = work
        _kept_predictor(work)

    def __call__(self, parcel: pa.Table) -> pa.Table:
        return _predict_parcel(parcel, self._work)


def _predict_parcel(parcel: pa.Table, work: WorkerContext) -> pa.Table:
    predictor, ready = _kept_predictor(work)
    started, together = _opened(parcel)
    started = max(started, ready)  # what was read while this process came up does not say how fast it is
    scored = _predict(predictor, together)
    return _parcel(started, [one if isinstance(one, UnreadablePart) else (one[0].without_images(), one[1]) for one in scored])


def _commit(parcel: pa.Table, work: WorkerContext) -> pa.Table:
    started, scored = _opened(parcel)
    return pa.concat_tables([_committed(work, one, started) for one in scored])


def _predictor(work: WorkerContext) -> Predictor:
    gpus = [str(gpu) for gpu in ray.get_gpu_ids()]
    device = torch.device(f"cuda:{cuda_index(gpus[0], os.environ.get('CUDA_VISIBLE_DEVICES'))}" if gpus else "cpu")
    request = work.request
    weights = ray.get(work.weights)
    return Predictor(weights, device, request.precision, work.batch_size, request.int8_maxima, request.temperatures)


def _predict(predictor: Predictor, together: list[DecodedPart | UnreadablePart]) -> Iterator[_Scored]:
    """One pass through the model for all that was read together."""
    readable = [one for one in together if isinstance(one, DecodedPart)]
    if readable:
        images = np.concatenate([rows.images for rows in readable])
        labels = [rows.labels for rows in readable if rows.labels is not None]
        predictions = predictor.predict(
            images, np.concatenate([rows.numbers for rows in readable]), np.concatenate(labels) if labels else None
        )
    start = 0
    for one in together:
        if isinstance(one, UnreadablePart):
            yield one
        else:
            end = start + len(one.numbers)
            yield one, predictions.slice(start, end)
            start = end


def _committed(work: WorkerContext, scored: _Scored, started: float) -> pa.Table:
    # Ray Data wraps an exception and loses its type on the way to the driver, so what a user has to mend travels as a value.
    if isinstance(scored, UnreadablePart):
        return _report(scored.part, started, unreadable=scored.reason)
    rows, predictions = scored
    try:
        work.fence.check()
        write_part(work.output, work.source, rows, predictions, work.request, new_only=work.conditional)
    except OSError as error:
        return _report(rows.part, started, unwritable=one_line(error))
    except pa.ArrowException as error:
        return _report(rows.part, started, unreadable=f"cannot be written again: {one_line(error)}")
    return _report(rows.part, started)


def _report(part: Part, started: float, **failure: str) -> pa.Table:
    row = {"name": part.name, "output": part.output, "rows": part.rows, "started": started, "ended": time.time(), **failure}
    return pa.Table.from_pylist([row], REPORT_SCHEMA)


def _parcel(started: float, content: list[Any]) -> pa.Table:
    """Any of our objects as one row of Ray Data, whose blocks cannot hold tables of different columns."""
    stream_ = io.BytesIO()
    _Pickler(stream_, protocol=5).dump(content)
    return pa.table({"started": [started], "content": pa.array([stream_.getvalue()], pa.large_binary())})


class _Pickler(pickle.Pickler):
    """Sends of a table that is a slice just the slice; Arrow's own way sends all of the memory behind it."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, pa.Table):
            return NotImplemented
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, value.schema) as writer:
            writer.write_table(value)
        return _table, (sink.getvalue().to_pybytes(),)


def _table(data: bytes) -> pa.Table:
    return pa.ipc.open_stream(data).read_all()


def _opened(parcel: pa.Table) -> tuple[float, list[Any]]:
    return parcel["started"][0].as_py(), pickle.loads(parcel["content"][0].as_py())
