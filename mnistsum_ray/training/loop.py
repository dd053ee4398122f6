"""The training loop of each worker: train, evaluate and report each epoch that is left."""

import time
from dataclasses import dataclass

import numpy as np
import ray
import ray.train
import torch
from ray.util.queue import Queue

from mnistsum_ray.config import Hyperparameters
from mnistsum_ray.errors import RunError, counted
from mnistsum_ray.model.device import all_reduce_sum, broadcast_state, faster_with_bf16
from mnistsum_ray.storage.store import Location
from mnistsum_ray.training.checkpoint import (
    CheckpointError,
    TrainerState,
    latest_state,
    report_epoch,
    restore,
)
from mnistsum_ray.training.evaluation import HeldOutRows, metrics_of
from mnistsum_ray.training.pipeline import TrainingData
from mnistsum_ray.training.trainer import Trainer, TrainingBatches
from mnistsum_ray.training.worker import Worker


@dataclass(frozen=True)
class LoopConfig:
    """Configuration of the training loop, the same for every worker."""

    hyperparameters: Hyperparameters
    threads: int | None
    """Threads of each worker on CPUs, see `resources.choose_threads`."""
    data: "ray.ObjectRef[TrainingData]"
    events: Queue
    """From the workers to the console."""
    start: Location | None
    """Checkpoint that `--resume` starts from."""
    weights: dict[str, np.ndarray] | None
    """Weights that a run without a checkpoint begins with; None: new ones."""

    def __repr__(self) -> str:  # Ray's dashboard shows it
        return repr(self.hyperparameters)


def train_loop_per_worker(config: dict[str, LoopConfig]) -> str | None:
    """Train on this worker.

    Returns:
        Why the run failed in a way that another attempt would meet again. All workers meet it at
        the same step. What is raised is tried again by Ray Train.
    """
    loop = config["loop"]
    try:
        train(loop, Worker.set_up(loop.events, loop.threads))
    except CheckpointError:  # met by one worker alone
        raise
    except RunError as error:
        return str(error)
    return None


def train(config: LoopConfig, worker: Worker) -> None:
    """Train the epochs that are left.

    Raises:
        RunError: the loss is infinite, or rows were lost or repeated.
        CheckpointError: the checkpoint cannot be used.
    """
    parameters = config.hyperparameters
    data: TrainingData = ray.get(config.data)
    saved = latest_state(config.start)
    state = saved[0] if saved else TrainerState(0, [], parameters.precision or _best_precision(worker))
    worker.events.send("precision", precision=state.precision)
    trainer = Trainer(parameters, worker, state.precision)
    model = trainer.model
    if saved:
        restore(saved[1], model, trainer.optimizer)
        workers = counted(worker.world_size, "worker")
        worker.events.note(f"going on after epoch {state.epochs_done}, on {workers}")
    elif config.weights:
        model.load_state_dict({name: torch.tensor(value) for name, value in config.weights.items()})
    shard = ray.train.get_dataset_shard(f"from epoch {state.epochs_done}")
    batches = TrainingBatches(shard, worker.device)
    held_out = {
        "validation": HeldOutRows(data.blocks, data.validation, worker),
        "test": HeldOutRows(data.blocks, data.test, worker),
    }
    while state.epochs_done < parameters.epochs:
        line = trainer.train_epoch(state.epochs_done, data.order, batches)
        broadcast_state(model)
        state.epochs_done += 1
        started = time.perf_counter()
        for name, rows in held_out.items():
            line[name] = metrics_of(model, rows.scored(model, bf16=trainer.bf16), rows)
            trainer.check_finite(line[name]["loss"], f"epoch {state.epochs_done}: the loss on {name} rows is")
        line["evaluation_seconds"] = time.perf_counter() - started
        state.history.append({"epoch": state.epochs_done, "workers": worker.world_size, **line})
        worker.events.send("epoch", **state.history[-1])
        report_epoch(state, model, trainer.optimizer, worker.rank)


def _best_precision(worker: Worker) -> str:
    """bf16 if it is faster on all workers, else fp32."""
    votes = torch.tensor(float(faster_with_bf16(worker.device)), device=worker.device)
    return "bf16" if all_reduce_sum(votes).item() == worker.world_size else "fp32"
