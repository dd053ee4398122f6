"""Training of one worker: its batches, a step, and an epoch."""

import math
import time
from typing import Any, Final

import pyarrow as pa
import ray.data
import ray.train.torch
import torch
from torch import Tensor

from mnistsum_ray.config import Hyperparameters
from mnistsum_ray.data.images import IMAGE_TYPE, SIDE, one_chunk, pixels_view
from mnistsum_ray.data.randomness import (
    AFFINE_VALUES,
    RandomStream,
    TrainingOrder,
    check_row_counts,
    mix_ids,
    positions_of_rank,
    step_seed,
)
from mnistsum_ray.errors import RequestError, RunError
from mnistsum_ray.model.device import all_reduce_sum, array_to_device
from mnistsum_ray.model.network import (
    Objective,
    distort,
    dropout_factors,
    make_network,
    prepare_images,
)
from mnistsum_ray.model.optimizer import MuonAdamW, one_cycle
from mnistsum_ray.reporting.console import UPDATE_SECONDS
from mnistsum_ray.training.worker import Worker

Batch = dict[str, Tensor]
"""image uint8[n, 28, 28], digit, number and row_id int64[n] and, with --distortion, affine
float32[n, AFFINE_VALUES]; all on the worker's device."""

_CHECK_STEPS: Final = 16
_CHECK_ROWS: Final = 8192
"""Most steps and rows between checks of the loss. Each waits for the device; 8,192 rows take a CPU
some seconds."""

_CURVE_POINTS: Final = 100
"""Maximum number of losses of an epoch in history.jsonl."""

_NO_ROWS: Final = pa.schema(
    [("image", IMAGE_TYPE), *((name, pa.int64()) for name in ("digit", "number", "row_id"))]
).empty_table()


class TrainingBatches:
    """The rows of one rank, in the order of the steps, from its dataset (pipeline.py)."""

    def __init__(self, shard: ray.data.DataIterator, device: torch.device) -> None:
        self._tables = iter(
            shard.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1)
        )
        self._device = device
        self._rows = _to_batch(_NO_ROWS, device)
        self._start = 0

    def take(self, count: int) -> Batch:
        """The next rows; fewer where the pipeline has lost some, which the epoch's count shows.

        A table holds the rows of whole steps, so no step needs two.
        """
        if count and self._start == len(self._rows["row_id"]):
            self._rows = _to_batch(next(self._tables, _NO_ROWS), self._device)
            self._start = 0
        start = self._start
        self._start = min(start + count, len(self._rows["row_id"]))
        return {name: values[start : self._start] for name, values in self._rows.items()}


def _to_batch(table: pa.Table, device: torch.device) -> Batch:
    columns = {"image": pixels_view(one_chunk(table["image"]))}
    columns |= {name: table[name].to_numpy() for name in ("digit", "number", "row_id")}
    if "affine" in table.column_names:
        values = one_chunk(table["affine"]).flatten().to_numpy()
        columns["affine"] = values.reshape(-1, AFFINE_VALUES)
    return {name: array_to_device(values, device) for name, values in columns.items()}


class EpochCounter:
    """Loss, rows and row ids of an epoch, kept on the device, and now and then summed over all."""

    def __init__(self, device: torch.device) -> None:
        self.rows = 0
        """Rows of all workers up to the last `all_reduce`; `loss` in nats and `row_ids` are sums
        over them."""
        self.loss = 0.0
        self.row_ids = 0
        self._own_rows = 0
        self._own_loss = torch.zeros(1, dtype=torch.float64, device=device)
        self._own_row_ids = torch.zeros(1, dtype=torch.int64, device=device)

    def add(self, batch: Batch, loss: Tensor) -> None:
        """Add a step: its batch and the sum of its rows' losses."""
        self._own_loss += loss
        self._own_row_ids += mix_ids(batch["row_id"]).sum()
        self._own_rows += len(batch["row_id"])

    def all_reduce(self) -> float:
        """Sum over all workers; return the mean loss a row since the last time."""
        rows, loss = self.rows, self.loss
        own_rows = torch.tensor([self._own_rows], device=self._own_loss.device)
        self.rows = int(all_reduce_sum(own_rows))
        self.row_ids = int(all_reduce_sum(self._own_row_ids))
        self.loss = all_reduce_sum(self._own_loss).item()
        return (self.loss - loss) / max(1, self.rows - rows)

    def check(self, order: TrainingOrder, where: str) -> None:
        """Raise RowCountError on all workers unless each row was seen once."""
        check_row_counts(self.rows, self.row_ids, len(order.ids), order.id_sum, where)


