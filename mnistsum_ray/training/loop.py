"""Per-worker training loop: train, evaluate and checkpoint each epoch; then fine-tune the sum head and analyse the model."""

import time
from dataclasses import dataclass, replace
from typing import Any, Final, cast

import ray.train
from ray.data.dataset import MaterializedDataset
from ray.util.queue import Queue

from mnistsum_ray.config import Hyperparameters
from mnistsum_ray.data.row_ranges import RowRanges
from mnistsum_ray.data.sampling import RowIds
from mnistsum_ray.errors import RowCountError, RunError
from mnistsum_ray.model.device import faster_with_bf16
from mnistsum_ray.model.distributed import broadcast_parameters
from mnistsum_ray.model.serialization import copy_weights
from mnistsum_ray.storage.lock import FolderLock
from mnistsum_ray.training.checkpointer import Checkpointer
from mnistsum_ray.training.events import EventSender
from mnistsum_ray.training.finalize import analyse_model, finetune
from mnistsum_ray.training.in_memory import InMemoryRows
from mnistsum_ray.training.pipeline import EvaluationSet, TrainingRows
from mnistsum_ray.training.schedule import CPU_CHUNK_ROWS, GPU_CHUNK_ROWS, Schedule
from mnistsum_ray.training.state import CheckpointError, TrainerState
from mnistsum_ray.training.streaming import StreamedRows
from mnistsum_ray.training.trainer import NonFiniteLossError, Trainer
from mnistsum_ray.training.worker import Worker, setup_worker

_MAX_READERS: Final = 8
"""Actors that read for one worker: each feeds some 100,000 rows/s of raw bytes, or 26,000 of PNG."""


@dataclass(frozen=True)
class LoopConfig:
    """Configuration of the training loop, the same for every worker."""

    hyperparameters: Hyperparameters
    train: RowRanges
    validation: RowRanges
    test: RowRanges
    block_ids: RowIds
    """Row id of the first row of each block of the dataset `images`, which holds the rows in memory; empty where none are."""
    streamed: StreamedRows | None
    """Access to rows that are not in memory."""
    events: Queue
    """Rank 0 sends events for the console here."""
    start: ray.train.Checkpoint | None
    """Checkpoint that `--resume` starts from; None starts from new weights."""
    lock: FolderLock
    """Checked before each write to the run folder."""


def train_loop_per_worker(config: dict[str, LoopConfig]) -> dict[str, Any]:
    """Run the training loop.

    Returns:
        On rank 0, which Ray Train hands to the driver: the fields of a `TrainingResult`. On other ranks nothing that is used.
    """
    loop = config["loop"]
    worker = setup_worker()
    events = EventSender(loop.events, worker.rank)
    try:
        return _train_loop(loop, worker, events)
    except (NonFiniteLossError, CheckpointError, RunError) as error:
        # Another attempt would meet the same. Perhaps only this rank knows, so the driver ends all of them.
        events.fail(str(error))
        raise


def _train_loop(config: LoopConfig, worker: Worker, events: EventSender) -> dict[str, Any]:
    trainer = Trainer(config.hyperparameters, worker, events)
    checkpointer = Checkpointer(trainer.model, trainer.optimizer, worker, config.lock, events)
    state = checkpointer.restore(config.start)
    if state is None:
        bf16 = worker.all_agree(faster_with_bf16(worker.device))
        precision = config.hyperparameters.precision or ("bf16" if bf16 else "fp32")
        state = TrainerState(0, [], copy_weights(trainer.model), precision)
    trainer.prepare(state.precision)

    rows = _training_rows(config, worker)
    validation, test = (
        EvaluationSet(rows.held_out, held_out, worker.rank, worker.world_size, worker.device)
        for held_out in (config.validation, config.test)
    )
    schedule = Schedule(
        rows=config.train,
        batch_size=config.hyperparameters.batch_size,
        lanes=rows.train.lanes(config.train, config.hyperparameters.batch_size),
        seed=config.hyperparameters.seed,
        distortion=config.hyperparameters.distortion,
        first_epoch=state.epochs_done,
        first_step=state.progress.steps,
        epochs=config.hyperparameters.epochs,
        rank=worker.rank,
        world_size=worker.world_size,
        rows_per_chunk=GPU_CHUNK_ROWS if worker.device.type == "cuda" else CPU_CHUNK_ROWS,
    )
    batches = rows.train.training_batches(schedule, worker.device)
    for epoch in range(schedule.first_epoch, schedule.epochs):
        trained = trainer.train_epoch(state, schedule, batches, checkpointer)
        broadcast_parameters(trainer.model.parameters())
        started = time.perf_counter()
        metrics = [trainer.evaluate(held_out, epoch + 1) for held_out in (validation, test)]
        trained["evaluation_seconds"] = time.perf_counter() - started
        checkpointer.save_epoch(state, trained, *metrics, last=epoch == schedule.epochs - 1)
    if next(batches, None) is not None:
        raise RowCountError("there are more batches than steps")

    if config.hyperparameters.sum_head_steps and state.sum_head is None:
        finetune(trainer, state, rows, config.train, validation, test, checkpointer)
    if worker.rank != 0:
        return {}
    return vars(analyse_model(trainer, state, rows, config.train, config.validation, config.test))


def _training_rows(config: LoopConfig, worker: Worker) -> TrainingRows:
    streamed = config.streamed and replace(config.streamed, readers=_readers(worker))
    if streamed and not len(config.block_ids):
        return TrainingRows(streamed, streamed)
    # The dataset is not split: every worker sees all blocks and takes its rows by arithmetic (Schedule).
    images = cast(MaterializedDataset, ray.train.get_dataset_shard("images").materialize())
    in_memory = InMemoryRows(images, config.block_ids)
    return TrainingRows(in_memory, streamed or in_memory)


def _readers(worker: Worker) -> int:
    """Actors that read for a worker. On CPUs they share the cores with the training, which takes a few thousand rows/s a core."""
    free = worker.cpus if worker.device.type == "cuda" else worker.cpus // 4
    return max(1, min(free, _MAX_READERS))
