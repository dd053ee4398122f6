"""Ray Data pipeline of scoring: work units in, one report per part out. Rows stay in the processes that work on them.

    CPUs   work units ──tasks: read, predict, commit──▶ reports
    GPUs   work units ──tasks: read──▶ ──actors: predict──▶ ──tasks: commit──▶ reports

On CPUs a row never leaves its process, which keeps the model for its next task. For each actor with a GPU, several tasks read,
decode and write. The pipeline does not record what is done: a part is done when its output file exists, no matter which process
wrote it or how often.
"""

import time
from collections.abc import Iterator
from typing import Any, Final

import pyarrow as pa
import ray.data
from ray.data import ActorPoolStrategy, Dataset, TaskPoolStrategy

from mnistsum_ray.cluster.data_context import ray_data_options
from mnistsum_ray.scoring.decode import BatchRows
from mnistsum_ray.scoring.parcel import pack_parts, rows_of, unpack_predictions, with_predictions
from mnistsum_ray.scoring.resources import ScoringResourcePlan
from mnistsum_ray.scoring.worker import WorkerContext, commit_part, get_predictor, read_work_unit, split_predictions

_BLOCK_BYTES: Final = 2**20
"""Small blocks go from reader to actor at once; Ray Data would gather larger ones first."""

_CONCURRENT_PARCELS: Final = 2
"""Parcels that an actor works on at the same time: while the GPU predicts one, the other is put into pinned memory, or packed."""

_TASKS_IN_FLIGHT: Final = 3
"""Parcels per actor: those and the next. With more, the last parcels of a run would wait for a few actors."""


def stream_reports(
    units: list[pa.Table], context: WorkerContext, resources: ScoringResourcePlan, fitting_workers: int
) -> Iterator[pa.Table]:
    """Score work units (`parts.PART_SCHEMA`); yield `worker.REPORT_SCHEMA` tables as parts are done, in any order.

    `fitting_workers` workers fit on the cluster as it is now, and start at once.
    """
    with ray_data_options(preserve_order=False, target_max_block_size=_BLOCK_BYTES):
        dataset = _make_dataset(units, context, resources, fitting_workers)
    yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow")


def _make_dataset(units: list[pa.Table], context: WorkerContext, resources: ScoringResourcePlan, fitting_workers: int) -> Dataset:
    dataset = ray.data.from_arrow(units)
    in_tasks: dict[str, Any] = {"batch_format": "pyarrow", "fn_args": (context,)}
    # On CPUs the model runs in tasks and not in actors: tasks start in idle worker processes, and on new nodes as they join.
    # Ray Data warns of more tasks than work units.
    workers = {"compute": TaskPoolStrategy(size=min(resources.workers, len(units))), "num_cpus": resources.cpus_per_worker}
    if not resources.readers:
        return dataset.map_batches(_score_unit, batch_size=None, **workers, **in_tasks)
    readers = {"compute": TaskPoolStrategy(size=min(resources.readers, len(units))), "num_cpus": resources.cpus_per_task}
    dataset = dataset.map_batches(_read_unit, batch_size=None, **readers, **in_tasks)
    if resources.use_gpu:
        pool = ActorPoolStrategy(
            min_size=1,
            max_size=resources.workers,
            initial_size=min(resources.workers, max(1, fitting_workers)),
            max_tasks_in_flight_per_actor=_TASKS_IN_FLIGHT,
            max_concurrent_calls_per_actor=_CONCURRENT_PARCELS,
            enable_true_multi_threading=True,
        )
        actors: dict[str, Any] = {"compute": pool, "num_cpus": resources.cpus_per_worker, "num_gpus": 1}
        dataset = dataset.map_batches(
            _PredictActor, batch_size=1, fn_constructor_args=(context,), batch_format="pyarrow", **actors
        )
    else:
        dataset = dataset.map_batches(_predict_parcel, batch_size=1, **workers, **in_tasks)
    return dataset.map_batches(_commit_parcel, batch_size=1, **readers, **in_tasks)


def _score_unit(unit: pa.Table, context: WorkerContext) -> Iterator[pa.Table]:
    started = time.time()
    # The first batch is read before the model is loaded: the crash counter then also counts a process that dies while loading.
    for batch in read_work_unit(unit, context):
        predictor, ready = get_predictor(context)
        predictions = predictor.predict(**vars(BatchRows.of(batch)))
        for scored in split_predictions(batch, predictions):
            yield commit_part(context, scored, max(started, ready))


def _read_unit(unit: pa.Table, context: WorkerContext) -> Iterator[pa.Table]:
    started = time.time()
    for batch in read_work_unit(unit, context):
        yield pack_parts(started, batch)


class _PredictActor:
    """Predicts parcels in an actor, in several threads. It loads the model before the first parcel arrives."""

    def __init__(self, context: WorkerContext) -> None:
        self._context = context
        get_predictor(context)

    def __call__(self, parcel: pa.Table) -> pa.Table:
        return _predict_parcel(parcel, self._context)


def _predict_parcel(parcel: pa.Table, context: WorkerContext) -> pa.Table:
    predictor, ready = get_predictor(context)
    return with_predictions(parcel, ready, predictor.predict(**vars(rows_of(parcel))))


def _commit_parcel(parcel: pa.Table, context: WorkerContext) -> pa.Table:
    started, batch, predictions = unpack_predictions(parcel)
    scored_parts = split_predictions(batch, predictions)
    return pa.concat_tables([commit_part(context, scored, started) for scored in scored_parts])
