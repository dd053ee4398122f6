"""Per-worker training loop: train, evaluate and checkpoint each epoch; then fine-tune the sum head, and analyse the model."""

import time
from dataclasses import dataclass
from typing import Final

import ray
import torch
import torch.distributed as dist
from ray.util.queue import Queue

from mnistsum_ray.config import Hyperparameters
from mnistsum_ray.data.order import RandomStream, RowRanges, Shuffle, step_seed
from mnistsum_ray.errors import RequestError, RowCountError, RunError, counted, percent
from mnistsum_ray.model import sum_head
from mnistsum_ray.model.device import all_reduce_sum, broadcast_state, faster_with_bf16
from mnistsum_ray.model.folder import copy_weights
from mnistsum_ray.model.metrics import Metrics, ScoredRows, score_rows
from mnistsum_ray.storage.store import Location
from mnistsum_ray.training.analysis import TrainingResult, analyse
from mnistsum_ray.training.checkpoint import TrainerState, latest_state, report_checkpoint, restore
from mnistsum_ray.training.fetch import RowData
from mnistsum_ray.training.rows import EvaluationSet, TrainingRows
from mnistsum_ray.training.trainer import Trainer
from mnistsum_ray.training.worker import Worker

_MAX_READERS: Final = 8
"""Actors that read files for one worker: each feeds some 100,000 rows/s of raw bytes, or 26,000 of PNG."""

_MAX_MEMORY_READERS: Final = 2
"""Likewise for rows in memory: each feeds some 200,000 rows/s."""


@dataclass(frozen=True)
class LoopConfig:
    """Configuration of the training loop, the same for every worker."""

    hyperparameters: Hyperparameters
    threads: int | None
    """Threads of each worker on CPUs, see `resources.choose_threads`."""
    data: "ray.ObjectRef[RowData]"
    shuffle: Shuffle
    """Order of the training rows."""
    validation: RowRanges
    test: RowRanges
    events: Queue
    """From the workers to the console."""
    start: Location | None
    """Checkpoint that `--resume` starts from; None starts from new weights."""

    def __repr__(self) -> str:  # Ray's dashboard shows it
        return repr(self.hyperparameters)


def train_loop_per_worker(config: dict[str, LoopConfig]) -> TrainingResult | None:
    """Run the training loop; the result on rank 0, which Ray Train hands to the driver."""
    worker = Worker.set_up(config["loop"].events, config["loop"].threads)
    try:
        loop = TrainingLoop(config["loop"], worker)
        loop.train()
        return loop.analyse() if worker.rank == 0 else None
    except (RunError, RequestError) as error:
        # Another attempt would fail in the same way, unless the others were lost: then sums are those of this worker.
        if worker.world_size == 1 or dist.is_initialized():
            worker.events.send("failure", text=str(error))
        raise


