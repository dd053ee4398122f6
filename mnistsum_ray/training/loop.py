"""Per-worker training loop: train, evaluate and checkpoint each epoch; then fine-tune the sum head and analyse the model."""

import time
from dataclasses import dataclass
from typing import Any, cast

import ray.train
from ray.data.dataset import MaterializedDataset
from ray.util.queue import Queue

from mnistsum_ray.config import Hyperparameters
from mnistsum_ray.data.sampling import RowIds
from mnistsum_ray.errors import RowCountError
from mnistsum_ray.model.device import faster_with_bf16
from mnistsum_ray.model.distributed import broadcast_parameters
from mnistsum_ray.model.serialization import copy_weights
from mnistsum_ray.storage.lock import Fence
from mnistsum_ray.training.checkpointer import Checkpointer
from mnistsum_ray.training.events import EventSender
from mnistsum_ray.training.finalize import EvaluationSet, analyse_model, finetune
from mnistsum_ray.training.pipeline import evaluation_batches, training_batches
from mnistsum_ray.training.schedule import Schedule
from mnistsum_ray.training.state import CheckpointError, TrainerState
from mnistsum_ray.training.trainer import NonFiniteLossError, Trainer
from mnistsum_ray.training.worker import setup_worker


@dataclass(frozen=True)
class LoopConfig:
    """Configuration of the training loop, the same for every worker."""

    hyperparameters: Hyperparameters
    train: RowIds
    validation: RowIds
    test: RowIds
    events: Queue
    """Rank 0 sends events for the console here."""
    start: ray.train.Checkpoint | None
    """Checkpoint that `--resume` starts from; None starts from new weights."""
    fence: Fence
    """Checked before each write to the run folder."""


def train_loop_per_worker(config: dict[str, LoopConfig]) -> dict[str, Any]:
    """Run the training loop.

    Returns:
        On rank 0, which Ray Train hands to the driver: the fields of a `TrainingResult`, or `error`, a message, where another
        attempt would fail in the same way. On other ranks nothing that is used.
    """
    try:
        return _train_loop(config["loop"])
    except (NonFiniteLossError, RowCountError, CheckpointError) as error:
        # Returned as a value, because Ray Train retries exceptions. Every rank gets here: all see the same sums and checkpoint.
        print(f"stopped on this rank: {error}", flush=True)
        return {"error": str(error)}


def _train_loop(config: LoopConfig) -> dict[str, Any]:
    worker = setup_worker()
    events = EventSender(config.events, worker.rank)
    trainer = Trainer(config.hyperparameters, worker, events)
    checkpointer = Checkpointer(trainer.model, trainer.optimizer, worker, config.fence, events)
    state = checkpointer.restore(config.start)
    if state is None:
        bf16 = worker.all_agree(faster_with_bf16(worker.device))
        precision = config.hyperparameters.precision or ("bf16" if bf16 else "fp32")
        state = TrainerState(0, [], copy_weights(trainer.model), precision)
    trainer.prepare(state.precision)

    # The dataset is not split: every worker sees all blocks and takes its rows by arithmetic (Schedule).
    images = cast(MaterializedDataset, ray.train.get_dataset_shard("images").materialize())
    validation, test = (
        EvaluationSet(rows, evaluation_batches(images, rows, worker.rank, worker.world_size, worker.device))
        for rows in (config.validation, config.test)
    )
    schedule = Schedule(
        row_ids=config.train,
        batch_size=config.hyperparameters.batch_size,
        seed=config.hyperparameters.seed,
        distortion=config.hyperparameters.distortion,
        first_epoch=state.epochs_done,
        first_step=state.progress.steps,
        epochs=config.hyperparameters.epochs,
        rank=worker.rank,
        world_size=worker.world_size,
    )
    batches = training_batches(images, schedule, worker.device)
    for epoch in range(schedule.first_epoch, schedule.epochs):
        trained = trainer.train_epoch(state, schedule, batches, checkpointer)
        broadcast_parameters(trainer.model.parameters())
        started = time.perf_counter()
        metrics = [trainer.evaluate(rows.batches, rows.row_ids, epoch + 1) for rows in (validation, test)]
        trained["evaluation_seconds"] = time.perf_counter() - started
        checkpointer.save_epoch(state, trained, *metrics)

    if config.hyperparameters.sum_head_steps and state.sum_head is None:
        finetune(trainer, state, images, config.train, validation, test, checkpointer)
    if worker.rank != 0:
        return {}
    return vars(analyse_model(trainer, state, images, config.train, config.validation, config.test))
