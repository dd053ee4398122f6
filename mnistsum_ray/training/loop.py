"""What each worker does: train the epochs that are left, evaluate, report; rank 0 has the model.

for each epoch    shuffle the shard ─▶ batches ─▶ steps ─▶ count the rows of all ranks
                  evaluate on the held-out rows ─▶ checkpoint ─▶ ray.train.report
"""

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import Any, Final

import ray.train
import ray.train.torch
import torch
from ray.util.queue import Queue
from torch import Tensor, nn

from mnistsum_ray.config import Hyperparameters
from mnistsum_ray.data.columns.base import rows_in
from mnistsum_ray.data.decoding import RowTotals
from mnistsum_ray.errors import RepeatingError, RequestError, RunError, counted
from mnistsum_ray.model.calls import calling, forward, map_tensors
from mnistsum_ray.model.device import (
    all_reduce_sum,
    broadcast_state,
    disable_tf32,
    enable_determinism,
    faster_with_bf16,
    tune_malloc,
)
from mnistsum_ray.model.finished import FinishedModel, calibrate_model, finish_model
from mnistsum_ray.model.folder import Weights, checksum, copy_weights
from mnistsum_ray.reporting.console import Progress
from mnistsum_ray.storage.store import Location
from mnistsum_ray.task import Batch, Evaluated, Task
from mnistsum_ray.training.checkpoint import latest_state, report_epoch, restore
from mnistsum_ray.training.progress import Events
from mnistsum_ray.training.worker import ToTensors, Worker

_BATCH_ROWS: Final = {"cpu": 250, "cuda": 2_000}
_BATCH_BYTES: Final = {"cpu": 4 * 2**20, "cuda": 64 * 2**20}
"""Held-out rows that are evaluated together, and their bytes at most."""

_KEPT_BYTES: Final = 200_000 * 1024
"""Most bytes of a held-out split that workers keep on their devices: 200,000 small rows. A larger
split is read again after each epoch."""

_ANALYSED_BYTES: Final = {"validation": 5_000 * 1024, "test": 100_000 * 1024}
"""About this many bytes of rows, 5,000 and 100,000 small ones, calibrate the model (validation) and
show its errors (test). Metrics count all rows."""


@dataclass(frozen=True)
class LoopConfig:
    """Configuration of the training loop, the same for every worker."""

    task: Task
    code: str  # what tells versions of the task's file apart
    hyperparameters: Hyperparameters
    threads: int | None  # of a CPU worker
    totals: dict[str, RowTotals]  # by split: what the driver has counted
    rows_of_block: int  # as of `Rows`
    queue: Queue  # of events for the driver
    run: Location  # its folder, with the checkpoints
    init_weights: Weights | None  # what a run without a checkpoint begins with; None: the task's

    def __repr__(self) -> str:  # Ray's dashboard shows it
        return repr(self.hyperparameters)


def train_loop_per_worker(config: dict[str, LoopConfig]) -> FinishedModel | None:
    """Train on this worker; rank 0 returns the finished model.

    Ray Train tries again after every error but a RepeatingError, which is raised for what all ranks
    meet at the same step, since it follows from a sum over all of them: an infinite loss, or a
    wrong count of rows.
    """
    try:
        return _train(config["loop"])
    except (RequestError, RunError) as error:
        raise RepeatingError(str(error)) from None


def _train(config: LoopConfig) -> FinishedModel | None:
    """Train the epochs that are left, and finish the model."""
    task, parameters = config.task, config.hyperparameters
    device = ray.train.torch.get_device()
    _set_up_process(device, config.threads)
    events = Events(config.queue, ray.train.get_context().get_world_rank())
    state, tensors = latest_state(config.run, events.note)
    state.task, state.code = task.name, config.code
    state.precision = state.precision or parameters.precision or _best_precision(task, device)
    totals, rows_of_block = config.totals["train"], config.rows_of_block
    worker = Worker(task, parameters, totals, rows_of_block, device, state.precision, events)
    begins = "beginning"
    if tensors is not None:
        restore(tensors, worker.network, worker.optimizer)
        begins = f"resuming after epoch {state.epochs_done}"
    elif config.init_weights is not None:
        worker.network.load_state_dict(config.init_weights)
    workers = counted(worker.world_size, "worker")
    threads = counted(torch.get_num_threads(), "thread")
    events.note(f"{begins}, on {workers} of {threads}, in {state.precision}")
    held_out = {
        split: HeldOutRows(task, split, config.totals[split], device, events)
        for split in ("validation", "test")
    }
    while state.epochs_done < parameters.epochs:
        figures = worker.train_epoch(state.epochs_done)
        broadcast_state(worker.network)  # CPUs of other kinds round differently
        state.epochs_done += 1
        started = time.perf_counter()
        figures |= _evaluate(worker, held_out, f"epoch {state.epochs_done}")
        figures["evaluation_seconds"] = time.perf_counter() - started
        line = {"epoch": state.epochs_done, "workers": worker.world_size, **figures}
        state.history.append(line)
        events.send("epoch", **line)
        report_epoch(state, worker.network, worker.optimizer, worker.rank)
    events.note("finishing the model")
    # Two runs are compared by these bits, those before calibration.
    entries: dict[str, Any] = {"trained_sha256": checksum(copy_weights(worker.network))}
    metrics = {split: state.history[-1][split] for split in held_out}
    if type(task).calibrate is not Task.calibrate:
        rows = held_out["validation"].gather_analysed(worker.network, bf16=worker.bf16)
        if worker.rank == 0:
            entries |= calibrate_model(task, worker.network, rows)
        broadcast_state(worker.network)
        metrics = _evaluate(worker, held_out, "after calibration")
    analysed = {}
    for split, of_split in held_out.items():
        analysed[split] = of_split.gather_analysed(worker.network, bf16=worker.bf16)
    if worker.rank > 0:
        return None
    return finish_model(
        task,
        worker.network,
        analysed,
        state.history,
        state.precision,
        config.code,
        metrics | entries,
    )


