"""Per-worker training loop: train, evaluate and checkpoint each epoch; then fine-tune the sum head and analyse the model."""

import time
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import ray
import torch
from ray.util.queue import Queue

from mnistsum_ray.config import Hyperparameters
from mnistsum_ray.data.order import RowRanges, Shuffle
from mnistsum_ray.data.parquet_source import ParquetFiles
from mnistsum_ray.errors import RowCountError, RunError
from mnistsum_ray.model.device import all_reduce_sum, broadcast_parameters, faster_with_bf16
from mnistsum_ray.storage.location import Location
from mnistsum_ray.storage.lock import FolderLock
from mnistsum_ray.training.checkpoint import Checkpointer, CheckpointError, TrainerState
from mnistsum_ray.training.fetch import RowData
from mnistsum_ray.training.finalize import analyse_model, finetune
from mnistsum_ray.training.rows import EvaluationSet, TrainingRows
from mnistsum_ray.training.trainer import NonFiniteLossError, Trainer
from mnistsum_ray.training.worker import Worker

_MAX_READERS: Final = 8
"""Actors that read for one worker: each feeds some 100,000 rows/s of raw bytes, or 26,000 of PNG."""


@dataclass(frozen=True)
class LoopConfig:
    """Configuration of the training loop, the same for every worker."""

    hyperparameters: Hyperparameters
    checkpoint_seconds: float
    data: "ray.ObjectRef[RowData]"
    shuffle: Shuffle
    """Of the training rows."""
    validation: RowRanges
    test: RowRanges
    checksums: npt.NDArray[np.int64] | None
    """Of the run that is trained again, see `TrainerState.checksums`; None: the first epoch finds them."""
    events: Queue
    """From the workers to the console."""
    start: Location | None
    """Checkpoint that `--resume` starts from; None starts from new weights."""
    lock: FolderLock
    """Checked before each write to the run folder."""


def train_loop_per_worker(config: dict[str, LoopConfig]) -> dict[str, Any]:
    """Run the training loop.

    Returns:
        On rank 0, which Ray Train hands to the driver: the fields of a `TrainingResult`. On other ranks nothing that is used.
    """
    loop = config["loop"]
    worker = Worker.set_up(loop.events)
    try:
        return _run(loop, worker)
    except (NonFiniteLossError, CheckpointError, RunError) as error:
        # Another attempt would fail in the same way.
        worker.events.fail(str(error))
        raise


def _run(config: LoopConfig, worker: Worker) -> dict[str, Any]:
    parameters, shuffle, data = config.hyperparameters, config.shuffle, ray.get(config.data)
    trainer = Trainer(parameters, worker)
    checkpointer = Checkpointer(trainer.model, trainer.optimizer, worker, config.lock, config.checkpoint_seconds)
    state = checkpointer.restore(config.start)
    if state is None:
        bf16 = worker.all_agree(faster_with_bf16(worker.device))
        checksums = None if config.checksums is None else torch.from_numpy(config.checksums.copy())
        state = TrainerState(0, [], parameters.precision or ("bf16" if bf16 else "fp32"), checksums=checksums)
    trainer.prepare(state.precision)

    validation, test = (
        EvaluationSet(data, held_out, worker.rank, worker.world_size, worker.device)
        for held_out in (config.validation, config.test)
    )
    rows = TrainingRows(
        config.data,
        shuffle,
        parameters.distortion,
        epochs=parameters.epochs,
        rank=worker.rank,
        world_size=worker.world_size,
        device=worker.device,
        readers=_readers(worker, data),
        first_epoch=state.epochs_done,
        first_step=state.progress.steps,
    )
    batches = rows.batches()
    end_ids = torch.from_numpy(data.end_ids) if isinstance(data, ParquetFiles) else None
    for epoch in range(state.epochs_done, parameters.epochs):
        line, trained = trainer.train_epoch(state, shuffle, batches, end_ids, checkpointer)
        broadcast_parameters(trainer.model.parameters())
        started = time.perf_counter()
        metrics = [trainer.evaluate(held_out, epoch + 1) for held_out in (validation, test)]
        line["evaluation_seconds"] = time.perf_counter() - started
        if isinstance(data, ParquetFiles):
            _check_contents(state, data, trained, validation, test)
        checkpointer.save_epoch(state, line, *metrics, last=epoch == parameters.epochs - 1)
    if next(batches, None) is not None:
        raise RowCountError("there are more batches than steps")

    if parameters.sum_head_steps and state.sum_head is None:
        finetune(trainer, state, data, shuffle.rows, validation, test, checkpointer)
    if worker.rank != 0:
        return {}
    return vars(analyse_model(trainer, state, data, shuffle.rows, config.validation, config.test))


def _check_contents(
    state: TrainerState, files: ParquetFiles, trained: torch.Tensor | None, validation: EvaluationSet, test: EvaluationSet
) -> None:
    """Compare the rows of each file with those of the first epoch, or of the run that is trained again, by their checksums.

    `trained` are those of the training rows, of all ranks. The state gets the checksums if it has none yet.

    Raises:
        RunError: a file holds other rows; names it.
    """
    assert trained is not None, "streamed rows have checksums"
    held_out = torch.from_numpy(validation.checksums + test.checksums).to(trained.device)
    checksums = (trained + all_reduce_sum(held_out)).cpu()
    if state.checksums is None:
        state.checksums = checksums
    changed = (checksums != state.checksums).nonzero()
    if len(changed):
        raise RunError(
            f"{files.location(int(changed[0])).display}: holds other rows than when the run, or the run of --from-run, read it "
            "first; put the file back as it was, or start another run"
        )


def _readers(worker: Worker, data: RowData) -> int:
    """Actors that read for a worker. On CPUs they share the cores with the training, which takes a few thousand rows/s a core."""
    if worker.device.type == "cpu":
        return max(1, min(worker.cpus // 4, _MAX_READERS)) if isinstance(data, ParquetFiles) else 1
    # One takes some 200,000 rows/s from memory.
    return max(1, min(worker.cpus, _MAX_READERS if isinstance(data, ParquetFiles) else 2))
