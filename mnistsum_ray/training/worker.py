"""A worker's part in an epoch: its rows in batches, the steps, and the count of all rows."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import ceil, isfinite
from typing import Any, Final

import numpy as np
import ray.train
import ray.train.torch
import torch
from ray.data.collate_fn import NumpyBatchCollateFn
from torch import Tensor, nn

from mnistsum_ray.config import Hyperparameters
from mnistsum_ray.data.columns.base import Arrays, Column, rows_in
from mnistsum_ray.data.decoding import RowTotals
from mnistsum_ray.data.randomness import Purpose, RowRandom, seeds
from mnistsum_ray.errors import RunError, TaskError
from mnistsum_ray.model.calls import calling, forward
from mnistsum_ray.model.device import all_reduce_sum, seed_generators
from mnistsum_ray.model.schedule import one_cycle
from mnistsum_ray.task import Batch, Task
from mnistsum_ray.training.progress import Events
from mnistsum_ray.training.rows import shards_of

_SHUFFLED_BYTES: Final = 2**28
"""Most bytes of rows that are shuffled together. A shard of no more, 262,144 small rows, is
shuffled as a whole. Ray holds 1.5 times as much in each worker."""

_CHECK_STEPS: Final = 20
"""Steps between two looks at the loss, each of which waits for the device and the other ranks."""

_CURVE_POINTS: Final = 100
"""Most losses of an epoch in history.jsonl."""

_NO_ROWS: Final = 2
"""Rows of zeros, of weight 0, in the batch of a rank that has no rows left: many layers fail on a
batch of none, and some on a batch of one."""


@dataclass(frozen=True)
class EpochSteps:
    """The steps of an epoch, which follow from the rows of all shards.

    A rank takes its share of each batch until its shard is used up. Shards differ by the rows of
    a block or two, so that the last batches of an epoch may be smaller.
    """

    shards: tuple[int, ...]  # rows of each rank
    batch_size: int  # rows of a step over all ranks

    def share(self, rank: int) -> int:
        """Return rows of a full batch that one rank takes; shares differ by one row."""
        ranks = len(self.shards)
        return (rank + 1) * self.batch_size // ranks - rank * self.batch_size // ranks

    @property
    def count(self) -> int:
        """Number of steps, until the last rank is done."""
        return max(ceil(rows / self.share(rank)) for rank, rows in enumerate(self.shards))

    def batch_rows(self, step: int) -> int:
        """Return rows of the global batch at a step of an epoch."""
        rows = 0
        for rank, of_shard in enumerate(self.shards):
            share = self.share(rank)
            rows += min(share, max(0, of_shard - step * share))
        return rows


class ToTensors(NumpyBatchCollateFn):
    """Collates a batch of Ray Data: the task's columns and row ids as tensors."""

    def __init__(self, columns: Mapping[str, Column]) -> None:
        self._columns = columns

    def __call__(self, rows: Arrays) -> Batch:
        return _as_tensors(self._load(rows), rows["row_id"])

    def _load(self, rows: Arrays) -> Arrays:
        # Copied by NumPy: in this thread of Ray Data's, PyTorch would start threads of its own,
        # which spin on the cores that the steps need.
        loaded = {}
        for key, column in self._columns.items():
            values = column.load(rows[key])
            loaded[key] = values.copy() if values is rows[key] else values
        return loaded

    def zeros(self, rows: int) -> Batch:
        """Return a batch of rows of zeros."""
        arrays: Arrays = {key: column.zeros(rows) for key, column in self._columns.items()}
        return self(arrays | {"row_id": np.zeros(rows, np.int64)})


class Augment(ToTensors):
    """Collates a training batch: what the task's `augment` makes of the rows in an epoch.

    It follows from seed, epoch and row id, so that it does not matter which worker has the row.
    """

    def __init__(self, task: Task, seed: int, epoch: int) -> None:
        super().__init__(task.training_columns)
        self._task, self._seed, self._epoch = task, seed, epoch

    def __call__(self, rows: Arrays) -> Batch:
        loaded, ids = self._load(rows), rows["row_id"]
        with calling(self._task, "augment"):
            augmented = self._task.augment(loaded, RowRandom(self._seed, self._epoch, ids))
            missing = {*self._task.inputs, *self._task.labels} - {*augmented}
            for key, values in augmented.items():
                if len(values) != len(ids):
                    raise ValueError(f"{key} has {len(values)} rows, and not {len(ids)}")
        if missing:
            raise TaskError(f"task {self._task.name}: augment must return {min(missing)!r} too")
        return _as_tensors(augmented, ids)