class TrainingLoop:
    """The run on one worker, from its last checkpoint on."""

    def __init__(self, config: LoopConfig, worker: Worker) -> None:
        self._config = config
        self._parameters = config.hyperparameters
        self._worker = worker
        self._data: RowData = ray.get(config.data)
        saved = latest_state(config.start)
        if saved:
            self._state, tensors = saved
        else:
            votes = torch.tensor(float(faster_with_bf16(worker.device)), device=worker.device)
            bf16 = all_reduce_sum(votes).item() == worker.world_size
            self._state = TrainerState(0, [], self._parameters.precision or ("bf16" if bf16 else "fp32"))
        worker.events.send("precision", precision=self._state.precision)
        self._trainer = Trainer(self._parameters, worker, self._state.precision)
        if saved:
            restore(tensors, self._trainer.model, self._trainer.optimizer)
            workers = counted(worker.world_size, "worker")
            worker.events.note(f"going on after epoch {self._state.epochs_done}, on {workers}")
        self._validation, self._test = (
            self._evaluation_set(rows, worker.rank, worker.world_size) for rows in (config.validation, config.test)
        )

    def train(self) -> None:
        """Train the epochs that are left, and fine-tune the sum head."""
        state = self._state
        parameters = self._parameters
        worker = self._worker
        # On CPUs the readers share the cores with the training, which takes a few thousand rows/s a core.
        cpus = worker.cpus // 4 if worker.device.type == "cpu" else worker.cpus
        most = _MAX_READERS if self._config.shuffle.streamed else _MAX_MEMORY_READERS
        batches = TrainingRows(
            self._config.data,
            self._config.shuffle,
            parameters.distortion,
            epochs=parameters.epochs,
            rank=worker.rank,
            world_size=worker.world_size,
            device=worker.device,
            readers=max(1, min(cpus, most)),
            first_epoch=state.epochs_done,
        ).batches()
        while state.epochs_done < parameters.epochs:
            line = self._trainer.train_epoch(state.epochs_done, self._config.shuffle, batches)
            broadcast_state(self._trainer.model)
            for held_out in (self._validation, self._test):
                held_out.forget_scores()
            state.epochs_done += 1
            started = time.perf_counter()
            validation, test = self._evaluate()
            line["evaluation_seconds"] = time.perf_counter() - started
            line = {"epoch": state.epochs_done, **line, "validation": validation, "test": test}
            state.history.append(line)
            worker.events.send("epoch", **line)
            self._checkpoint()
        if next(batches, None) is not None:
            raise RowCountError("there are more batches than steps")
        if parameters.sum_head_steps and state.sum_head is None:
            self._finetune(parameters.sum_head_steps)

    def _checkpoint(self) -> None:
        trainer = self._trainer
        report_checkpoint(self._state, trainer.model, trainer.optimizer, self._worker.rank)

    def _evaluate(self) -> tuple[Metrics, Metrics]:
        """Metrics on the validation and on the test rows, after `epochs_done`."""
        validation, test = (self._trainer.evaluate(rows, self._state.epochs_done) for rows in (self._validation, self._test))
        return validation, test

    def _finetune(self, steps: int) -> None:
        """Fine-tune the sum head of the last epoch's model on the digit scores of training rows, and save a checkpoint.

        The result is undone if the heads then agree on fewer validation pairs. Rank 0 trains, and the others take its weights.
        """
        state = self._state
        model = self._trainer.model
        events = self._worker.events
        events.note(f"fine-tuning the sum head, {steps:,} steps")
        weights = copy_weights(model)
        model.eval()
        before = state.history[-1]["validation"]["consistency"]
        if self._worker.rank == 0:
            rows = self._evaluation_set(self._config.shuffle.rows.sample(sum_head.MAX_ROWS))
            scores = torch.cat([digit_scores.float() for _, digit_scores in rows.with_digit_scores()])
            seed = step_seed(self._parameters.seed, self._parameters.epochs, 0, RandomStream.SUM_HEAD)
            threads = torch.get_num_threads()
            torch.set_num_threads(1)  # two take nearly twice as long for steps as small as these
            sum_head.finetune_sum_head(model, scores, steps, seed, events.progress("fine-tuning steps", steps))
            torch.set_num_threads(threads)
        broadcast_state(model)
        validation, test = self._evaluate()
        after = validation["consistency"]
        kept = after >= before
        state.sum_head = {"steps": steps, "kept": kept, "validation": validation, "test": test}
        if not kept:
            model.load_state_dict(weights)
        undone = "" if kept else "; undone"
        events.note(f"validation sums equal to digit + number: {percent(before)} before, {percent(after)} after{undone}")
        self._checkpoint()

    def analyse(self) -> TrainingResult:
        """Analyse the model, on this worker alone."""
        config, model = self._config, self._trainer.model
        splits = (config.shuffle.rows, config.validation, config.test)

        def scored(rows: RowRanges) -> ScoredRows:
            held_out = next((mine for mine in (self._validation, self._test) if mine.rows is rows), None)
            if held_out is None or self._worker.world_size > 1:
                held_out = self._evaluation_set(rows)
            return score_rows(model, held_out.with_digit_scores())

        return analyse(model, self._state, self._worker, self._data, scored, *splits)

    def _evaluation_set(self, rows: RowRanges, rank: int = 0, world_size: int = 1) -> EvaluationSet:
        """Held-out rows of a rank; by default all of them."""
        return EvaluationSet(self._data, rows, rank, world_size, self._worker.device, self._trainer.digit_scores)
