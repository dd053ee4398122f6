"""The model of a trained run, in a task after the last epoch: fine-tune the sum head, then analyse it."""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import ray
import torch
from ray.util.queue import Queue

from mnistsum_ray.config import Hyperparameters
from mnistsum_ray.data.images import Pixels
from mnistsum_ray.data.order import RandomStream, sample, step_seed
from mnistsum_ray.data.picture import background_of
from mnistsum_ray.errors import percent
from mnistsum_ray.model import sum_head
from mnistsum_ray.model.device import hardware
from mnistsum_ray.model.folder import checksum, copy_weights, describe_model
from mnistsum_ray.model.metrics import (
    ScoredRows,
    analyse_errors,
    calibrated,
    fit_temperatures,
    score_rows,
)
from mnistsum_ray.model.network import Network, make_network
from mnistsum_ray.storage.store import Location
from mnistsum_ray.training.checkpoint import TrainerState, load_weights, read_checkpoint
from mnistsum_ray.training.evaluation import HeldOutRows, Scored, metrics_of
from mnistsum_ray.training.pipeline import TrainingData
from mnistsum_ray.training.worker import EventSender, Worker, cpus_of_node, set_up_process

_TEMPERATURE_ROWS: Final = 5_000
"""Maximum number of validation rows that the temperatures are fitted on."""

_BACKGROUND_ROWS: Final = 512
"""Maximum number of training rows that say whether the background is dark or light."""

_ANALYSED_ROWS: Final = 100_000
"""Maximum number of test rows whose errors are analysed; the accuracies count all."""


@dataclass(frozen=True)
class FinishedModel:
    """A trained model, with what is known of it."""

    history: list[dict[str, Any]]
    manifest: dict[str, Any]
    """Entries of the manifest: `error_analysis` of the test rows, `hardware`, `precision`."""
    mistake_images: Pixels
    """Images of the analysis' mistakes, in their order: uint8[n, 28, 28]."""
    weights: dict[str, np.ndarray]
    """Weights with the temperatures folded in."""
    description: dict[str, Any]
    """See `describe_model`."""


def finish_model(
    parameters: Hyperparameters,
    data: TrainingData,
    checkpoint: Location,
    threads: int | None,
    events: Queue,
) -> FinishedModel:
    """Fine-tune the sum head of the last epoch's model, calibrate it, and analyse its errors.

    Runs as a task of Ray, when the training workers have ended and their GPUs are free. The same
    checkpoint gives the same model each time.

    Raises:
        CheckpointError: the checkpoint cannot be used.
    """
    device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
    set_up_process(device, threads or cpus_of_node())
    worker = Worker(0, 1, device, EventSender(events, 0))
    state, tensors = read_checkpoint(checkpoint)
    bf16 = state.precision == "bf16"
    model = make_network().to(device)
    load_weights(tensors, model)
    validation = HeldOutRows(data.blocks, data.validation, worker)
    test = HeldOutRows(data.blocks, data.test, worker)
    # The digit's scores are those of the last epoch: the convolutions are trained no more.
    scored = {rows: list(rows.scored(model, bf16=bf16)) for rows in (validation, test)}
    tuned = None
    if parameters.sum_head_steps:
        train = HeldOutRows(data.blocks, sample(data.order.ids, sum_head.MAX_ROWS), worker)
        digit_scores = torch.cat([scores.float() for _, scores in train.scored(model, bf16=bf16)])
        before = state.history[-1]["validation"]["consistency"]
        tuned = _finetune(parameters, model, digit_scores, before, scored, worker.events)
    worker.events.note("analysing the model's answers on the test rows")
    trained = copy_weights(model)
    temperatures = fit_temperatures(_sampled(model, scored[validation], _TEMPERATURE_ROWS))
    on_progress = worker.events.progress("test rows analysed", min(len(data.test), _ANALYSED_ROWS))
    analysed = calibrated(_sampled(model, scored[test], _ANALYSED_ROWS), temperatures)
    analysis = analyse_errors(analysed, device, on_progress)
    model.fold_temperatures(temperatures)
    weights = copy_weights(model)
    mistakes = np.array([mistake["row_id"] for mistake in analysis["mistakes"]], np.int64)
    background = background_of(data.blocks.fetch(sample(data.order.ids, _BACKGROUND_ROWS))[0])
    before_and_after = _metrics(state, tuned)
    description = describe_model(weights, epoch=state.epochs_done, background=background, **before_and_after) | {
        "trained_sha256": checksum(trained),
        "temperatures_in_weights": temperatures,
        "probabilities": {
            "consistent": analysis["consistent"],
            **{name: {"ece": of_head["ece"]} for name, of_head in analysis["probabilities"].items()},
        },
    }
    machine = hardware(device) | {"threads": torch.get_num_threads()}
    return FinishedModel(
        state.history,
        {"error_analysis": analysis, "hardware": machine, "precision": state.precision},
        data.blocks.fetch(mistakes)[0],
        {name: value.numpy() for name, value in weights.items()},
        description,
    )


def _finetune(
    parameters: Hyperparameters,
    model: Network,
    digit_scores: torch.Tensor,
    before: float,
    scored: dict[HeldOutRows, Scored],
    events: EventSender,
) -> dict[str, Any]:
    """Fine-tune the sum head on the digit scores of training rows.

    The result is undone if the heads then agree on fewer validation pairs. `before` is their share
    before it.

    Returns:
        `steps`, whether it was `kept`, and the `Metrics` of `validation` and `test` after it.
    """
    steps = parameters.sum_head_steps
    events.note(f"fine-tuning the sum head, {steps:,} steps")
    weights = copy_weights(model)
    seed = step_seed(parameters.seed, parameters.epochs, 0, RandomStream.SUM_HEAD)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two take nearly twice as long for steps as small as these
    sum_head.finetune_sum_head(model, digit_scores, steps, seed, events.progress("fine-tuning steps", steps))
    torch.set_num_threads(threads)
    validation, test = (metrics_of(model, batches, rows) for rows, batches in scored.items())
    after = validation["consistency"]
    kept = after >= before
    if not kept:
        model.load_state_dict(weights)
    undone = "" if kept else "; undone"
    events.note(f"validation sums equal to digit + number: {percent(before)} before, {percent(after)} after{undone}")
    return {"steps": steps, "kept": kept, "validation": validation, "test": test}


def _metrics(state: TrainerState, tuned: dict[str, Any] | None) -> dict[str, Any]:
    """Arguments of `describe_model`: metrics of the published model, and before and after fine-tuning."""
    before = {split: state.history[-1][split] for split in ("validation", "test")}
    if tuned is None:
        return {"metrics": before}
    after = {split: tuned[split] for split in before}
    entry = {"steps": tuned["steps"], "kept": tuned["kept"], "before": before, "after": after}
    return {"metrics": after if tuned["kept"] else before, "sum_head": entry}


def _sampled(model: Network, scored: Scored, limit: int) -> ScoredRows:
    """At most so many of the rows, with the scores of all heads."""
    if sum(len(scores) for _, scores in scored) > limit:
        labels = {name: torch.cat([batch[name] for batch, _ in scored]) for name in ("digit", "row_id")}
        scores = torch.cat([scores for _, scores in scored])
        rows = torch.from_numpy(sample(np.arange(len(scores)), limit)).to(scores.device)
        scored = [({name: values[rows] for name, values in labels.items()}, scores[rows])]
    return score_rows(model, scored)
