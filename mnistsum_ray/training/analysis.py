"""The model of a trained run, after the last epoch: fine-tune the sum head, calibrate, analyse."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from mnistsum_ray.config import Hyperparameters
from mnistsum_ray.data.images import Pixels
from mnistsum_ray.data.randomness import RandomStream, sample, step_seed
from mnistsum_ray.errors import percent
from mnistsum_ray.model import sum_head
from mnistsum_ray.model.device import hardware
from mnistsum_ray.model.folder import Weights, checksum, copy_weights, describe_model
from mnistsum_ray.model.metrics import analyse_errors, fit_temperatures, score_rows
from mnistsum_ray.model.network import Network, make_network
from mnistsum_ray.reporting.console import Progress
from mnistsum_ray.training.checkpoint import TrainerState
from mnistsum_ray.training.held_out import HeldOutRows, ScoredDigits
from mnistsum_ray.training.rows import TrainingData
from mnistsum_ray.training.worker import Worker

_FITTED_BATCHES: Final = 20
"""Most batches of validation rows that the temperatures are fitted on, of 250 rows on CPUs."""

_ANALYSED_BATCHES: Final = 400
"""Most batches of test rows whose errors are analysed; the accuracies count all."""


@dataclass(frozen=True)
class FinishedModel:
    """A trained model, with what is known of it.

    Ray Train refuses tensors that a worker returns in a dict.
    """

    history: list[dict[str, Any]]
    weights: Weights
    """With the temperatures folded in."""
    description: dict[str, Any]
    """See `describe_model`."""
    manifest: dict[str, Any]
    """Entries of the manifest: `error_analysis` of the test rows, `hardware`, `precision`."""
    mistake_images: Pixels
    """Images of the analysis' mistakes, in their order: uint8[n, 28, 28]."""


def finish_model(
    parameters: Hyperparameters,
    data: TrainingData,
    state: TrainerState,
    trained: Network,
    worker: Worker,
    scored: dict[str, ScoredDigits] | None,
) -> FinishedModel:
    """Fine-tune the sum head of the last epoch's model, calibrate it, and analyse its errors.

    Rank 0 does it alone. The same trained model gives the same finished one each time. `scored` are
    the held-out rows by split, all of them; without it they are scored here.
    """
    worker = replace(worker, world_size=1)
    bf16 = state.precision == "bf16"
    # A copy without the hooks of DDP, which would wait for the other workers.
    model = make_network().to(worker.device)
    model.load_state_dict(trained.state_dict())
    splits = {"validation": data.validation, "test": data.test}
    held_out = {name: HeldOutRows(data.blocks, ids, worker) for name, ids in splits.items()}
    # Digit scores stay as they are from here on: the convolutions are trained no more.
    if scored is None:
        scored = {name: rows.digit_scores(model, bf16=bf16) for name, rows in held_out.items()}
    metrics = {name: state.history[-1][name] for name in splits}
    tuning = None
    if parameters.sum_head_steps:
        train = HeldOutRows(data.blocks, sample(data.order.ids, sum_head.MAX_ROWS), worker)
        train_scores = [scores.float() for _, scores in train.digit_scores(model, bf16=bf16)]
        _finetune(parameters, model, torch.cat(train_scores), worker)
        before = metrics
        metrics = {name: rows.metrics(model, scored[name]) for name, rows in held_out.items()}
        tuning = {"steps": parameters.sum_head_steps, "before": before, "after": metrics}
        shares = [percent(of["validation"]["consistency"]) for of in (before, metrics)]
        text = "validation sums equal to digit + number: {} before, {} after"
        worker.note(text.format(*shares))
    # Before calibration: by this two runs are compared, bit for bit.
    trained_sha256 = checksum(copy_weights(model))
    worker.note("analysing the model's answers on the test rows")
    fitted_scores = _at_most(_FITTED_BATCHES, scored["validation"])
    temperatures = fit_temperatures(score_rows(model, fitted_scores))
    analysed_scores = _at_most(_ANALYSED_BATCHES, scored["test"])
    analysis = analyse_errors(score_rows(model, analysed_scores), temperatures)
    errors = {name: {"ece": of["ece"]} for name, of in analysis["probabilities"].items()}
    model.fold_temperatures(temperatures)
    weights = copy_weights(model)
    description = describe_model(weights, epoch=state.epochs_done, metrics=metrics, sum_head=tuning)
    description["trained_sha256"] = trained_sha256
    description["temperatures_in_weights"] = temperatures
    description["probabilities"] = errors
    mistakes = np.array([mistake["row_id"] for mistake in analysis["mistakes"]], np.int64)
    return FinishedModel(
        state.history,
        weights,
        description,
        {
            "error_analysis": analysis,
            "hardware": hardware(worker.device) | {"threads": torch.get_num_threads()},
            "precision": state.precision,
        },
        data.blocks.fetch(mistakes)[0],
    )


def _finetune(
    parameters: Hyperparameters, model: Network, digit_scores: Tensor, worker: Worker
) -> None:
    """Fine-tune the sum head, in place, on the digit scores of training rows."""
    steps = parameters.sum_head_steps
    worker.note(f"fine-tuning the sum head, {steps:,} steps")
    seed = step_seed(parameters.seed, parameters.epochs, 0, RandomStream.SUM_HEAD)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two take nearly twice as long for steps as small as these
    on_progress = Progress(partial(worker.send, "counter"), "sum-head steps", steps)
    sum_head.finetune_sum_head(model, digit_scores, steps, seed, on_progress)
    torch.set_num_threads(threads)


def _at_most(limit: int, batches: list[Any]) -> list[Any]:
    """So many of the batches, evenly spaced: the first rows of sorted files all show one digit."""
    return batches[:: -(-len(batches) // limit)]
