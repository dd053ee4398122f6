"""Temperature scaling of the heads (Guo et al., "On Calibration of Modern Neural Networks", 2017), folded into the weights.

The scores (logits) of a head are divided by its temperature before softmax: that changes the probabilities, and not the predicted
classes. Dividing the weights of the last layer does the same, so no user of the network needs to know the temperatures.
"""

import math
from collections.abc import Mapping
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from mnistsum_ray.model.heads import HEADS
from mnistsum_ray.model.metrics import ScoredRows, true_classes

_PRIOR_DEVIATION: Final = 0.5
"""Standard deviation of the prior on log(temperature). Without it, the temperature goes to 0 if no row is predicted wrong."""

_MAX_LOG_TEMPERATURE: Final = 1.5
_SEARCH_STEPS: Final = 25


def fit_temperatures(scored: ScoredRows) -> dict[str, float]:
    """Fit the temperature of each head, by its name, on rows that the model was not trained on."""
    batches, classes = zip(*((scores, true_classes(batch["digit"], scores)) for batch, scores in scored), strict=True)
    temperatures = {}
    for index, head in enumerate(HEADS):
        logits = torch.cat([scores[index].flatten(0, 1) for scores in batches]).cpu()
        truth = torch.cat([of_batch[index].flatten() for of_batch in classes]).cpu()
        temperatures[head.name] = fit_temperature(logits, truth)
    return temperatures


def calibrated(scored: ScoredRows, temperatures: Mapping[str, float]) -> ScoredRows:
    """The rows with the scores of each head divided by its temperature, as `Parts.fold_temperatures` makes them."""
    for batch, scores in scored:
        yield batch, tuple(logits / temperatures[head.name] for head, logits in zip(HEADS, scores, strict=True))


def fit_temperature(scores: Tensor, classes: Tensor) -> float:
    """Fit the temperature of one head by maximum a posteriori, on logits [n, classes] and true classes int64[n].

    It lies in 0.22..4.5, and is rounded to four digits, so that differences between machines mostly vanish.
    """
    scores = scores.double()

    def cost(log_temperature: float) -> float:
        nll = F.cross_entropy(scores * math.exp(-log_temperature), classes, reduction="sum").item()
        return nll + (log_temperature / _PRIOR_DEVIATION) ** 2 / 2

    # Golden-section search: the cost has a single minimum.
    low, high, golden = -_MAX_LOG_TEMPERATURE, _MAX_LOG_TEMPERATURE, (math.sqrt(5) - 1) / 2
    for _ in range(_SEARCH_STEPS):
        left, right = high - golden * (high - low), low + golden * (high - low)
        if cost(left) < cost(right):
            high = right
        else:
            low = left
    return float(f"{math.exp((low + high) / 2):.4g}")
