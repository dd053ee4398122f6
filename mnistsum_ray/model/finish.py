"""The model of a trained run, after the last epoch: calibrated, analysed and described."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mnistsum_ray.data.images import Pixels
from mnistsum_ray.model.device import hardware
from mnistsum_ray.model.folder import Weights, checksum, copy_weights, describe_model
from mnistsum_ray.model.metrics import LabelledRows, analyse_errors, fit_temperatures, score_rows
from mnistsum_ray.model.network import Network, make_network

ScoredDigits = list[tuple[LabelledRows, Tensor]]
"""Batches of rows, with their digit scores [n, 10]."""


@dataclass(frozen=True)
class FinishedModel:
    """A trained model, with what is known of it.

    Ray Train refuses tensors that a worker returns in a dict.
    """

    history: list[dict[str, Any]]
    """Lines of history.jsonl, one an epoch."""
    weights: Weights
    """With the temperatures folded in."""
    description: dict[str, Any]
    """See `describe_model`."""
    error_analysis: dict[str, Any]
    """See `analyse_errors`; of test rows."""
    hardware: dict[str, Any]
    precision: str
    """`bf16` or `fp32`, of the training."""
    mistake_images: Pixels
    """Images of the analysis' mistakes, in their order: uint8[n, 28, 28]."""


def finish_model(
    trained: Network,
    validation: ScoredDigits,
    test: ScoredDigits,
    history: list[dict[str, Any]],
    precision: str,
) -> FinishedModel:
    """Calibrate the last epoch's model on validation rows, and analyse its errors on test rows.

    The same trained model and rows give the same finished one each time.
    """
    device = next(trained.parameters()).device
    # A copy without the hooks of DDP, which would wait for the other workers.
    model = make_network().to(device)
    model.load_state_dict(trained.state_dict())
    # Before calibration: by this two runs are compared, bit for bit.
    trained_sha256 = checksum(copy_weights(model))
    temperatures = fit_temperatures(score_rows(model, validation))
    analysis = analyse_errors(score_rows(model, test), temperatures)
    errors = {name: {"ece": of["ece"]} for name, of in analysis["probabilities"].items()}
    model.fold_temperatures(temperatures)
    weights = copy_weights(model)
    last = history[-1]
    metrics = {split: last[split] for split in ("validation", "test")}
    description = describe_model(weights, epoch=last["epoch"], metrics=metrics)
    description["trained_sha256"] = trained_sha256
    description["temperatures_in_weights"] = temperatures
    description["probabilities"] = errors
    return FinishedModel(
        history,
        weights,
        description,
        analysis,
        hardware(device) | {"threads": torch.get_num_threads()},
        precision,
        _images_of(analysis["mistakes"], test),
    )


def _images_of(mistakes: list[dict[str, Any]], rows: ScoredDigits) -> Pixels:
    """The images of these rows, in their order."""
    images = {}
    wanted = {mistake["row_id"] for mistake in mistakes}
    for batch, _ in rows:
        for index, row_id in enumerate(batch["row_id"].tolist()):
            if row_id in wanted:
                images[row_id] = batch["image"][index].cpu().numpy()
    found = [images[mistake["row_id"]] for mistake in mistakes]
    return np.stack(found) if found else np.empty((0, 28, 28), np.uint8)