class Trainer:
    """The network, its optimizer and its DDP wrapper on one worker.

    The state of a checkpoint may be loaded into `model` and `optimizer`, on all workers alike,
    before the first step.
    """

    def __init__(self, hyperparameters: Hyperparameters, worker: Worker, precision: str) -> None:
        self.hyperparameters = hyperparameters
        self.worker = worker
        self.bf16 = precision == "bf16"
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        batch_size = hyperparameters.batch_size
        self._positions = positions_of_rank(batch_size, worker.rank, worker.world_size)
        torch.manual_seed(hyperparameters.seed)
        self.model = make_network().to(worker.device)
        if hyperparameters.dropout and self.model.dropout_shape is None:
            problem = "the network has no dropout; give --dropout 0"
            raise RequestError(f"--dropout {hyperparameters.dropout:g}: {problem}")
        self.optimizer = MuonAdamW(self.model, hyperparameters.weight_decay, dtype)
        self._objective = ray.train.torch.prepare_model(
            Objective(self.model, hyperparameters.label_smoothing, dtype),
            # See `broadcast_state`.
            parallel_strategy_kwargs={"broadcast_buffers": False, "gradient_as_bucket_view": True},
        )
        if worker.world_size > 1:
            # DDP orders its buckets anew after its first step, and three workers then sum in
            # another order, so a run that goes on would have other bits. Therefore one step now:
            # `zero_grad` drops its gradients.
            numbers = torch.zeros(len(self._positions), dtype=torch.int64, device=worker.device)
            pixels = numbers.new_zeros(len(numbers), SIDE, SIDE, dtype=torch.uint8)
            self._objective.eval()  # so that no buffer changes
            self._objective(prepare_images(pixels), numbers, numbers, None)[0].backward()

    def train_epoch(
        self, epoch: int, order: TrainingOrder, batches: TrainingBatches
    ) -> dict[str, Any]:
        """Train an epoch, counted from 0; return its figures for history.jsonl.

        `train_loss` is the mean a row, in nats; `step_losses` are pairs of a step and that of the
        last rows. A RunError says that the loss is infinite, or that rows were lost or repeated.
        """
        parameters = self.hyperparameters
        steps = order.steps
        counter = EpochCounter(self.worker.device)
        curve = []
        started = reported = time.perf_counter()
        check_steps = max(1, min(_CHECK_STEPS, _CHECK_ROWS // parameters.batch_size))
        for step in range(steps):
            rows = order.batch_rows(step)
            # The last batch may end before the positions of this worker do.
            own_rows = min(self._positions.stop, rows) - self._positions.start
            batch = batches.take(max(0, own_rows))
            step_of_run = epoch * steps + step
            rate = one_cycle(step_of_run, steps * parameters.epochs, parameters.learning_rate)
            loss = self._step(batch, epoch, step, rows, rate)
            counter.add(batch, loss)
            last = step == steps - 1
            if not last and (step + 1) % check_steps:
                continue
            curve.append((step + 1, counter.all_reduce()))
            where = f"epoch {epoch + 1}, step {step + 1} of {steps}: the loss is"
            self.check_finite(counter.loss, where)
            now = time.perf_counter()
            if last or now - reported >= UPDATE_SECONDS:
                reported = now
                self.worker.send(
                    "progress",
                    epoch=epoch + 1,
                    epochs=parameters.epochs,
                    rows=counter.rows,
                    of_rows=len(order.ids),
                    rows_per_second=counter.rows / (now - started),
                    loss=counter.loss / counter.rows,
                )
        seconds = time.perf_counter() - started
        counter.check(order, f"training epoch {epoch + 1}")
        every = -(-len(curve) // _CURVE_POINTS)
        first = (len(curve) - 1) % every  # so that the last loss is kept
        return {
            "train_loss": counter.loss / counter.rows,
            "step_losses": curve[first::every],
            "rows_per_second": counter.rows / seconds,
            "seconds": seconds,
        }

    def _step(
        self, batch: Batch, epoch: int, step: int, global_rows: int, learning_rate: float
    ) -> Tensor:
        """Update the parameters with this worker's share of a global batch of so many rows.

        Returns the mean of all heads' losses, without label smoothing, summed over this worker's
        rows.
        """
        self.optimizer.zero_grad()
        images = prepare_images(batch["image"])
        if "affine" in batch:
            images = distort(images, batch["affine"])
        # A last share may have one row or none, of which batch normalization has no statistics.
        self._objective.train(len(images) > 1)
        dropout = self.dropout(epoch, step, global_rows)
        reported: Tensor
        loss, reported = self._objective(images, batch["number"], batch["digit"], dropout)
        # DDP averages over workers, whose shares differ by a row: this makes it the mean over the
        # rows of the global batch.
        (loss * (self.worker.world_size / global_rows)).backward()
        self.optimizer.set_learning_rate(learning_rate)
        self.optimizer.step()
        return reported

    def dropout(self, epoch: int, step: int, rows: int) -> Tensor | None:
        """Dropout of this worker's rows of the global batch of so many rows.

        That of the batch is the same for any number of workers.
        """
        shape = self.model.dropout_shape
        if not self.hyperparameters.dropout or shape is None:
            return None
        seed = step_seed(self.hyperparameters.seed, epoch, step, RandomStream.DROPOUT)
        generator = torch.Generator(self.worker.device).manual_seed(seed)
        factors = dropout_factors(rows, shape, self.hyperparameters.dropout, generator)
        return factors[self._positions.start : self._positions.stop]

    def check_finite(self, loss: float, where: str) -> None:
        """Raise RunError unless the loss is finite."""
        if not math.isfinite(loss):
            rate = f"now {self.hyperparameters.learning_rate:g}"
            raise RunError(f"{where} {loss}; lower --learning-rate ({rate})")
