"""Temperatures of the two heads, and how well probabilities describe how often the answers are right. No torch: scoring's driver
adds up reliability from many files without it.

A temperature divides the scores (logits) of a head before softmax (Guo et al., "On Calibration of Modern Neural Networks", 2017).
It changes no answer, only how sure the head is of it.
"""

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

BINS: Final = 15
"""Bins of equal width over the probability 0..1, as in Guo et al."""

HEADS: Final = ("digit", "sum")

Floats = npt.NDArray[np.floating[Any]]

_PRIOR_DEVIATION: Final = 0.5
"""Of the logarithm of a temperature. Without it, a temperature would go to 0 where no validation row is wrong."""

_WIDEST: Final = 1.5
_SEARCH_STEPS: Final = 40


@dataclass(frozen=True)
class Temperatures:
    """What the scores of each head are divided by before softmax; 1 leaves them as they are."""

    digit: float = 1.0
    sum: float = 1.0

    @classmethod
    def from_json(cls, value: Any) -> "Temperatures":
        """From what model.json says under `temperature`.

        Raises:
            ValueError: it is not two positive numbers.
        """
        if isinstance(value, dict) and set(value) == set(HEADS):
            numbers = [value[head] for head in HEADS]
            if all(isinstance(number, float | int) and 0 < number < math.inf for number in numbers):
                return cls(*map(float, numbers))
        raise ValueError(f"its temperature is {str(value)[:80]}, not a positive number for 'digit' and one for 'sum'")

    def as_json(self) -> dict[str, float]:
        return asdict(self)


def fit_temperature(scores: Floats, labels: npt.NDArray[np.integer[Any]]) -> float:
    """The temperature at which the labels are likeliest, on rows that the model was not trained on.

    Args:
        scores: logits [n, classes].
        labels: integers [n], the true classes.

    Returns:
        It lies in 0.22..4.5, rounded to four digits, so that it is nearly the same on every CPU.
    """
    scores = scores.astype(np.float64)
    of_label = scores[np.arange(len(labels)), labels]

    def cost(logarithm: float) -> float:
        scale = math.exp(-logarithm)
        return float((_log_sum_exp(scores * scale) - of_label * scale).sum() + (logarithm / _PRIOR_DEVIATION) ** 2 / 2)

    # Golden-section search: the cost falls to its one minimum and rises after it.
    low, high, golden = -_WIDEST, _WIDEST, (math.sqrt(5) - 1) / 2
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


@dataclass
class Reliability:
    """Sums over rows of one head, from which its probability metrics follow; sums of several parts add up."""

    nll: float = 0.0
    """Of the natural logarithm of the probability of the true class, negated."""
    brier: float = 0.0
    """Of the squared distance between the probabilities of all classes and the truth."""
    rows: list[int] = field(default_factory=lambda: [0] * BINS)
    """By probability of the answer, in bins of equal width over 0..1."""
    probability: list[float] = field(default_factory=lambda: [0.0] * BINS)
    """Probabilities of the answers, added up in the same bins."""
    right: list[int] = field(default_factory=lambda: [0] * BINS)
    """Right answers in the same bins."""

    @classmethod
    def of(cls, probability: Floats, right: npt.NDArray[np.bool_], nll: Floats, brier: Floats) -> "Reliability":
        """Of n rows: probability of the answer, whether it is right, and the two scores of each row, all [n]."""
        bins = np.minimum((probability * BINS).astype(np.int64), BINS - 1)
        return cls(
            nll=float(nll.sum(dtype=np.float64)),
            brier=float(brier.sum(dtype=np.float64)),
            rows=np.bincount(bins, minlength=BINS).tolist(),
            probability=np.bincount(bins, probability.astype(np.float64), BINS).tolist(),
            right=np.bincount(bins[right], minlength=BINS).tolist(),
        )

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Reliability":
        return cls(**value)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def add(self, other: "Reliability") -> None:
        """Add the sums of other rows."""
        self.nll += other.nll
        self.brier += other.brier
        for name in ("rows", "probability", "right"):
            setattr(self, name, [a + b for a, b in zip(getattr(self, name), getattr(other, name), strict=True)])

    @property
    def total(self) -> int:
        return sum(self.rows)

    def metrics(self) -> dict[str, float | None]:
        """`nll` in nats, `brier` in 0..2, `ece` (expected calibration error) in 0..1: means over the rows, None of no rows."""
        if not self.total:
            return {"nll": None, "brier": None, "ece": None}
        gaps = np.abs(np.array(self.probability) - np.array(self.right))
        return {"nll": self.nll / self.total, "brier": self.brier / self.total, "ece": float(gaps.sum() / self.total)}


def auroc(probability: Floats, right: npt.NDArray[np.bool_]) -> float | None:
    """The chance that a right answer has a higher probability than a wrong one, ties counting half: [n] and [n].

    The area under the ROC curve of "the answer is right". None where all answers are right, or all are wrong.
    """
    values, places = np.unique(probability, return_inverse=True)
    positive = np.bincount(places[right], minlength=len(values))
    negative = np.bincount(places[~right], minlength=len(values))
    pairs = int(positive.sum()) * int(negative.sum())
    below = np.cumsum(negative) - negative
    return float((positive * (below + negative / 2)).sum() / pairs) if pairs else None
