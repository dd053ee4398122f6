"""A worker's part in an epoch: its rows in batches, the steps, and the count of all rows."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil, isfinite
from typing import Any, Final

import numpy as np
import ray.train
import ray.train.torch
import torch
from ray.data.collate_fn import NumpyBatchCollateFn
from torch import Tensor

from mnistsum_ray.config import Hyperparameters
from mnistsum_ray.data.images import SIDE
from mnistsum_ray.data.randomness import (
    Purpose,
    RowTotals,
    distortions,
    mix_ids,
    random_numbers,
    step_seed,
)
from mnistsum_ray.errors import RunError
from mnistsum_ray.model.device import all_reduce_sum
from mnistsum_ray.model.network import (
    Objective,
    distort,
    dropout_factors,
    make_network,
    prepare_images,
)
from mnistsum_ray.model.optimizer import MuonAdamW, one_cycle
from mnistsum_ray.training.progress import Events

Batch = dict[str, Tensor]
"""image uint8[n, 28, 28], digit, number and row_id int64[n] and, with --distortion, affine
float32[n, 6]."""

_SHUFFLED_ROWS: Final = 1_000_000
"""Most rows that are shuffled together. A shard of no more is shuffled as a whole. Ray holds 1.5
times as many in each worker, 1.2 GB."""

_CHECK_STEPS: Final = 20
"""Steps between two looks at the loss, each of which waits for the device and the other ranks."""

_CURVE_POINTS: Final = 100
"""Most losses of an epoch in history.jsonl."""

_NO_ROWS: Final[dict[str, np.ndarray]] = {
    "image": np.empty((0, SIDE, SIDE), np.uint8),
    "digit": np.empty(0, np.int64),
    "row_id": np.empty(0, np.int64),
}


@dataclass(frozen=True)
class EpochSteps:
    """The steps of an epoch, which follow from the rows of all shards.

    A rank takes its share of each batch until its shard is used up. Shards differ by the rows of
    a block or two, so that the last batches of an epoch may be smaller.
    """

    shards: tuple[int, ...]  # rows of each rank
    batch_size: int  # rows of a step over all ranks

    def share(self, rank: int) -> int:
        """Rows of a full batch that one rank takes; shares differ by one row."""
        ranks = len(self.shards)
        return (rank + 1) * self.batch_size // ranks - rank * self.batch_size // ranks

    @property
    def count(self) -> int:
        """Number of steps, until the last rank is done."""
        return max(ceil(rows / self.share(rank)) for rank, rows in enumerate(self.shards))

    def batch_rows(self, step: int) -> int:
        """Rows of the global batch at a step of an epoch."""
        rows = 0
        for rank, of_shard in enumerate(self.shards):
            share = self.share(rank)
            rows += min(share, max(0, of_shard - step * share))
        return rows


class ToTensors(NumpyBatchCollateFn):
    """Collates a batch of Ray Data: images, digits and row ids as tensors."""

    def __call__(self, rows: dict[str, np.ndarray]) -> Batch:
        # Copied by NumPy: in this thread of Ray Data's, PyTorch would start threads of its own,
        # which spin on the cores that the steps need.
        return {name: torch.from_numpy(rows[name].copy()) for name in ("image", "digit", "row_id")}


class PairWithNumbers(ToTensors):
    """Collates a batch of Ray Data: pairs each row with its number and distortion of an epoch.

    They follow from seed, epoch and row id, so that it does not matter which worker has the row.
    """

    def __init__(self, seed: int, epoch: int, distortion: float) -> None:
        self._seed, self._epoch, self._distortion = seed, epoch, distortion

    def __call__(self, rows: dict[str, np.ndarray]) -> Batch:
        batch, ids = super().__call__(rows), rows["row_id"]
        numbers = random_numbers(self._seed, self._epoch, ids)
        batch["number"] = torch.from_numpy(numbers.astype(np.int64))
        if self._distortion:  # the images are distorted on the device
            matrices = distortions(self._seed, self._epoch, ids, self._distortion)
            batch["affine"] = torch.from_numpy(matrices)
        return batch


class Trainer:
    """The network, its optimizer, its DDP wrapper and the training rows of one worker.

    The state of a checkpoint may be loaded into `model` and `optimizer`, on all workers alike,
    before the first step.
    """

    def __init__(
        self,
        parameters: Hyperparameters,
        totals: RowTotals,
        device: torch.device,
        precision: str,
        events: Events,
    ) -> None:
        self.parameters = parameters
        self.bf16 = precision == "bf16"
        self._totals = totals
        self._device = device
        self._events = events
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        torch.manual_seed(parameters.seed)
        self.model = make_network().to(device)
        self.optimizer = MuonAdamW(self.model, parameters.weight_decay, bf16=self.bf16)
        self._objective: Callable[..., tuple[Tensor, Tensor]] = ray.train.torch.prepare_model(
            Objective(self.model, parameters.label_smoothing, bf16=self.bf16),
            parallel_strategy_kwargs={"gradient_as_bucket_view": True},
        )
        if self.world_size > 1:
            self._take_step_without_effect()
        self._shard = ray.train.get_dataset_shard("train")
        shards = torch.zeros(self.world_size, dtype=torch.int64, device=device)
        shards[self.rank] = self._shard.materialize().count()  # no task runs: it is there
        self._steps = EpochSteps(tuple(all_reduce_sum(shards).tolist()), parameters.batch_size)

    def _take_step_without_effect(self) -> None:
        """Let DDP find its order of sums.

        It orders its buckets anew after its first step. From three workers on they would then sum
        in another order, and a run that goes on would have other bits. `zero_grad` drops the
        gradients.
        """
        numbers = torch.zeros(2, dtype=torch.int64, device=self._device)
        pixels = numbers.new_zeros(len(numbers), SIDE, SIDE, dtype=torch.uint8)
        loss, _ = self._objective(prepare_images(pixels), numbers, numbers, None)
        torch.autograd.backward(loss)

    def _batches(self, epoch: int) -> Iterator[Batch]:
        """The rows of this rank on its device, in the order of an epoch."""
        parameters, share = self.parameters, self._steps.share(self.rank)
        rows = self._steps.shards[self.rank]
        seed = step_seed(parameters.seed, epoch, self.rank, Purpose.ROW_ORDER)
        return iter(
            self._shard.iter_torch_batches(
                batch_size=share,
                local_shuffle_buffer_size=max(share, min(rows, _SHUFFLED_ROWS)),
                local_shuffle_seed=seed,
                collate_fn=PairWithNumbers(parameters.seed, epoch, parameters.distortion),
                pin_memory=self._device.type == "cuda",
            )
        )

    def train_epoch(self, epoch: int) -> dict[str, Any]:
        """Train an epoch, counted from 0; return its figures for history.jsonl.

        `train_loss` is the mean a row, in nats; `step_losses` are pairs of a step and the mean of
        the rows in the `_CHECK_STEPS` steps or fewer up to it. A RunError says that the loss is
        infinite, or that rows were lost or repeated.
        """
        parameters, steps = self.parameters, self._steps
        batches = self._batches(epoch)
        no_rows = PairWithNumbers(parameters.seed, epoch, parameters.distortion)(_NO_ROWS)
        no_rows = {name: values.to(self._device) for name, values in no_rows.items()}
        counter = EpochCounter(self._device)
        curve = []
        started = time.perf_counter()
        for step in range(steps.count):
            batch = next(batches, no_rows)  # a rank whose shard is used up has none
            step_of_run = epoch * steps.count + step
            rate = one_cycle(step_of_run, steps.count * parameters.epochs, parameters.learning_rate)
            loss = self._step(batch, epoch, step, steps.batch_rows(step), rate)
            counter.add(batch, loss)
            done = step + 1
            if done % _CHECK_STEPS and done < steps.count:
                continue
            mean_loss = counter.all_reduce()
            curve.append((done, mean_loss))
            where = f"epoch {epoch + 1}, step {done} of {steps.count}: the loss is"
            self.check_finite(mean_loss, where)
            self._events.send(
                "progress",
                epoch=epoch + 1,
                epochs=parameters.epochs,
                rows=counter.rows,
                of_rows=self._totals.rows,
                rows_per_second=counter.rows / (time.perf_counter() - started),
                loss=counter.loss / max(1, counter.rows),
            )
        seconds = time.perf_counter() - started
        for _ in batches:  # ends its threads; a row that came here was not trained, nor counted
            pass
        counter.check(self._totals, f"training epoch {epoch + 1}")
        every = ceil(len(curve) / _CURVE_POINTS)
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

        Returns the loss without label smoothing, summed over this worker's rows.
        """
        self.optimizer.zero_grad()
        images = prepare_images(batch["image"])
        if "affine" in batch:
            images = distort(images, batch["affine"])
        dropout = self._dropout(epoch, step, len(images))
        loss, exact_loss = self._objective(images, batch["number"], batch["digit"], dropout)
        # DDP averages over workers, whose shares differ: this makes it the mean over the rows of
        # the global batch.
        torch.autograd.backward(loss * (self.world_size / global_rows))
        self.optimizer.set_learning_rate(learning_rate)
        self.optimizer.step()
        return exact_loss

    def _dropout(self, epoch: int, step: int, rows: int) -> Tensor | None:
        if not self.parameters.dropout:
            return None
        index = step * self.world_size + self.rank
        seed = step_seed(self.parameters.seed, epoch, index, Purpose.DROPOUT)
        generator = torch.Generator(self._device).manual_seed(seed)
        return dropout_factors(rows, self.parameters.dropout, generator)

    def check_finite(self, loss: float, where: str) -> None:
        if not isfinite(loss):
            rate = f"now {self.parameters.learning_rate:g}"
            raise RunError(f"{where} {loss}; lower --learning-rate ({rate})")


class EpochCounter:
    """Loss, rows and row ids of an epoch, kept on the device, and now and then summed over all."""

    def __init__(self, device: torch.device) -> None:
        self.rows = 0
        """Rows of all workers up to the last `all_reduce`; `loss`, in nats, is a sum over them."""
        self.loss = 0.0
        self._own_rows = 0
        self._own_loss = torch.zeros((), dtype=torch.float64, device=device)
        self._own_ids = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, batch: Batch, loss: Tensor) -> None:
        """Add a step: its batch and the sum of its rows' losses."""
        self._own_loss += loss
        self._own_ids += mix_ids(batch["row_id"]).sum()
        self._own_rows += len(batch["row_id"])

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
