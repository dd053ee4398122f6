"""Temperature scaling of the two heads (Guo et al., "On Calibration of Modern Neural Networks", 2017).

Each head's scores (logits) are divided by its temperature before softmax. This changes the probabilities, not the predicted
classes.
"""

import math
import sys
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from mnistsum_ray.model.heads import HEADS

Floats = npt.NDArray[np.floating[Any]]

_PRIOR_DEVIATION: Final = 0.5
"""Standard deviation of the prior on log(temperature). Without it, the temperature goes to 0 if no row is predicted wrong."""

_MAX_LOG_TEMPERATURE: Final = 1.5
_SEARCH_STEPS: Final = 40


@dataclass(frozen=True)
class Temperatures:
    """Divisors of the scores of each head before softmax; 1 leaves the scores as they are."""

    digit: float = 1.0
    sum: float = 1.0

    @classmethod
    def from_json(cls, value: Any) -> "Temperatures":
        """Parse the entry `temperature` of model.json.

        Raises:
            ValueError: the entry is not two positive numbers.
        """
        heads = [head.name for head in HEADS]
        if isinstance(value, dict) and set(value) == set(heads):
            numbers = [value[head] for head in heads]
            if all(isinstance(number, float | int) and 0 < number <= sys.float_info.max for number in numbers):
                return cls(*map(float, numbers))
        raise ValueError(f"its temperature is {str(value)[:80]}, not a positive number for 'digit' and one for 'sum'")

    def as_json(self) -> dict[str, float]:
        """The entry `temperature` of model.json."""
        return asdict(self)


def fit_temperature(scores: Floats, labels: npt.NDArray[np.integer[Any]]) -> float:
    """Fit the temperature of one head by maximum a posteriori, on rows that the model was not trained on.

    Args:
        scores: logits [n, classes].
        labels: true classes, integers [n].

    Returns:
        A temperature in 0.22..4.5, rounded to four digits, so that differences between CPUs mostly vanish.
    """
    scores = scores.astype(np.float64)
    label_scores = scores[np.arange(len(labels)), labels]

    def cost(log_temperature: float) -> float:
        scale = math.exp(-log_temperature)
        nll = (_log_sum_exp(scores * scale) - label_scores * scale).sum()
        return float(nll + (log_temperature / _PRIOR_DEVIATION) ** 2 / 2)

    # Golden-section search: the cost has a single minimum.
    low, high, golden = -_MAX_LOG_TEMPERATURE, _MAX_LOG_TEMPERATURE, (math.sqrt(5) - 1) / 2
    left, right = high - golden * (high - low), low + golden * (high - low)
    cost_left, cost_right = cost(left), cost(right)
    for _ in range(_SEARCH_STEPS):
        if cost_left < cost_right:
            high, right, cost_right = right, left, cost_left
            left = high - golden * (high - low)
            cost_left = cost(left)
        else:
            low, left, cost_left = left, right, cost_right
            right = low + golden * (high - low)
            cost_right = cost(right)
    return float(f"{math.exp((low + high) / 2):.4g}")


def _log_sum_exp(scores: Floats) -> Floats:
    largest = scores.max(1)
    total: Floats = largest + np.log(np.exp(scores - largest[:, None]).sum(1))
    return total
