"""Analysis of the trained model: temperatures, errors on test rows, and calibration for int8; one worker computes all of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from mnistsum_ray.data.images import Pixels
from mnistsum_ray.data.order import RowRanges
from mnistsum_ray.data.picture import background_of
from mnistsum_ray.errors import one_line
from mnistsum_ray.model import int8
from mnistsum_ray.model.device import hardware
from mnistsum_ray.model.heads import DIGIT
from mnistsum_ray.model.metrics import ScoredRows, analyse_errors, calibrated, fit_temperatures, probability_metrics
from mnistsum_ray.model.network import Network, TwoHeadCNN
from mnistsum_ray.model.parts import find_parts
from mnistsum_ray.model.serialization import Weights, checksum, copy_weights, describe_model
from mnistsum_ray.training.checkpoint import TrainerState
from mnistsum_ray.training.fetch import RowData
from mnistsum_ray.training.worker import Worker, cpus_of_node

_TEMPERATURE_ROWS: Final = 5_000
"""Maximum number of validation rows that the temperatures are fitted on."""

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
    """Description of the model, see `serialization.describe_model`."""
    checksums: npt.NDArray[np.int64] | None
    """Checksums of the rows of each streamed file, see `TrainerState.checksums`."""


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
    """Temperatures (on validation rows), errors (on test rows), background and int8 calibration (on training rows) of the model.

    The temperatures are folded into `model`, which is published, and not into the checkpoints: a run that is resumed when it is
    finished publishes the same model. `scored` gives the scores of rows on this worker.
    """
    events = worker.events
    events.note("analysing the model's answers on the test rows")
    machine = hardware(worker.device) | {"threads": torch.get_num_threads()}
    model.eval()
    trained = copy_weights(model)
    temperatures = fit_temperatures(scored(validation.sample(_TEMPERATURE_ROWS)))
    on_progress = events.progress("test rows analysed", min(len(test), _ANALYSED_ROWS))
    analysis = analyse_errors(calibrated(scored(test.sample(_ANALYSED_ROWS)), temperatures), worker.device, on_progress)
    quantized = model if isinstance(model, TwoHeadCNN) and int8.unavailable_reason() is None else None
    compared = list(scored(test.sample(int8.COMPARED_ROWS))) if quantized else []
    find_parts(model).fold_temperatures(temperatures)
    mistake_images, _ = data.fetch(np.array([mistake["row_id"] for mistake in analysis["mistakes"]], np.int64))
    weights = copy_weights(model)
    images, _ = data.fetch(train.sample(int8.CALIBRATION_ROWS).ids())
    description = describe(state, weights, background_of(images)) | {
        "trained_sha256": checksum(trained),
        "temperatures_in_weights": temperatures,
        "probabilities": probability_metrics(analysis),
    }
    if quantized:
        torch.set_num_threads(cpus_of_node())  # the other workers have returned; of a forward pass threads decide no bit
        on_progress = events.progress("test rows compared with int8", min(len(test), int8.COMPARED_ROWS))
        try:
            entry = int8.quantize(quantized.cpu(), torch.from_numpy(images), compared, on_progress)
        except (AttributeError, RuntimeError) as error:  # of a TwoHeadCNN whose layers were changed
            events.note(f"no --precision int8 for this model: {one_line(error)}")
        else:
            if entry[f"{DIGIT.name}_agreement"] >= int8.MIN_AGREEMENT:
                description["int8"] = entry
            else:
                events.note("no --precision int8 for this model: it answers otherwise than the network")
    return TrainingResult(
        state.history,
        {"error_analysis": analysis, "hardware": machine, "precision": state.precision},
        mistake_images,
        {name: value.numpy() for name, value in weights.items()},
        description,
        None if state.checksums is None else state.checksums.numpy(),
    )


def describe(state: TrainerState, weights: Weights, background: int = 0) -> dict[str, Any]:
    """Description of the model after the last epoch, see `serialization.describe_model`; `weights` are those published."""
    line, tuned = state.history[-1], state.sum_head
    metrics = before = {split: line[split] for split in ("validation", "test")}
    entry = None
    if tuned is not None:
        after = {split: tuned[split] for split in before}
        entry = {"steps": tuned["steps"], "kept": tuned["kept"], "before": before, "after": after}
        metrics = after if tuned["kept"] else before
    return describe_model(weights, epoch=line["epoch"], metrics=metrics, sum_head=entry, background=background)
