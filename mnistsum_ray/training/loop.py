"""What each worker does: train the epochs that are left, evaluate, report; rank 0 has the model.

for each epoch    shuffle the shard ─▶ batches ─▶ steps ─▶ count the rows of all ranks
                  evaluate on the held-out rows ─▶ checkpoint ─▶ ray.train.report
"""

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import ceil
from typing import Any, Final

import ray.train
import ray.train.torch
import torch
from ray.util.queue import Queue

from mnistsum_ray.config import Hyperparameters
from mnistsum_ray.data.randomness import RowTotals
from mnistsum_ray.errors import RepeatingError, RequestError, RunError, counted
from mnistsum_ray.model.device import (
    all_reduce_sum,
    broadcast_state,
    disable_tf32,
    enable_determinism,
    faster_with_bf16,
    tune_malloc,
)
from mnistsum_ray.model.folder import Weights
from mnistsum_ray.model.metrics import (
    AnswerCounts,
    FinishedModel,
    LabelledRows,
    Metrics,
    RowsWithDigitLogits,
    finish_model,
)
from mnistsum_ray.model.network import TwoHeadCNN, compute_digit_logits
from mnistsum_ray.reporting.console import Progress
from mnistsum_ray.storage.store import Location
from mnistsum_ray.training.checkpoint import CheckpointError, latest_state, report_epoch, restore
from mnistsum_ray.training.progress import Events
from mnistsum_ray.training.trainer import ToTensors, Trainer

_BATCH_ROWS: Final = {"cpu": 250, "cuda": 2_000}
"""Held-out rows that are evaluated together."""

_KEPT_ROWS: Final = 200_000
"""Most rows of a held-out split that workers keep on their devices, 0.8 KB each. A larger split is
read again after each epoch."""

_ANALYSED_ROWS: Final = {"validation": 5_000, "test": 100_000}
"""About so many rows calibrate the model (validation) and show its errors (test). Metrics count all
rows."""


@dataclass(frozen=True)
class Start:
    """What a run starts from: a checkpoint, which `--resume` has found, or weights, or neither."""

    checkpoint: Location | None = None
    history: list[dict[str, Any]] = field(default_factory=list)  # lines of history.jsonl up to it
    weights: Weights | None = None
    init_from: dict[str, str] | None = None  # `model`, the value of `--init-from`, and its `sha256`


@dataclass(frozen=True)
class LoopConfig:
    """Configuration of the training loop, the same for every worker."""

    hyperparameters: Hyperparameters
    threads: int | None  # of a CPU worker
    totals: dict[str, RowTotals]  # by split: what the driver has counted
    queue: Queue  # of events for the driver
    start: Start

    def __repr__(self) -> str:  # Ray's dashboard shows it
        return repr(self.hyperparameters)


def train_loop_per_worker(config: dict[str, LoopConfig]) -> FinishedModel | None:
    """Train on this worker; rank 0 returns the finished model.

    Ray Train tries again after every error but a RepeatingError. That one is raised for what all
    ranks meet at the same step, since it follows from a sum over all of them: an infinite loss, or
    a wrong count of rows.
    """
    try:
        return _train(config["loop"])
    except CheckpointError:  # of one rank alone, so that Ray Train shall try again
        raise
    except (RequestError, RunError) as error:
        raise RepeatingError(str(error)) from None


