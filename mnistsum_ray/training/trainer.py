"""Training of one worker: a step, an epoch over the rank's rows, and the evaluation after it."""

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Final

import ray.train.torch
import torch
from torch import Tensor

from mnistsum_ray.config import Hyperparameters
from mnistsum_ray.data.images import SIDE
from mnistsum_ray.data.order import RandomStream, Shuffle, check_row_counts, positions_of_rank, step_seed
from mnistsum_ray.errors import RequestError, RunError
from mnistsum_ray.model.device import all_reduce_sum
from mnistsum_ray.model.metrics import AnswerCounts, Metrics, score_rows
from mnistsum_ray.model.network import Objective, distort, dropout_factors, make_network, prepare_images
from mnistsum_ray.model.optimizer import MuonAdamW, one_cycle
from mnistsum_ray.reporting.console import UPDATE_SECONDS
from mnistsum_ray.training.checkpoint import Checkpointer, EpochProgress, TrainerState
from mnistsum_ray.training.rows import Batch, EvaluationSet
from mnistsum_ray.training.worker import Worker

_CHECK_STEPS: Final = 16
"""Most steps between checks of the loss, the row counts and the age of the checkpoint; each check waits for the device."""
_CHECK_ROWS: Final = 8192
"""Most rows between checks, but at least a step: some seconds on CPUs."""

_CURVE_POINTS: Final = 100
"""Maximum number of losses of an epoch in history.jsonl."""


class EpochCounter:
    """Loss, rows, row ids and checksums of an epoch, kept on the device and summed over the workers now and then.

    Rank 0 also counts the steps that a checkpoint holds, `before`. For streamed rows `end_ids` int64[files] are the row ids after
    the last row of each file.
    """

    def __init__(self, before: EpochProgress, steps: int, worker: Worker, end_ids: Tensor | None = None) -> None:
        held = before if worker.rank == 0 else EpochProgress()
        self._steps = steps
        self._points = list(before.points)
        self._rows = held.rows
        self._loss = torch.tensor([held.loss], dtype=torch.float64, device=worker.device)
        self._row_ids = torch.tensor([held.row_ids], device=worker.device)
        self._end_ids = torch.empty(0, dtype=torch.int64) if end_ids is None else end_ids.to(worker.device)
        checksums = torch.zeros_like(self._end_ids) if held.checksums is None else held.checksums.clone()
        self._checksums = checksums.to(worker.device)

    def add(self, batch: Batch, loss: Tensor) -> None:
        """Add a step: its batch and the sum of its rows' losses."""
        self._loss += loss
        self._row_ids += batch["mixed_id"].sum()
        self._rows += len(batch["mixed_id"])
        if len(self._end_ids):
            file = torch.searchsorted(self._end_ids, batch["row_id"], right=True)
            self._checksums.index_add_(0, file, batch["checksum"])

    def checksums(self) -> Tensor | None:
        """Checksums of each file's rows over all workers; None for rows in memory."""
        return all_reduce_sum(self._checksums).cpu() if len(self._end_ids) else None

    def all_reduce(self, steps: int, flag: bool) -> tuple[EpochProgress, bool]:
        """Sum over all workers, after so many steps; true if any worker's flag is true."""
        rows_and_flag = torch.tensor([self._rows, int(flag)], device=self._row_ids.device)
        row_ids, rows, flags = all_reduce_sum(torch.cat([self._row_ids, rows_and_flag])).tolist()
        loss = all_reduce_sum(self._loss).item()
        if steps == self._steps or steps * _CURVE_POINTS >= (len(self._points) + 1) * self._steps:
            self._points.append((steps, rows, loss))
        return EpochProgress(steps, loss, rows, row_ids, list(self._points)), bool(flags)


