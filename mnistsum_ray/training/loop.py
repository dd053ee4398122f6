"""Per-worker training loop: train, evaluate and checkpoint each epoch; then fine-tune the sum head, and analyse the model."""

import time
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import ray
import torch
from ray.util.queue import Queue

from mnistsum_ray.config import Hyperparameters
from mnistsum_ray.data.images import Pixels
from mnistsum_ray.data.order import RandomStream, RowRanges, Shuffle, step_seed
from mnistsum_ray.data.sources import ParquetFiles
from mnistsum_ray.errors import RequestError, RowCountError, RunError, percent
from mnistsum_ray.model import int8, sum_head
from mnistsum_ray.model.calibration import calibrated, fit_temperatures, fold_temperatures
from mnistsum_ray.model.device import all_reduce_sum, broadcast_parameters, faster_with_bf16, hardware
from mnistsum_ray.model.metrics import Metrics, ScoredRows, analyse_errors, probability_metrics, score_rows
from mnistsum_ray.model.serialization import Weights, checksum, copy_weights, describe_model
from mnistsum_ray.storage.folder import OutputFolder
from mnistsum_ray.storage.location import Location
from mnistsum_ray.training.checkpoint import Checkpointer, EpochProgress, TrainerState
from mnistsum_ray.training.fetch import RowData
from mnistsum_ray.training.rows import EvaluationSet, TrainingRows
from mnistsum_ray.training.trainer import Trainer
from mnistsum_ray.training.worker import Worker, cpus_of_node

_MAX_READERS: Final = 8
"""Actors that read files for one worker: each feeds some 100,000 rows/s of raw bytes, or 26,000 of PNG."""

_MAX_MEMORY_READERS: Final = 2
"""Likewise for rows in memory: each feeds some 200,000 rows/s."""

_TEMPERATURE_ROWS: Final = 5_000
"""Maximum number of validation rows that the temperatures are fitted on."""

_ANALYSED_ROWS: Final = 100_000
"""Maximum number of test rows whose errors are analysed; the accuracies count all."""


@dataclass(frozen=True)
class LoopConfig:
    """Configuration of the training loop, the same for every worker."""

    hyperparameters: Hyperparameters
    threads: int | None
    """Of each worker on CPUs, see `resources.choose_threads`."""
    checkpoint_seconds: float
    data: "ray.ObjectRef[RowData]"
    shuffle: Shuffle
    """Of the training rows."""
    validation: RowRanges
    test: RowRanges
    checksums: npt.NDArray[np.int64] | None
    """Of the run that is trained again, see `TrainerState.checksums`; None: the first epoch finds them."""
    events: Queue
    """From the workers to the console."""
    start: Location | None
    """Checkpoint that `--resume` starts from; None starts from new weights."""
    held: OutputFolder
    """The run folder, whose lock is checked before each write."""

    def __repr__(self) -> str:  # Ray's dashboard shows it
        return repr(self.hyperparameters)


@dataclass(frozen=True)
class TrainingResult:
    """Result of a finished training, returned by rank 0 to the driver."""

    history: list[dict[str, Any]]
    error_analysis: dict[str, Any]
    """Errors of the model on the test rows."""
    mistake_images: Pixels
    """Images of the analysis' mistakes, in their order: uint8[n, 28, 28]."""
    weights: dict[str, np.ndarray]
    """Of the model, with the temperatures folded in; arrays, since Ray Train takes no tensors."""
    description: dict[str, Any]
    """Of the model, see `serialization.describe_model`."""
    hardware: dict[str, Any]
    precision: str
    checksums: npt.NDArray[np.int64] | None
    """Of the rows of each streamed file, see `TrainerState.checksums`."""


def train_loop_per_worker(config: dict[str, LoopConfig]) -> TrainingResult | None:
    """Run the training loop; the result on rank 0, which Ray Train hands to the driver."""
    worker = Worker.set_up(config["loop"].events, config["loop"].threads)
    try:
        loop = TrainingLoop(config["loop"], worker)
        loop.train()
        return loop.analyse() if worker.rank == 0 else None
    except (RunError, RequestError) as error:
        worker.events.fail(str(error))  # another attempt would fail in the same way
        raise


