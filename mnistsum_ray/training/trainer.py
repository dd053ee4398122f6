"""Per-worker training loop: train, evaluate and checkpoint each epoch; then fine-tune the sum head and analyse the model."""

import contextlib
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import ray
import ray.exceptions
import ray.train
import ray.train.torch
import torch
from ray.data.dataset import MaterializedDataset
from ray.util.queue import Queue
from torch import Tensor

from mnistsum_ray.config import Hyperparameters
from mnistsum_ray.data.decoding import Pixels
from mnistsum_ray.data.sampling import NUMBERS, RandomStream, RowIds, check_row_counts, step_seed
from mnistsum_ray.errors import RowCountError
from mnistsum_ray.model import quantization, sum_head
from mnistsum_ray.model.augmentation import distort
from mnistsum_ray.model.device import disable_tf32, enable_determinism, faster_with_bf16, hardware, tune_malloc
from mnistsum_ray.model.distributed import all_reduce_sum, broadcast_parameters
from mnistsum_ray.model.error_analysis import TEMPERATURE_ROWS, ErrorAnalysis, analyse_errors, fit_temperatures
from mnistsum_ray.model.evaluation import MetricAccumulator, Metrics, within_one_standard_error
from mnistsum_ray.model.loss import Objective, dropout_factors
from mnistsum_ray.model.network import TwoHeadCNN, prepare_images
from mnistsum_ray.model.optimizer import MuonAdamW, one_cycle
from mnistsum_ray.model.serialization import copy_weights
from mnistsum_ray.reporting.progress import PROGRESS_INTERVAL_SECONDS, Progress
from mnistsum_ray.storage.lock import Fence
from mnistsum_ray.training import pipeline
from mnistsum_ray.training.gather import Gather
from mnistsum_ray.training.pipeline import Batch
from mnistsum_ray.training.schedule import Schedule
from mnistsum_ray.training.state import CheckpointError, EpochProgress, SumHeadResult, TrainerState, load_state, save_checkpoint
from mnistsum_ray.training.worker import set_cpu_threads

_CHECK_STEPS: Final = 16
"""Steps between two looks at the loss: a look waits for the device."""

_DRAIN_LOOK_SECONDS: Final = 2.0
"""Between two questions whether a worker's node is about to be taken away: each waits for the slowest worker."""

_DRAIN_SAVE_SECONDS: Final = 10.0
"""Between two checkpoints while one is: what is trained after the last is trained again elsewhere."""


@dataclass(frozen=True)
class LoopConfig:
    """What the workers are told, all decided beforehand."""

    hyperparameters: Hyperparameters
    train: RowIds
    validation: RowIds
    test: RowIds
    events: Queue
    """Where rank 0 says how far it is."""
    start: ray.train.Checkpoint | None
    """What a resumed run goes on from; None begins anew."""
    fence: Fence


@dataclass(frozen=True)
class TrainingResult:
    """What a finished training has to tell the driver."""

    history: list[dict[str, Any]]
    examination: ErrorAnalysis
    """Of the best model on the test rows."""
    mistaken: Pixels
    """The images of its mistakes, in their order: uint8[n, 28, 28]."""
    card: dict[str, Any]
    """What model.json gets beside what every checkpoint's has: see `keep.FOUND_AT_THE_END`."""
    hardware: dict[str, Any]
    precision: str


class NonFiniteLossError(ArithmeticError):
    """The loss is infinite or not a number: going on is pointless, and so is trying again."""


def train_loop_per_worker(config: dict[str, LoopConfig]) -> dict[str, Any]:
    """Train; what rank 0 returns reaches the driver: an `TrainingResult`'s fields, or an `error` that another attempt would not mend."""
    try:
        trainer = Trainer(config["loop"])
        trainer.run()
        trainer.finetune_sum_head()
        return vars(trainer.examined()) if trainer.rank == 0 else {}
    except (NonFiniteLossError, RowCountError, CheckpointError) as error:
        # Every rank comes here, since all see the same reduced numbers and checkpoint. Raised, it would be repeated by Ray Train.
        print(f"stopped on this rank: {error}", flush=True)
        return {"error": str(error)}