def _as_tensors(arrays: Arrays, row_ids: np.ndarray) -> Batch:
    return {
        key: torch.from_numpy(np.ascontiguousarray(values))
        for key, values in (arrays | {"row_id": row_ids.copy()}).items()
    }


class Objective(nn.Module):
    """The network with the task's loss: what DDP wraps."""

    def __init__(self, task: Task, network: nn.Module, *, bf16: bool) -> None:
        super().__init__()
        self._task, self.network, self._bf16 = task, network, bf16

    def forward(self, batch: Batch, rows: int) -> Tensor:
        """Return the sum of the losses of the first `rows` rows."""
        outputs = forward(self._task, self.network, batch, bf16=self._bf16)
        with calling(self._task, "loss"):
            losses = self._task.loss(outputs, batch)
            if losses.shape != batch["row_id"].shape:
                wanted = f"a loss for each of {len(batch['row_id'])} rows"
                raise ValueError(f"must return {wanted}, not {list(losses.shape)}")
        return losses[:rows].sum()


class Worker:
    """A worker of a training: the network, its optimizer, its DDP wrapper and its training rows.

    All blocks of training rows have `rows_of_block` but the last.
    The state of a checkpoint may be loaded into `network` and `optimizer`, on all workers alike,
    before the first step.
    """

    def __init__(
        self,
        task: Task,
        parameters: Hyperparameters,
        totals: RowTotals,
        rows_of_block: int,
        device: torch.device,
        precision: str,
        events: Events,
    ) -> None:
        self.task = task
        self.parameters = parameters
        self.bf16 = precision == "bf16"
        self._totals = totals
        self._device = device
        self._events = events
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        torch.manual_seed(parameters.seed)
        with calling(task, "network"):
            self.network = task.network().to(device)
        with calling(task, "optimizer"):
            weight_decay = parameters.weight_decay
            self.optimizer = task.optimizer(self.network, weight_decay, bf16=self.bf16)
        self._objective: Callable[[Batch, int], Tensor] = ray.train.torch.prepare_model(
            Objective(task, self.network, bf16=self.bf16),
            parallel_strategy_kwargs={"gradient_as_bucket_view": True},
        )
        if self.world_size > 1:
            self._take_step_without_effect()
        self._shard = ray.train.get_dataset_shard("train")
        shards = shards_of(totals.rows, rows_of_block, self.world_size)
        self._steps = EpochSteps(shards, parameters.batch_size)

    def _take_step_without_effect(self) -> None:
        """Let DDP find its order of sums.

        It orders its buckets anew after its first step. From three workers on they would then sum
        in another order, and a resumed run would have other bits. `zero_grad` drops the
        gradients.
        """
        rows = self._to_device(Augment(self.task, self.parameters.seed, epoch=0).zeros(_NO_ROWS))
        torch.autograd.backward(self._objective(rows, _NO_ROWS))

    def _to_device(self, batch: Batch) -> Batch:
        return {key: values.to(self._device) for key, values in batch.items()}

    def _batches(self, epoch: int) -> Iterator[Batch]:
        """Yield the rows of this rank on its device, in the order of an epoch."""
        share, rows = self._steps.share(self.rank), self._steps.shards[self.rank]
        seed = self.parameters.seed
        (order_seed,) = seeds(seed, epoch, Purpose.ROW_ORDER, range(self.rank, self.rank + 1))
        shuffled = min(rows, rows_in(_SHUFFLED_BYTES, self.task.training_columns.values()))
        return iter(
            self._shard.iter_torch_batches(
                batch_size=share,
                local_shuffle_buffer_size=max(share, shuffled),
                local_shuffle_seed=order_seed,
                collate_fn=Augment(self.task, seed, epoch),
                pin_memory=self._device.type == "cuda",
                prefetch_batches=4 if self._device.type == "cuda" else 1,
            )
        )

    def train_epoch(self, epoch: int) -> dict[str, Any]:
        """Train an epoch, counted from 0; return its figures for history.jsonl.

        `train_loss` is the mean a row; `step_losses` are pairs of a step and the mean of
        the rows in the `_CHECK_STEPS` steps up to it, or, at the end, in fewer than twice as many.
        A RunError says that the loss is infinite, or that rows were lost or repeated.
        """
        parameters, steps = self.parameters, self._steps
        batches = self._batches(epoch)
        no_rows = self._to_device(Augment(self.task, parameters.seed, epoch).zeros(_NO_ROWS))
        indexes = range(self.rank, steps.count * self.world_size, self.world_size)
        step_seeds = seeds(parameters.seed, epoch, Purpose.STEP, indexes)
        self.network.train()
        counter = EpochCounter(self._device)
        curve = []
        started = time.perf_counter()
        for step in range(steps.count):
            batch = next(batches, None)
            rows = 0 if batch is None else len(batch["row_id"])  # 0: the shard is used up
            step_of_run = epoch * steps.count + step
            rate = one_cycle(step_of_run, steps.count * parameters.epochs, parameters.learning_rate)
            # A resumed run draws what it would have drawn, such as for nn.Dropout.
            seed_generators(self._device, step_seeds[step])
            loss = self._step(batch or no_rows, rows, steps.batch_rows(step), rate)
            if batch is not None:
                counter.add(batch["row_id"], loss)
            done = step + 1
            # The last steps belong to those before: the mean of a few alone would jump.
            steps_left = steps.count - done
            if steps_left and (done % _CHECK_STEPS or steps_left < _CHECK_STEPS):
                continue
            mean_loss = counter.all_reduce()
            curve.append((done, mean_loss))
            where = f"epoch {epoch + 1}, step {done} of {steps.count}: the loss is"
            self.check_finite(mean_loss, where)
            self._events.send(
                "progress",
                epoch=epoch + 1,
                epochs=parameters.epochs,
                step=done,
                steps=steps.count,
                rows=counter.rows,
                of_rows=self._totals.rows,
                rows_per_second=counter.rows / (time.perf_counter() - started),
                loss=counter.loss / max(1, counter.rows),
            )
        seconds = time.perf_counter() - started
        for batch in batches:  # ends its threads; a row that comes here was not planned
            counter.add(batch["row_id"], torch.zeros((), device=self._device))
        counter.check(self._totals, f"training epoch {epoch + 1}")
        every = ceil(len(curve) / _CURVE_POINTS)
        first = (len(curve) - 1) % every  # so that the last loss is kept
        return {
            "train_loss": counter.loss / counter.rows,
            "step_losses": curve[first::every],
            "rows_per_second": counter.rows / seconds,
            "seconds": seconds,
        }

    def _step(self, batch: Batch, rows: int, global_rows: int, learning_rate: float) -> Tensor:
        """Update the parameters with this worker's rows of a global batch of this many.

        Returns the loss, summed over this worker's rows.
        """
        self.optimizer.zero_grad()
        loss = self._objective(batch, rows)
        # DDP averages over workers, whose shares differ: this makes it the mean over the rows of
        # the global batch.
        torch.autograd.backward(loss * (self.world_size / global_rows))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_factor", 1.0)
        with calling(self.task, "optimizer"):
            self.optimizer.step()
        return loss.detach()

    def check_finite(self, loss: float, where: str) -> None:
        if not isfinite(loss):
            rate = f"now {self.parameters.learning_rate:g}"
            raise RunError(f"{where} {loss}; lower --learning-rate ({rate})")


