"""Analysis of the trained model on one worker: temperatures, and errors on test rows."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch

from mnistsum_ray.data.images import Pixels
from mnistsum_ray.data.order import RowRanges
from mnistsum_ray.data.picture import background_of
from mnistsum_ray.model.device import hardware
from mnistsum_ray.model.folder import Weights, checksum, copy_weights, describe_model
from mnistsum_ray.model.metrics import ScoredRows, analyse_errors, calibrated, fit_temperatures
from mnistsum_ray.model.network import Network
from mnistsum_ray.training.checkpoint import TrainerState
from mnistsum_ray.training.fetch import RowData
from mnistsum_ray.training.worker import Worker

_TEMPERATURE_ROWS: Final = 5_000
"""Maximum number of validation rows that the temperatures are fitted on."""

_BACKGROUND_ROWS: Final = 512
"""Maximum number of training rows that say whether the background is dark or light."""

_ANALYSED_ROWS: Final = 100_000
"""Maximum number of test rows whose errors are analysed; the accuracies count all."""


@dataclass(frozen=True)
class TrainingResult:
    """Result of a finished training, returned by rank 0 to the driver."""

    history: list[dict[str, Any]]
    manifest: dict[str, Any]
    """Entries of the manifest: `error_analysis` of the test rows, `hardware`, `precision`."""
    mistake_images: Pixels
    """Images of the analysis' mistakes, in their order: uint8[n, 28, 28]."""
    weights: dict[str, np.ndarray]
    """Weights of the model, with the temperatures folded in; arrays, since Ray Train takes no tensors."""
    description: dict[str, Any]
    """Description of the model, see `describe_model`."""


def analyse(
    model: Network,
    state: TrainerState,
    worker: Worker,
    data: RowData,
    scored: Callable[[RowRanges], ScoredRows],
    train: RowRanges,
    validation: RowRanges,
    test: RowRanges,
) -> TrainingResult:
    """Temperatures of the model on validation rows, its errors on test rows, its background.

    The temperatures are folded into `model`, which is published, and not into the checkpoints: a
    run that is resumed when it is finished publishes the same model. `scored` gives the scores of
    rows on this worker.
    """
    events = worker.events
    events.note("analysing the model's answers on the test rows")
    model.eval()
    trained = copy_weights(model)
    temperatures = fit_temperatures(scored(validation.sample(_TEMPERATURE_ROWS)))
    on_progress = events.progress("test rows analysed", min(len(test), _ANALYSED_ROWS))
    analysed = calibrated(scored(test.sample(_ANALYSED_ROWS)), temperatures)
    analysis = analyse_errors(analysed, worker.device, on_progress)
    model.fold_temperatures(temperatures)
    weights = copy_weights(model)
    mistakes = np.array([mistake["row_id"] for mistake in analysis["mistakes"]], np.int64)
    mistake_images, _ = data.fetch(mistakes)
    images, _ = data.fetch(train.sample(_BACKGROUND_ROWS).ids())
    errors = {name: {"ece": of_head["ece"]} for name, of_head in analysis["probabilities"].items()}
    description = describe(state, weights, background_of(images)) | {
        "trained_sha256": checksum(trained),
        "temperatures_in_weights": temperatures,
        "probabilities": {"consistent": analysis["consistent"], **errors},
    }
    machine = hardware(worker.device) | {"threads": torch.get_num_threads()}
    return TrainingResult(
        state.history,
        {"error_analysis": analysis, "hardware": machine, "precision": state.precision},
        mistake_images,
        {name: value.numpy() for name, value in weights.items()},
        description,
    )


def describe(state: TrainerState, weights: Weights, background: int = 0) -> dict[str, Any]:
    """Description of the model after the last epoch, see `describe_model`; `weights` are those published."""
    line, tuned = state.history[-1], state.sum_head
    metrics = before = {split: line[split] for split in ("validation", "test")}
    entry = None
    if tuned is not None:
        after = {split: tuned[split] for split in before}
        entry = {"steps": tuned["steps"], "kept": tuned["kept"], "before": before, "after": after}
        metrics = after if tuned["kept"] else before
    return describe_model(weights, epoch=line["epoch"], metrics=metrics, sum_head=entry, background=background)