class TrainingLoop:
    """The run on one worker, from its last checkpoint on."""

    def __init__(self, config: LoopConfig, worker: Worker) -> None:
        self._config, self._parameters, self._worker = config, config.hyperparameters, worker
        self._data: RowData = ray.get(config.data)
        self._files = self._data if isinstance(self._data, ParquetFiles) else None
        """Of streamed rows."""
        self._trainer = Trainer(self._parameters, worker)
        self._checkpointer = Checkpointer(
            self._trainer.model, self._trainer.optimizer, worker, config.held, config.checkpoint_seconds
        )
        state = self._checkpointer.restore(config.start)
        if state is None:
            bf16 = worker.all_agree(faster_with_bf16(worker.device))
            checksums = None if config.checksums is None else torch.from_numpy(config.checksums.copy())
            state = TrainerState(0, [], self._parameters.precision or ("bf16" if bf16 else "fp32"), checksums=checksums)
        self._state = state
        self._trainer.prepare(state.precision)
        self._validation, self._test = (
            EvaluationSet(self._data, held_out, worker.rank, worker.world_size, worker.device)
            for held_out in (config.validation, config.test)
        )

    def train(self) -> None:
        """Train the epochs that are left, and fine-tune the sum head."""
        state, parameters, worker = self._state, self._parameters, self._worker
        # On CPUs the readers share the cores with the training, which takes a few thousand rows/s a core.
        cpus = worker.cpus // 4 if worker.device.type == "cpu" else worker.cpus
        batches = TrainingRows(
            self._config.data,
            self._config.shuffle,
            parameters.distortion,
            epochs=parameters.epochs,
            rank=worker.rank,
            world_size=worker.world_size,
            device=worker.device,
            readers=max(1, min(cpus, _MAX_READERS if self._files else _MAX_MEMORY_READERS)),
            first_epoch=state.epochs_done,
            first_step=state.progress.steps,
        ).batches()
        end_ids = torch.from_numpy(self._files.end_ids) if self._files else None
        while state.epochs_done < parameters.epochs:
            line, trained = self._trainer.train_epoch(state, self._config.shuffle, batches, end_ids, self._checkpointer)
            broadcast_parameters(self._trainer.model.parameters())
            for held_out in (self._validation, self._test):
                held_out.forget_scores()
            started = time.perf_counter()
            validation, test = self._evaluate(state.epochs_done + 1)
            line["evaluation_seconds"] = time.perf_counter() - started
            if self._files and trained is not None:
                self._check_contents(self._files, trained)
            state.epochs_done, state.progress = state.epochs_done + 1, EpochProgress()
            line = {"epoch": state.epochs_done, **line, "validation": validation, "test": test}
            state.history.append(line)
            worker.events.send("epoch", **line)
            last = state.epochs_done == parameters.epochs
            # The checkpoint of an epoch that ends before the last upload does is left out; that of the last one is waited for.
            if worker.all_agree(self._checkpointer.idle()) or last:
                self._checkpointer.save(state, wait=last)
        if next(batches, None) is not None:
            raise RowCountError("there are more batches than steps")
        if parameters.sum_head_steps and state.sum_head is None:
            self._finetune(parameters.sum_head_steps)

    def _evaluate(self, epoch: int) -> tuple[Metrics, Metrics]:
        """Metrics on the validation and on the test rows, after an epoch with this number, from 1."""
        validation, test = (self._trainer.evaluate(held_out, epoch) for held_out in (self._validation, self._test))
        return validation, test

    def _check_contents(self, files: ParquetFiles, trained: torch.Tensor) -> None:
        """Compare the rows of each file with those of the first epoch, or of the run that is trained again, by their checksums.

        `trained` are those of the training rows, of all ranks. The state gets the checksums if it has none yet.

        Raises:
            RunError: a file holds other rows; names it.
        """
        held_out = torch.from_numpy(self._validation.checksums + self._test.checksums).to(self._worker.device)
        checksums = trained + all_reduce_sum(held_out).cpu()
        if self._state.checksums is None:
            self._state.checksums = checksums
        changed = (checksums != self._state.checksums).nonzero()
        if len(changed):
            raise RunError(
                f"{files.location(int(changed[0])).display}: holds other rows than when the run, or the run of --from-run, read "
                "it first; put the file back as it was, or start another run"
            )

    def _finetune(self, steps: int) -> None:
        """Fine-tune the sum head of the last epoch's model on the digit scores of training rows, and save a checkpoint.

        The result is undone if the heads then agree on fewer validation pairs. Rank 0 trains, and the others take its weights.
        """
        state, model, events = self._state, self._trainer.model, self._worker.events
        events.note(f"fine-tuning the sum head, {steps:,} steps")
        weights = copy_weights(model)
        model.eval()
        before = state.history[-1]["validation"]["consistency"]
        if self._worker.rank == 0:
            batches = self._alone(self._config.shuffle.rows.sample(sum_head.MAX_ROWS)).batches
            scores = torch.cat([self._trainer.digit_scores(batch).float() for batch in batches])
            seed = step_seed(self._parameters.seed, self._parameters.epochs, 0, RandomStream.SUM_HEAD)
            threads = torch.get_num_threads()
            torch.set_num_threads(1)  # two take nearly twice as long for steps as small as these
            sum_head.finetune_sum_head(model, scores, steps, seed, events.progress("fine-tuning steps", steps))
            torch.set_num_threads(threads)
        broadcast_parameters(model.parameters())
        validation, test = self._evaluate(state.epochs_done)
        after = validation["consistency"]
        kept = after >= before
        state.sum_head = {"steps": steps, "kept": kept, "validation": validation, "test": test}
        if not kept:
            model.load_state_dict(weights)
        undone = "" if kept else "; undone"
        events.note(f"validation sums equal to digit + number: {percent(before)} before, {percent(after)} after{undone}")
        self._checkpointer.save(state, wait=True)

    def analyse(self) -> TrainingResult:
        """Temperatures (on validation rows), errors (on test rows) and int8 calibration (on training rows) of the model.

        One worker computes all of it, while the others have returned. The temperatures are folded into the weights that are
        published, and not into those of the checkpoints: a run that is resumed when it is finished publishes the same model.
        """
        config, data, state, model, events = self._config, self._data, self._state, self._trainer.model, self._worker.events
        events.note("analysing the model's answers on the test rows")
        machine = hardware(self._worker.device) | {"threads": torch.get_num_threads()}
        model.eval()
        trained = copy_weights(model)

        def scored(rows: RowRanges) -> ScoredRows:
            return score_rows(model, self._trainer.digit_scores, self._alone(rows).batches)

        temperatures = fit_temperatures(scored(config.validation.sample(_TEMPERATURE_ROWS)))
        on_progress = events.progress("test rows analysed", min(len(config.test), _ANALYSED_ROWS))
        analysis = analyse_errors(calibrated(scored(config.test.sample(_ANALYSED_ROWS)), temperatures), on_progress)
        compared = list(scored(config.test.sample(int8.COMPARED_ROWS))) if int8.unavailable_reason() is None else []
        fold_temperatures(model, temperatures)
        mistake_images, _ = data.fetch(np.array([mistake["row_id"] for mistake in analysis["mistakes"]], np.int64))
        weights = copy_weights(model)
        description = describe(state, weights) | {
            "trained_sha256": checksum(trained),
            "temperatures_in_weights": temperatures,
            "probabilities": probability_metrics(analysis),
        }
        if compared:
            torch.set_num_threads(cpus_of_node())  # the other workers have returned; of a forward pass threads decide no bit
            images, _ = data.fetch(config.shuffle.rows.sample(int8.CALIBRATION_ROWS).ids())
            on_progress = events.progress("test rows compared with int8", min(len(config.test), int8.COMPARED_ROWS))
            description["int8"] = int8.quantize(model.cpu(), torch.from_numpy(images), compared, on_progress)
        return TrainingResult(
            state.history,
            analysis,
            mistake_images,
            {name: value.numpy() for name, value in weights.items()},
            description,
            machine,
            state.precision,
            None if state.checksums is None else state.checksums.numpy(),
        )

    def _alone(self, rows: RowRanges) -> EvaluationSet:
        """Rows that this worker reads for all; where it is alone, they may be those that it evaluates, and have digit scores."""
        mine = (held_out for held_out in (self._validation, self._test) if held_out.rows is rows)
        if self._worker.world_size == 1 and (same := next(mine, None)):
            return same
        return EvaluationSet(self._data, rows, 0, 1, self._worker.device)


def describe(state: TrainerState, weights: Weights) -> dict[str, Any]:
    """Description of the model after the last epoch, see `serialization.describe_model`; `weights` are those published."""
    line, tuned = state.history[-1], state.sum_head
    metrics = before = {split: line[split] for split in ("validation", "test")}
    entry = None
    if tuned is not None:
        after = {split: tuned[split] for split in before}
        entry = {"steps": tuned["steps"], "kept": tuned["kept"], "before": before, "after": after}
        metrics = after if tuned["kept"] else before
    return describe_model(weights, epoch=line["epoch"], metrics=metrics, sum_head=entry)