class Trainer:
    def __init__(self, config: LoopConfig) -> None:
        context = ray.train.get_context()
        self.config, self.hyperparameters = config, config.hyperparameters
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        disable_tf32()
        if self.device.type == "cpu":
            set_cpu_threads(context.get_local_world_size())
            enable_determinism()
            tune_malloc()
        pipeline.configure_ray_data()
        torch.manual_seed(config.hyperparameters.seed)
        self.model = TwoHeadCNN().to(self.device)
        self.optimizer = MuonAdamW(self.model, config.hyperparameters.weight_decay)
        self.state = self._restore()
        self.parallel = self.compiled = ray.train.torch.prepare_model(
            Objective(self.model, config.hyperparameters.label_smoothing)
        )
        if config.hyperparameters.compile:
            # A step of so small a network is bound by the launches of its kernels; a CUDA graph launches them all at once.
            mode = "reduce-overhead" if self.device.type == "cuda" else "default"
            self.compiled = torch.compile(self.parallel, mode=mode, dynamic=False)
        # With a dataset that is not split, every worker sees all blocks; which rows it takes is arithmetic (Schedule).
        self.images = cast(MaterializedDataset, ray.train.get_dataset_shard("images").materialize())
        self.next_drain_look = 0.0
        self.validation = self._held_out(config.validation)
        self.test = self._held_out(config.test)

    def _restore(self) -> TrainerState:
        last = ray.train.get_checkpoint() or self.config.start
        if last is None:
            precision = self.hyperparameters.precision or ("bf16" if self._agreed(faster_with_bf16(self.device)) else "fp32")
            return TrainerState(0, [], copy_weights(self.model), precision)
        with last.as_directory() as folder:
            try:
                state = load_state(Path(folder), self.model, self.optimizer)
            except CheckpointError as error:
                said = f"checkpoint {last.path} cannot be used: {error}; train anew under another --name"
                raise CheckpointError(said) from error
        inside = f", step {state.progress.steps} of the next" if state.progress.steps else ""
        self._say(kind="note", text=f"going on after epoch {state.epochs_done}{inside}, on {self.world_size} workers")
        return state

    def _agreed(self, value: bool) -> bool:
        """True where it is true on every worker, so that all do the same."""
        return bool(all_reduce_sum(torch.tensor(float(value), device=self.device)).item() == self.world_size)

    def _held_out(self, rows: RowIds) -> list[Batch]:
        return pipeline.evaluation_batches(self.images, rows, self.rank, self.world_size, self.device)

    def run(self) -> None:
        """Train what is left of the epochs."""
        schedule = Schedule(
            row_ids=self.config.train,
            batch_size=self.hyperparameters.batch_size,
            seed=self.hyperparameters.seed,
            max_shift=self.hyperparameters.max_shift,
            distortion=self.hyperparameters.distortion,
            first_epoch=self.state.epochs_done,
            first_step=self.state.progress.steps,
            epochs=self.hyperparameters.epochs,
            rank=self.rank,
            world_size=self.world_size,
        )
        batches = pipeline.training_batches(self.images, schedule, self.device)
        for epoch in range(schedule.first_epoch, schedule.epochs):
            trained = self._train_epoch(epoch, schedule, batches)
            broadcast_parameters(self.model.parameters())
            before = time.perf_counter()
            validation = self._evaluate(self.validation, self.config.validation)
            test = self._evaluate(self.test, self.config.test)
            trained["evaluation_seconds"] = time.perf_counter() - before
            self._save(epoch, trained, validation, test)

    def finetune_sum_head(self) -> None:
        """Fine-tune the best model's sum head, unless that is done; it is undone if the two heads then agree less."""
        steps = self.hyperparameters.sum_head_steps
        if not steps or self.state.sum_head is not None:
            return
        self._say(kind="note", text=f"fine-tuning the sum head, {steps:,} steps")
        self.model.load_state_dict(self.state.best)
        before = self._agreement()
        if self.rank == 0:
            seed = step_seed(self.hyperparameters.seed, self.hyperparameters.epochs, 0, RandomStream.SUM_HEAD)
            seen = self._waiting("fine-tuning steps", steps)
            sum_head.finetune_sum_head(self.model, self._digit_scores_to_tune_on(), steps, seed, seen)
        broadcast_parameters(self.model.parameters())
        after = self._agreement()
        validation = self._evaluate(self.validation, self.config.validation)
        test = self._evaluate(self.test, self.config.test)
        kept = after >= before
        self.state.sum_head = SumHeadResult(steps, kept, (before, after), validation, test)
        if kept:
            self.state.best = copy_weights(self.model)
        else:
            self.model.load_state_dict(self.state.best)
        undone = "" if kept else "; undone"
        self._say(kind="note", text=f"validation sums equal to digit + number: {before:.3%} before, {after:.3%} after{undone}")
        self._report({"epoch": self.state.epochs_done, "sum_head": steps}, f"epoch_{self.state.epochs_done:05d}_sum_head")

    @torch.no_grad()
    def _agreement(self) -> float:
        """Share of the validation rows, each with all ten numbers, whose sum is the number and the digit as it was answered."""
        agree = torch.zeros(1, dtype=torch.int64, device=self.device)
        for batch in self.validation:
            with self._autocast():
                digit_scores = self.model.digit_scores(prepare_images(batch["image"])).float()
            sums = self.model.sum_scores_of_all_numbers(digit_scores).argmax(2)
            agree += (sums == digit_scores.argmax(1)[:, None] + torch.arange(NUMBERS, device=self.device)).sum()
        return float(all_reduce_sum(agree).item() / (NUMBERS * len(self.config.validation)))

    @torch.no_grad()
    def _digit_scores_to_tune_on(self) -> Tensor:
        scores = []
        for batch in pipeline.evaluation_batches(self.images, evenly_spaced(self.config.train, sum_head.ROWS), 0, 1, self.device):
            with self._autocast():
                scores.append(self.model.digit_scores(prepare_images(batch["image"])).float())
        return torch.cat(scores)

    def examined(self) -> TrainingResult:
        """The best model's temperatures, its answers on the test rows, and its calibration for int8; computed by one worker."""
        self._say(kind="note", text="analysing the best model's answers on the test rows")
        model = TwoHeadCNN().eval()
        model.load_state_dict(self.state.best)
        model.to(self.device)
        gather = Gather(self.images)
        validation = evenly_spaced(self.config.validation, TEMPERATURE_ROWS)
        model.temperatures = fit_temperatures(model, gather, validation, self._autocast())
        seen = self._waiting("test rows answered", len(self.config.test))
        found = analyse_errors(model, gather, self.config.test, self._autocast(), seen)
        images = gather(np.array([mistake.row_id for mistake in found.mistakes], np.int64))["image"]
        card = {"temperature": model.temperatures.as_json(), "probabilities": found.probability_metrics()}
        if quantization.is_available():
            set_cpu_threads(1)  # the other workers are done
            training = gather(evenly_spaced(self.config.train, quantization.CALIBRATION_ROWS))["image"]
            test = gather(evenly_spaced(self.config.test, quantization.COMPARED_ROWS))
            rows = [torch.as_tensor(values) for values in (training, test["image"], test["digit"])]
            seen = self._waiting("test rows answered with integers", len(test["digit"]))
            card["int8"] = quantization.quantize(model.cpu(), rows[0], rows[1], rows[2], seen).as_json()
        return TrainingResult(self.state.history, found, images, card, hardware(self.device), self.state.precision)

    def _train_epoch(self, epoch: int, schedule: Schedule, batches: Iterator[Batch]) -> dict[str, float]:
        """One pass over the training rows: mean loss a row, rows/s, and the share of the time spent waiting for data."""
        self.parallel.train()
        before_this = self.state.progress
        losses = torch.zeros(1, dtype=torch.float64, device=self.device)  # added up over this worker's rows
        seen, ids_seen = 0, torch.zeros(1, dtype=torch.int64, device=self.device)  # its rows, and their ids added up
        total_steps = schedule.steps * self.hyperparameters.epochs
        began, started = time.time(), time.perf_counter()
        reported, waited, first_batch = started, 0.0, 0.0
        for step in range(before_this.steps, schedule.steps):
            before = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - before
            first_batch = first_batch or waited
            rate = one_cycle(epoch * schedule.steps + step, total_steps, self.hyperparameters.learning_rate)
            batch_rows = schedule.batch_rows(step)
            loss = self._step(batch, self._dropout(epoch, step, batch_rows), batch_rows, rate)
            losses += loss
            seen += len(batch["row_id"])
            ids_seen += batch["row_id"].sum()
            if step % _CHECK_STEPS == _CHECK_STEPS - 1 or step == schedule.steps - 1:
                so_far, looks = self._added_up(before_this, step + 1, losses, seen, ids_seen)
                if not math.isfinite(so_far.loss):
                    raise NonFiniteLossError(
                        f"epoch {epoch + 1}, step {step + 1} of {schedule.steps}: the loss is {so_far.loss}; lower "
                        f"--learning-rate (now {self.hyperparameters.learning_rate:g})"
                    )
                now = time.perf_counter()
                if now - reported >= PROGRESS_INTERVAL_SECONDS:
                    reported = now
                    self._say(
                        kind="progress",
                        epoch=epoch + 1,
                        epochs=self.hyperparameters.epochs,
                        rows=so_far.rows,
                        of_rows=len(self.config.train),
                        rows_per_second=(so_far.rows - before_this.rows) / (now - started),
                        loss=so_far.loss / so_far.rows,
                    )
                if looks and step < schedule.steps - 1:
                    self._save_if_draining(so_far)
        seconds = time.perf_counter() - started
        expected = len(self.config.train), int(self.config.train.sum())
        check_row_counts(so_far.rows, so_far.row_ids, *expected, f"training epoch {epoch + 1}")
        return {
            "train_loss": so_far.loss / so_far.rows,
            "rows_per_second": (so_far.rows - before_this.rows) / seconds,
            "started": began,
            "seconds": seconds,
            "first_batch_seconds": first_batch,
            "waiting": waited / seconds,
            "learning_rate": rate,
        }

    def _added_up(
        self, before: EpochProgress, steps: int, losses: Tensor, rows: int, row_ids: Tensor
    ) -> tuple[EpochProgress, bool]:
        """What all workers have done of the epoch, and whether to look for a drain now: one rank's clock decides for all."""
        look = self.rank == 0 and time.perf_counter() >= self.next_drain_look
        added = all_reduce_sum(torch.cat([row_ids, torch.tensor([rows, int(look)], device=self.device)]))
        all_ids, all_rows, looks = added.tolist()
        loss = before.loss + all_reduce_sum(losses).item()
        return EpochProgress(steps, loss, before.rows + all_rows, before.row_ids + all_ids), bool(looks)

    def _dropout(self, epoch: int, step: int, rows: int) -> Tensor | None:
        """This worker's share of what is drawn for the whole global batch, so that it is the same for any number of workers."""
        if not self.hyperparameters.dropout:
            return None
        seed = step_seed(self.hyperparameters.seed, epoch, step, RandomStream.DROPOUT)
        drawn = dropout_factors(rows, self.hyperparameters.dropout, torch.Generator(self.device).manual_seed(seed))
        return drawn[self.rank :: self.world_size]

    def _step(self, batch: Batch, dropout: Tensor | None, global_rows: int, learning_rate: float) -> Tensor:
        """One optimizer step; the mean of both heads' losses added up over this worker's rows."""
        self.optimizer.zero_grad()
        images = prepare_images(batch["image"])
        if "draws" in batch:
            images = distort(images, batch["draws"], self.hyperparameters.distortion)
        # The last share of an epoch is smaller, at times empty; compiled for any size, the network would compute other bits.
        whole = len(images) == len(range(self.rank, self.hyperparameters.batch_size, self.world_size))
        objective = self.compiled if whole else self.parallel
        with self._autocast():
            loss, reported = objective(images, batch["number"], batch["digit"], dropout)
            assert isinstance(reported, Tensor)
        # DDP averages over the workers, whose shares differ by a row: this makes it the mean over the rows of the global batch.
        (loss * (self.world_size / global_rows)).backward()
        self.optimizer.step(learning_rate)
        return reported

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.state.precision == "bf16")

    @torch.no_grad()
    def _evaluate(self, batches: list[Batch], rows: RowIds) -> Metrics:
        """Score the held-out rows with all ten numbers; every row once over all workers, or an error."""
        self.model.eval()
        tally = MetricAccumulator(self.device)
        seen = self._waiting("rows evaluated", len(rows))
        for batch in batches:
            with self._autocast():
                digit_scores = self.model.digit_scores(prepare_images(batch["image"]))
            tally.add(self.model, digit_scores, batch["digit"], batch["row_id"])
            seen(len(batch["row_id"]) * self.world_size)  # about: the others are as far
        scores = tally.scores(len(rows), int(rows.sum()))
        if not math.isfinite(scores.loss):
            raise NonFiniteLossError(
                f"epoch {self.state.epochs_done + 1}: the loss on held-out rows is {scores.loss}; lower --learning-rate "
                f"(now {self.hyperparameters.learning_rate:g})"
            )
        return scores

    def _save(self, epoch: int, trained: dict[str, float], validation: Metrics, test: Metrics) -> None:
        entry: dict[str, Any] = {"epoch": epoch + 1, **trained, "validation": asdict(validation), "test": asdict(test)}
        earlier = [line["validation"]["sum_accuracy"] for line in self.state.history]
        entry["best"] = within_one_standard_error(validation.sum_accuracy, earlier, validation.rows)
        self.state.history.append(entry)
        self.state.epochs_done, self.state.progress = epoch + 1, EpochProgress()
        if entry["best"]:
            self.state.best = copy_weights(self.model)
        self._say(kind="epoch", **entry)
        self._report(entry, f"epoch_{epoch + 1:05d}")

    def _save_if_draining(self, progress: EpochProgress) -> None:
        """Save within an epoch if the node of any worker is to be taken away; every rank comes here at the same step."""
        draining = ray.train.get_preemption_info()
        self.next_drain_look = time.perf_counter() + (_DRAIN_SAVE_SECONDS if draining else _DRAIN_LOOK_SECONDS)
        if draining:
            self.state.progress = progress
            epoch = self.state.epochs_done + 1
            self._say(kind="note", text=f"a node is about to go: saving after step {progress.steps} of epoch {epoch}")
            self._report({"epoch": epoch, "step": progress.steps}, f"epoch_{epoch:05d}_step_{progress.steps:07d}")

    def _report(self, metrics: dict[str, Any], folder_name: str) -> None:
        """Hand the state, and the best model if an epoch is done, to Ray Train."""
        if self.rank != 0:
            ray.train.report(metrics, checkpoint=None)
            return
        self.config.fence.check()
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            save_checkpoint(folder, self.state, self.model, self.optimizer)
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder), checkpoint_dir_name=folder_name)

    def _waiting(self, what: str, total: int) -> Progress:
        return Progress(lambda text: self._say(kind="waiting", text=text), what, total)

    def _say(self, **event: Any) -> None:
        if self.rank == 0:
            with contextlib.suppress(ray.exceptions.RayError):  # what is shown must not decide what is trained
                self.config.events.put(event)


def evenly_spaced(rows: RowIds, most: int) -> RowIds:
    """So many of them at most, evenly over all: the first ones of a source that is sorted would all be of one digit."""
    return rows[np.linspace(0, len(rows) - 1, min(len(rows), most)).astype(np.int64)]