class Trainer:
    """The network, its optimizer and its DDP wrapper on one worker.

    The state of a checkpoint may be loaded into `model` and `optimizer`, on all workers alike, before the first step.
    """

    def __init__(self, hyperparameters: Hyperparameters, worker: Worker, precision: str) -> None:
        self.hyperparameters = hyperparameters
        self.worker = worker
        self._dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self._positions = positions_of_rank(hyperparameters.batch_size, worker.rank, worker.world_size)
        torch.manual_seed(hyperparameters.seed)
        self.model = make_network().to(worker.device)
        if hyperparameters.dropout and self.model.dropout_shape is None:
            raise RequestError(f"--dropout {hyperparameters.dropout:g}: the network has no dropout; give --dropout 0")
        self.optimizer = MuonAdamW(self.model, hyperparameters.weight_decay, self._dtype)
        self._objective = ray.train.torch.prepare_model(
            Objective(self.model, hyperparameters.label_smoothing, self._dtype),
            # See `broadcast_state`.
            parallel_strategy_kwargs={"broadcast_buffers": False, "gradient_as_bucket_view": True},
        )
        if worker.world_size > 1:
            # DDP orders its buckets anew after the first step, and three workers then sum in
            # another order: without a step beforehand, whose gradients the next one drops, a run
            # that goes on would have other bits.
            numbers = torch.zeros(len(self._positions), dtype=torch.int64, device=worker.device)
            pixels = numbers.new_zeros(len(numbers), SIDE, SIDE, dtype=torch.uint8)
            self._objective.eval()  # so that no buffer changes
            self._objective(prepare_images(pixels), numbers, numbers, None)[0].backward()

    def train_epoch(
        self,
        state: TrainerState,
        shuffle: Shuffle,
        batches: Iterator[Batch],
        end_ids: Tensor | None,
        checkpointer: Checkpointer,
    ) -> tuple[dict[str, Any], Tensor | None]:
        """Train the rest of the epoch after `state` on batches of the rank's rows; `end_ids` as for `EpochCounter`.

        Returns:
            Figures for history.jsonl: mean `train_loss` a row in nats, `step_losses` (see `EpochProgress`), `rows_per_second`,
            `started` in seconds since 1970, `seconds` since then, `seconds_before` of the steps that a checkpoint holds,
            `first_batch_seconds`, `waiting` (fraction of the time without data), and the last `learning_rate`; and, for streamed
            rows, the checksums of the rows of each file, int64[files].

        Raises:
            RunError: the loss is infinite or not a number.
            RowCountError: a row was lost or repeated.
        """
        parameters = self.hyperparameters
        epoch = state.epochs_done
        before = state.progress
        steps = shuffle.steps
        counter = EpochCounter(before, steps, self.worker, end_ids)
        started = time.time()
        begun = reported = time.perf_counter()
        waited = first_batch = rate = 0.0
        check_steps = max(1, min(_CHECK_STEPS, _CHECK_ROWS // parameters.batch_size))
        for step in range(before.steps, steps):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            first_batch = first_batch or waited
            rate = one_cycle(epoch * steps + step, steps * parameters.epochs, parameters.learning_rate)
            counter.add(batch, self._step(batch, epoch, step, shuffle.batch_rows(step), rate))
            last = step == steps - 1
            if last or (step + 1) % check_steps == 0:
                progress, checkpoint_due = counter.all_reduce(step + 1, checkpointer.due())
                self._check_finite(progress.loss, f"epoch {epoch + 1}, step {step + 1} of {steps}: the loss is")
                now = time.perf_counter()
                if last or now - reported >= UPDATE_SECONDS:
                    reported = now
                    self.worker.events.send(
                        "progress",
                        epoch=epoch + 1,
                        epochs=parameters.epochs,
                        rows=progress.rows,
                        of_rows=len(shuffle.rows),
                        rows_per_second=(progress.rows - before.rows) / (now - begun),
                        loss=progress.loss / progress.rows,
                        seconds=now - begun,
                    )
                if checkpoint_due and not last:
                    progress = replace(progress, checksums=counter.checksums(), seconds=before.seconds + now - begun)
                    checkpointer.save(replace(state, progress=progress))
        seconds = time.perf_counter() - begun
        check_row_counts(progress.rows, progress.row_ids, len(shuffle.rows), shuffle.rows.id_sum, f"training epoch {epoch + 1}")
        figures = {
            "train_loss": progress.loss / progress.rows,
            "step_losses": progress.step_losses(),
            "rows_per_second": (progress.rows - before.rows) / seconds,
            "started": started,
            "seconds": seconds,
            "seconds_before": before.seconds,
            "first_batch_seconds": first_batch,
            "waiting": waited / seconds,
            "learning_rate": rate,
        }
        return figures, counter.checksums()

    def _step(self, batch: Batch, epoch: int, step: int, global_rows: int, learning_rate: float) -> Tensor:
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
        loss, reported = self._objective(images, batch["number"], batch["digit"], dropout)
        assert isinstance(reported, Tensor)
        # DDP averages over workers, whose shares differ by a row: this makes it the mean over the
        # rows of the global batch.
        (loss * (self.worker.world_size / global_rows)).backward()
        self.optimizer.set_learning_rate(learning_rate)
        self.optimizer.step()
        return reported

    def dropout(self, epoch: int, step: int, rows: int) -> Tensor | None:
        """Dropout of this worker's rows of the global batch of so many rows; that of the batch is the same for any workers."""
        shape = self.model.dropout_shape
        if not self.hyperparameters.dropout or shape is None:
            return None
        seed = step_seed(self.hyperparameters.seed, epoch, step, RandomStream.DROPOUT)
        generator = torch.Generator(self.worker.device).manual_seed(seed)
        factors = dropout_factors(rows, shape, self.hyperparameters.dropout, generator)
        return factors[self._positions.start : self._positions.stop]

    def evaluate(self, held_out: EvaluationSet, epoch: int) -> Metrics:
        """Metrics on held-out rows, with all numbers; each row is counted once over all workers.

        Raises:
            RunError: the loss is infinite or not a number; the message has the number of the epoch, from 1.
            RowCountError: a row was lost or repeated.
        """
        self.model.eval()
        rows = held_out.rows
        counts = AnswerCounts(self.worker.device)
        on_progress = self.worker.events.progress("rows evaluated", len(rows))
        for batch, scores in score_rows(self.model, held_out.with_digit_scores()):
            counts.add(batch, scores)
            on_progress(len(batch["row_id"]) * self.worker.world_size)  # an estimate: the other workers are about as far
        metrics = counts.metrics(len(rows), rows.id_sum)
        self._check_finite(metrics["loss"], f"epoch {epoch}: the loss on held-out rows is")
        return metrics

    @torch.no_grad()
    def digit_scores(self, images: Tensor) -> Tensor:
        """Digit scores [n, 10], in the run's precision, of undistorted images uint8[n, 28, 28]."""
        with torch.autocast(self.worker.device.type, torch.bfloat16, enabled=self._dtype == torch.bfloat16):
            return self.model.digit_scores(prepare_images(images))

    def _check_finite(self, loss: float, where: str) -> None:
        if not math.isfinite(loss):
            raise RunError(f"{where} {loss}; lower --learning-rate (now {self.hyperparameters.learning_rate:g})")
