"""The training loop of each worker: train, evaluate and report each epoch that is left."""

import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.train import CheckpointUploadMode
from ray.util.queue import Queue

from mnistsum_ray.config import Hyperparameters
from mnistsum_ray.errors import RequestError, RunError, counted, root_cause
from mnistsum_ray.model.device import all_reduce_sum, broadcast_state, faster_with_bf16
from mnistsum_ray.model.folder import Weights
from mnistsum_ray.model.network import Network
from mnistsum_ray.model.optimizer import MuonAdamW
from mnistsum_ray.storage.store import Location
from mnistsum_ray.training.analysis import FinishedModel, finish_model
from mnistsum_ray.training.checkpoint import (
    CheckpointError,
    TrainerState,
    read_checkpoint,
    restore,
    save_checkpoint,
)
from mnistsum_ray.training.held_out import HeldOutRows, ScoredDigits
from mnistsum_ray.training.pipeline import start_name
from mnistsum_ray.training.rows import TrainingData
from mnistsum_ray.training.trainer import Trainer, TrainingBatches
from mnistsum_ray.training.worker import Worker, send, set_up_process


@dataclass(frozen=True)
class Start:
    """What a run starts from: a checkpoint, which `--resume` has found, or weights, or neither."""

    checkpoint: Location | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    """Lines of history.jsonl up to the checkpoint."""
    weights: Weights | None = None
    init_from: dict[str, str] | None = None
    """Where the weights are from: `model`, the value of `--init-from`, and its `sha256`."""


@dataclass(frozen=True)
class LoopConfig:
    """Configuration of the training loop, the same for every worker."""

    hyperparameters: Hyperparameters
    threads: int | None
    data: "ray.ObjectRef[TrainingData]"
    events: Queue
    """From the workers to the driver."""
    start: Start

    def __repr__(self) -> str:  # Ray's dashboard shows it
        return repr(self.hyperparameters)


def train_loop_per_worker(config: dict[str, LoopConfig]) -> FinishedModel | str | None:
    """Train on this worker.

    Returns:
        The finished model, on rank 0. Or why the run failed in a way that another attempt would
        meet again: all workers meet it at the same step. What is raised is tried again by Ray
        Train.
    """
    try:
        return _train(config["loop"])
    except CheckpointError:  # met by one worker alone
        raise
    except (RequestError, RunError) as error:
        return str(error)


def _train(config: LoopConfig) -> FinishedModel | None:
    """Train the epochs that are left; on rank 0, finish the model."""
    parameters = config.hyperparameters
    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    set_up_process(device, config.threads)
    worker = Worker(context.get_world_rank(), context.get_world_size(), device, config.events)
    data: TrainingData = ray.get(config.data)
    state, tensors = latest_state(config.start.checkpoint)
    state.precision = state.precision or parameters.precision or _best_precision(worker)
    trainer = Trainer(parameters, worker, state.precision)
    model = trainer.model
    if tensors is not None:
        restore(tensors, model, trainer.optimizer)
        workers = counted(worker.world_size, "worker")
        worker.note(f"going on after epoch {state.epochs_done}, on {workers}")
    elif config.start.weights is not None:
        model.load_state_dict(config.start.weights)
    scored = None
    if state.epochs_done < parameters.epochs:
        scored = _train_epochs(trainer, data, state)
    if worker.rank > 0:
        return None
    if worker.world_size > 1:
        scored = None  # each worker has scored its share alone
    return finish_model(parameters, data, state, model, worker, scored)


def _train_epochs(
    trainer: Trainer, data: TrainingData, state: TrainerState
) -> dict[str, ScoredDigits]:
    """Train, evaluate and report each epoch that is left; the scores of the last, by split."""
    parameters, model, worker = trainer.hyperparameters, trainer.model, trainer.worker
    shard = ray.train.get_dataset_shard(start_name(state.epochs_done))
    batches = TrainingBatches(shard, worker.device)
    held_out = {
        "validation": HeldOutRows(data.blocks, data.validation, worker),
        "test": HeldOutRows(data.blocks, data.test, worker),
    }
    scored = {}
    while state.epochs_done < parameters.epochs:
        figures = trainer.train_epoch(state.epochs_done, data.order, batches)
        broadcast_state(model)
        state.epochs_done += 1
        started = time.perf_counter()
        for name, rows in held_out.items():
            scored[name] = rows.digit_scores(model, bf16=trainer.bf16)
            figures[name] = rows.metrics(model, scored[name])
            where = f"epoch {state.epochs_done}: the loss on {name} rows is"
            trainer.check_finite(figures[name]["loss"], where)
        figures["evaluation_seconds"] = time.perf_counter() - started
        line = {"epoch": state.epochs_done, "workers": worker.world_size, **figures}
        state.history.append(line)
        worker.send("epoch", **line)
        report_epoch(state, model, trainer.optimizer, worker.rank)
    return scored


def _best_precision(worker: Worker) -> str:
    """bf16 if it is faster on all workers, else fp32."""
    votes = torch.tensor(float(faster_with_bf16(worker.device)), device=worker.device)
    return "bf16" if all_reduce_sum(votes).item() == worker.world_size else "fp32"


def latest_state(resumed: Location | None) -> tuple[TrainerState, Weights | None]:
    """State that a worker goes on from, and its tensors for `restore`; None at the beginning.

    They are those of the last checkpoint of this attempt, or else of the one that it resumed.
    """
    latest = ray.train.get_checkpoint()
    if latest is not None:
        with latest.as_directory() as folder:
            return read_checkpoint(Location(folder))
    if resumed is not None:
        return read_checkpoint(resumed)
    return TrainerState(0, [], ""), None


def report_epoch(state: TrainerState, model: Network, optimizer: MuonAdamW, rank: int) -> None:
    """Report the last epoch to Ray Train on every worker, with a checkpoint that rank 0 writes.

    Ray Train uploads it in the background; a worker ends after its uploads.
    """
    checkpoint = None
    if rank == 0:
        folder = Path(tempfile.mkdtemp())  # which Ray Train deletes
        save_checkpoint(folder, state, model, optimizer)
        checkpoint = ray.train.Checkpoint.from_directory(folder)
    line = state.history[-1]
    ray.train.report(
        {name: line[name] for name in ("epoch", "train_loss", "validation", "test")},
        checkpoint=checkpoint,
        checkpoint_dir_name=f"epoch_{state.epochs_done:05d}",
        checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
        delete_local_checkpoint_after_upload=True,
    )


class FailureLines(ray.train.UserCallback):
    """Says why workers have failed, before Ray Train starts them again."""

    def __init__(self, events: Queue) -> None:
        self._events = events

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Called by Ray Train in its controller."""
        for rank, error in worker_exceptions.items():
            cause = root_cause(error).partition(". ")[0]  # Ray's advice follows
            text = f"worker {rank} failed: {cause} (full text in Ray's logs)"
            send(self._events, "failure", text=text)