def _train(config: LoopConfig) -> FinishedModel | None:
    """Train the epochs that are left, and finish the model."""
    parameters = config.hyperparameters
    device = ray.train.torch.get_device()
    _set_up_process(device, config.threads)
    events = Events(config.queue, ray.train.get_context().get_world_rank())
    state, tensors = latest_state(config.start.checkpoint)
    state.precision = state.precision or parameters.precision or _best_precision(device)
    trainer = Trainer(parameters, config.totals["train"], device, state.precision, events)
    begins = "beginning"
    if tensors is not None:
        restore(tensors, trainer.model, trainer.optimizer)
        begins = f"going on after epoch {state.epochs_done}"
    elif config.start.weights is not None:
        trainer.model.load_state_dict(config.start.weights)
    workers = counted(trainer.world_size, "worker")
    threads = counted(torch.get_num_threads(), "thread")
    events.note(f"{begins}, on {workers} of {threads}, in {state.precision}")
    held_out = {
        split: HeldOutRows(split, config.totals[split], device, events)
        for split in ("validation", "test")
    }
    while state.epochs_done < parameters.epochs:
        figures = trainer.train_epoch(state.epochs_done)
        broadcast_state(trainer.model)  # CPUs of other kinds round differently
        state.epochs_done += 1
        started = time.perf_counter()
        for split, rows in held_out.items():
            figures[split] = rows.evaluate(trainer.model, bf16=trainer.bf16)
            where = f"epoch {state.epochs_done}: the loss on {split} rows is"
            trainer.check_finite(figures[split]["loss"], where)
        figures["evaluation_seconds"] = time.perf_counter() - started
        line = {"epoch": state.epochs_done, "workers": trainer.world_size, **figures}
        state.history.append(line)
        events.send("epoch", **line)
        report_epoch(state, trainer.model, trainer.optimizer, trainer.rank)
    analysed = {}
    for split, rows in held_out.items():
        analysed[split] = rows.gather_analysed(trainer.model, bf16=trainer.bf16)
    if trainer.rank > 0:
        return None
    events.note("analysing the model's answers on the test rows")
    return finish_model(
        trainer.model, analysed["validation"], analysed["test"], state.history, state.precision
    )


def _set_up_process(device: torch.device, threads: int | None) -> None:
    """Make this process compute exact float32 on GPUs, and on CPUs the same bits each time."""
    disable_tf32()
    if threads is not None:
        torch.set_num_threads(threads)
    if device.type == "cpu":
        enable_determinism()
        tune_malloc()


def _best_precision(device: torch.device) -> str:
    """bf16 if it is faster on all workers, else fp32."""
    votes = torch.tensor(float(faster_with_bf16(device)), device=device)
    world_size = ray.train.get_context().get_world_size()
    return "bf16" if all_reduce_sum(votes).item() == world_size else "fp32"


class HeldOutRows:
    """The held-out rows of a split in the shard of this rank, undistorted and without numbers."""

    def __init__(self, split: str, totals: RowTotals, device: torch.device, events: Events) -> None:
        self._split = split
        self._totals = totals
        self._device = device
        self._events = events
        self._world_size = ray.train.get_context().get_world_size()
        self._shard = ray.train.get_dataset_shard(split)
        self._kept = list(self._read()) if totals.rows <= _KEPT_ROWS else None
        self._analysed: RowsWithDigitLogits | None = None

    def _read(self) -> Iterator[LabelledRows]:
        return iter(
            self._shard.iter_torch_batches(
                batch_size=_BATCH_ROWS[self._device.type],
                collate_fn=ToTensors(),
                pin_memory=self._device.type == "cuda",
            )
        )

    def evaluate(self, model: TwoHeadCNN, *, bf16: bool) -> Metrics:
        """Metrics with all numbers, over all workers. RowCountError: a row was lost or repeated."""
        self._analysed = []
        progress = Progress(self._events.count, f"{self._split} rows", self._totals.rows)
        every = ceil(self._totals.rows / _ANALYSED_ROWS[self._split])
        counts = AnswerCounts(self._device)
        for index, batch in enumerate(self._read() if self._kept is None else self._kept):
            digit_logits = compute_digit_logits(model, batch["image"], bf16=bf16)
            counts.add(batch, model.logits_of_all_numbers(digit_logits))
            # Evenly spaced, since the first rows of sorted files all show one digit.
            if index % every == 0:
                self._analysed.append((batch, digit_logits))
            progress(len(digit_logits) * self._world_size)  # the others are about as far
        counts.all_reduce()
        return counts.metrics(self._totals)

    def gather_analysed(self, model: TwoHeadCNN, *, bf16: bool) -> RowsWithDigitLogits:
        """Rows of all ranks, with the digit logits of the last evaluation, on the CPU."""
        if self._analysed is None:  # a run that was lost after its last epoch
            self.evaluate(model, bf16=bf16)
        own = []
        for batch, digit_logits in self._analysed or []:
            own.append(({name: values.cpu() for name, values in batch.items()}, digit_logits.cpu()))
        of_ranks: list[Any] = [own]
        if self._world_size > 1:
            of_ranks = [None] * self._world_size
            torch.distributed.all_gather_object(of_ranks, own)
        return list(itertools.chain(*of_ranks))
