"""Probability metrics of one head: negative log-likelihood, Brier score, calibration error and AUROC.

These functions use NumPy alone, so that the scoring driver can add up the sums of many files without importing PyTorch.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from mnistsum_ray.model.calibration import Floats

BINS: Final = 15
"""Bins of equal width over the probability 0..1, as in Guo et al. (2017)."""


@dataclass
class Reliability:
    """Sums over rows that the metrics are computed from; sums of several sets of rows can be added."""

    nll: float = 0.0
    """Sum of the negative log-likelihoods of the true classes, in nats."""
    brier: float = 0.0
    """Sum of the squared distances between the probabilities of all classes and the one-hot truth."""
    rows: list[int] = field(default_factory=lambda: [0] * BINS)
    """Number of rows by the probability of the predicted class, in bins."""
    probability: list[float] = field(default_factory=lambda: [0.0] * BINS)
    """Sum of the probabilities of the predicted classes, in the same bins."""
    right: list[int] = field(default_factory=lambda: [0] * BINS)
    """Number of right predictions, in the same bins."""

    @classmethod
    def from_predictions(cls, probability: Floats, right: npt.NDArray[np.bool_], nll: Floats, brier: Floats) -> "Reliability":
        """Sum over n rows.

        Args:
            probability: probability of each predicted class, [n].
            right: True where the prediction is right, [n].
            nll, brier: losses of each row, [n].
        """
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
        """Add the sums over other rows, in place."""
        self.nll += other.nll
        self.brier += other.brier
        for name in ("rows", "probability", "right"):
            setattr(self, name, [a + b for a, b in zip(getattr(self, name), getattr(other, name), strict=True)])

    @property
    def total_rows(self) -> int:
        return sum(self.rows)

    def metrics(self) -> dict[str, float | None]:
        """Mean `nll` in nats, mean `brier` in 0..2 and `ece` (expected calibration error) in 0..1; None without rows."""
        if not self.total_rows:
            return {"nll": None, "brier": None, "ece": None}
        gaps = np.abs(np.array(self.probability) - np.array(self.right))
        return {
            "nll": self.nll / self.total_rows,
            "brier": self.brier / self.total_rows,
            "ece": float(gaps.sum() / self.total_rows),
        }


def auroc(probability: Floats, right: npt.NDArray[np.bool_]) -> float | None:
    """Area under the ROC curve of "the prediction is right", with the probability of the prediction as its score.

    This is the chance that a right prediction has a higher probability than a wrong one; ties count half.

    Args:
        probability: probability of each predicted class, [n].
        right: True where the prediction is right, [n].

    Returns:
        0..1, or None if all predictions are right or all are wrong.
    """
    values, value_index = np.unique(probability, return_inverse=True)
    positive = np.bincount(value_index[right], minlength=len(values))
    negative = np.bincount(value_index[~right], minlength=len(values))
    pairs = int(positive.sum()) * int(negative.sum())
    negative_below = np.cumsum(negative) - negative
    return float((positive * (negative_below + negative / 2)).sum() / pairs) if pairs else None