def _evaluate(
    worker: Worker, held_out: dict[str, "HeldOutRows"], when: str
) -> dict[str, dict[str, float]]:
    """Return metrics of each split. A RunError says that a loss is infinite."""
    metrics = {}
    for split, rows in held_out.items():
        metrics[split] = rows.evaluate(worker.network, bf16=worker.bf16)
        worker.check_finite(metrics[split]["loss"], f"{when}: the loss on {split} rows is")
    return metrics


def _set_up_process(device: torch.device, threads: int | None) -> None:
    """Make this process compute exact float32 on GPUs, and on CPUs the same bits each time."""
    disable_tf32()
    if threads is not None:
        torch.set_num_threads(threads)
    if device.type == "cpu":
        enable_determinism()
        tune_malloc()


def _best_precision(task: Task, device: torch.device) -> str:
    """Return bf16 if it is precise enough for the task and faster on all workers, else fp32."""
    votes = torch.tensor(float(task.bf16 and faster_with_bf16(device)), device=device)
    world_size = ray.train.get_context().get_world_size()
    return "bf16" if all_reduce_sum(votes).item() == world_size else "fp32"


class HeldOutRows:
    """The held-out rows of a split in the shard of this rank, as they were read."""

    def __init__(
        self, task: Task, split: str, totals: RowTotals, device: torch.device, events: Events
    ) -> None:
        self._task = task
        self._split = split
        self._totals = totals
        self._device = device
        self._events = events
        self._world_size = ray.train.get_context().get_world_size()
        self._shard = ray.train.get_dataset_shard(split)
        columns = task.training_columns.values()
        self._batch_rows = min(
            _BATCH_ROWS[device.type], rows_in(_BATCH_BYTES[device.type], columns)
        )
        is_kept = totals.rows <= rows_in(_KEPT_BYTES, columns)
        self._kept = list(self._read()) if is_kept else None
        analysed_rows = rows_in(_ANALYSED_BYTES[split], columns)
        # Evenly spaced, since the first rows of sorted files all have one label.
        self._analysed_every = ceil(totals.rows / analysed_rows)
        self._analysed: Evaluated | None = None

    def _read(self) -> Iterator[Batch]:
        return iter(
            self._shard.iter_torch_batches(
                batch_size=self._batch_rows,
                collate_fn=ToTensors(self._task.training_columns),
                pin_memory=self._device.type == "cuda",
            )
        )

    def evaluate(self, network: nn.Module, *, bf16: bool) -> dict[str, float]:
        """Return metrics of all rows, over all workers, or raise RowCountError."""
        self._analysed = []
        progress = Progress(self._events.count, f"{self._split} rows", self._totals.rows)
        network.eval()
        # A rank without rows must know the names of the metrics, too.
        no_rows = ToTensors(self._task.training_columns).zeros(2)
        no_rows = {key: values.to(self._device) for key, values in no_rows.items()}
        _, of_no_row = self._evaluate_batch(network, no_rows, bf16=bf16)
        names = list(of_no_row)
        sums = torch.zeros(len(names), dtype=torch.float64, device=self._device)
        counts = torch.zeros(2, dtype=torch.int64, device=self._device)
        for index, batch in enumerate(self._read() if self._kept is None else self._kept):
            outputs, of_rows = self._evaluate_batch(network, batch, bf16=bf16)
            sums += torch.stack([of_rows[name].double().sum() for name in names])
            ids = batch["row_id"]
            counts += torch.stack([torch.ones_like(ids).sum(), ids.sum()])
            if index % self._analysed_every == 0:
                self._analysed.append((batch, outputs))
            progress(len(ids) * self._world_size)  # the others are about as far
        rows, id_sum = all_reduce_sum(counts).tolist()
        self._totals.check(rows, id_sum, "evaluation")
        of_names = dict(zip(names, all_reduce_sum(sums).tolist(), strict=True))
        return {"rows": rows, **self._task.reduce_metrics(rows, of_names)}

    @torch.no_grad()
    def _evaluate_batch(
        self, network: nn.Module, batch: Batch, *, bf16: bool
    ) -> tuple[Any, dict[str, Tensor]]:
        """Return the network's outputs for a batch, and the loss and the metrics of each row."""
        outputs = forward(self._task, network, batch, bf16=bf16)
        with calling(self._task, "evaluate"):
            return outputs, self._task.evaluate(network, outputs, batch)

    def gather_analysed(self, network: nn.Module, *, bf16: bool) -> Evaluated:
        """Return rows of all ranks with their outputs of the last evaluation, on the CPU."""
        kind = type(self._task)
        if (kind.calibrate, kind.finish) == (Task.calibrate, Task.finish):  # nothing looks at them
            return []
        if self._analysed is None:  # a run that was lost after its last epoch
            self.evaluate(network, bf16=bf16)
        own = map_tensors(lambda tensor: tensor.cpu(), self._analysed)
        of_ranks: list[Any] = [own]
        if self._world_size > 1:
            of_ranks = [None] * self._world_size
            torch.distributed.all_gather_object(of_ranks, own)
        return list(itertools.chain(*of_ranks))
