"""After the last epoch: fine-tune the sum head, fit temperatures, analyse errors, and calibrate for int8."""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mnistsum_ray.data.images import Pixels
from mnistsum_ray.data.order import RandomStream, RowRanges, step_seed
from mnistsum_ray.model import int8, sum_head
from mnistsum_ray.model.calibration import fit_temperatures, fold_temperatures
from mnistsum_ray.model.device import broadcast_parameters, hardware
from mnistsum_ray.model.metrics import ErrorAnalysis, ScoredRows, analyse_errors, score_rows
from mnistsum_ray.model.serialization import checksum, copy_weights
from mnistsum_ray.training.checkpoint import Checkpointer, SumHeadResult, TrainerState
from mnistsum_ray.training.fetch import RowData
from mnistsum_ray.training.rows import EvaluationSet, fetch_columns
from mnistsum_ray.training.trainer import Trainer
from mnistsum_ray.training.worker import cpus_of_node

TEMPERATURE_ROWS: Final = 5_000
"""Maximum number of validation rows that the temperatures are fitted on."""

ANALYSED_ROWS: Final = 100_000
"""Maximum number of test rows whose errors are analysed; the accuracies count all."""


@dataclass(frozen=True)
class TrainingResult:
    """Result of a finished training, returned by rank 0 to the driver."""

    history: list[dict[str, Any]]
    error_analysis: ErrorAnalysis
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


def finetune(
    trainer: Trainer,
    state: TrainerState,
    data: RowData,
    train: RowRanges,
    validation: EvaluationSet,
    test: EvaluationSet,
    checkpointer: Checkpointer,
) -> None:
    """Fine-tune the sum head of the last epoch's model, and save a checkpoint.

    The result is undone if the two heads then agree on fewer validation pairs. Rank 0 trains, and the others take its weights.
    It learns from the digit scores of the training rows. Updates the trainer's model and the state.
    """
    hyperparameters, model, events = trainer.hyperparameters, trainer.model, trainer.events
    steps = hyperparameters.sum_head_steps
    events.note(f"fine-tuning the sum head, {steps:,} steps")
    weights = copy_weights(model)
    model.eval()
    before = state.history[-1]["validation"]["consistency"]
    if trainer.worker.rank == 0:
        seed = step_seed(hyperparameters.seed, hyperparameters.epochs, 0, RandomStream.SUM_HEAD)
        scores = _digit_scores(trainer, EvaluationSet(data, train.sample(sum_head.MAX_ROWS), 0, 1, trainer.worker.device))
        sum_head.finetune_sum_head(model, scores, steps, seed, events.progress("fine-tuning steps", steps))
    broadcast_parameters(model.parameters())
    metrics = [trainer.evaluate(held_out, state.epochs_done) for held_out in (validation, test)]
    after = metrics[0].consistency
    kept = after >= before
    state.sum_head = SumHeadResult(steps, kept, *metrics)
    if not kept:
        model.load_state_dict(weights)
    undone = "" if kept else "; undone"
    events.note(f"validation sums equal to digit + number: {before:.3%} before, {after:.3%} after{undone}")
    checkpointer.save(state)


def _digit_scores(trainer: Trainer, rows: EvaluationSet) -> Tensor:
    """Digit scores of rows: float32[n, 10]."""
    return torch.cat([trainer.digit_scores(batch).float() for batch in rows.batches])


def analyse_model(
    trainer: Trainer, state: TrainerState, data: RowData, train: RowRanges, validation: RowRanges, test: RowRanges
) -> TrainingResult:
    """Temperatures (on validation rows), errors (on test rows) and int8 calibration (on training rows) of the model.

    One worker computes all of it, while the others have returned. The temperatures are folded into the weights that are
    published, and not into those of the checkpoints: a run that is resumed when it is finished publishes the same model.
    """
    events, model = trainer.events, trainer.model
    events.note("analysing the model's answers on the test rows")
    model.eval()
    trained = copy_weights(model)

    def scored(rows: RowRanges) -> ScoredRows:
        return score_rows(model, trainer.digit_scores, EvaluationSet(data, rows, 0, 1, trainer.worker.device).batches)

    temperatures = fit_temperatures(scored(validation.sample(TEMPERATURE_ROWS)))
    fold_temperatures(model, temperatures)
    on_progress = events.progress("test rows analysed", min(len(test), ANALYSED_ROWS))
    analysis = analyse_errors(scored(test.sample(ANALYSED_ROWS)), on_progress)
    mistake_images, _ = data.fetch(np.array([mistake.row_id for mistake in analysis.mistakes], np.int64))
    weights = copy_weights(model)
    description = state.describe(weights)
    description |= {
        "trained_sha256": checksum(trained),
        "temperatures_in_weights": temperatures,
        "probabilities": analysis.probability_metrics(),
    }
    if int8.unavailable_reason() is None:
        torch.set_num_threads(cpus_of_node())  # the other workers have returned
        calibration = fetch_columns(data, train.sample(int8.CALIBRATION_ROWS).ids())
        compared = fetch_columns(data, test.sample(int8.COMPARED_ROWS).ids())
        training_images, image, digit = map(torch.from_numpy, (calibration["image"], compared["image"], compared["digit"]))
        on_progress = events.progress("test rows compared with int8", len(digit))
        description["int8"] = int8.quantize(model.cpu(), training_images, image, digit, on_progress)
    worked_on = hardware(trainer.worker.device)
    arrays = {name: value.numpy() for name, value in weights.items()}
    checksums = None if state.checksums is None else state.checksums.numpy()
    return TrainingResult(state.history, analysis, mistake_images, arrays, description, worked_on, state.precision, checksums)