class EpochCounter:
    """Loss, rows and row ids of an epoch, kept on the device, and now and then summed over all."""

    def __init__(self, device: torch.device) -> None:
        self.rows = 0
        """Rows of all workers up to the last `all_reduce`; `loss` is a sum over them."""
        self.loss = 0.0
        self._own_rows = 0
        self._own_loss = torch.zeros((), dtype=torch.float64, device=device)
        self._own_ids = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, row_ids: Tensor, loss: Tensor) -> None:
        """Add a step: the ids of its rows, and the sum of their losses."""
        self._own_loss += loss
        self._own_ids += row_ids.sum()
        self._own_rows += len(row_ids)

    def all_reduce(self) -> float:
        """Sum over all workers; return the mean loss a row since the last time, on each of them."""
        rows_before, loss_before = self.rows, self.loss
        own = torch.stack([torch.full_like(self._own_loss, self._own_rows), self._own_loss])
        rows, self.loss = all_reduce_sum(own).tolist()
        self.rows = int(rows)
        return (self.loss - loss_before) / max(1, self.rows - rows_before)

    def check(self, totals: RowTotals, where: str) -> None:
        """Raise RowCountError on all workers unless each row was seen once."""
        own = torch.stack([torch.full_like(self._own_ids, self._own_rows), self._own_ids])
        rows, id_sum = all_reduce_sum(own).tolist()
        totals.check(rows, id_sum, where)
