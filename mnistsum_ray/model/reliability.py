"""Calibration of probabilities: counts over rows, and the error that follows. Needs no PyTorch."""

from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

RELIABILITY_BINS: Final = 15
"""Bins of equal width over the probability 0..1, as in Guo et al. (2017)."""


@dataclass
class Reliability:
    """Predictions of a head in bins of equal width by the probability of the predicted class."""

    rows: list[int] = field(default_factory=lambda: [0] * RELIABILITY_BINS)
    probability: list[float] = field(default_factory=lambda: [0.0] * RELIABILITY_BINS)
    """Sum of the probabilities in each bin."""
    right: list[int] = field(default_factory=lambda: [0] * RELIABILITY_BINS)

    @classmethod
    def of(cls, probability: npt.NDArray[np.floating[Any]], right: npt.NDArray[np.bool_]) -> "Reliability":
        """Count n rows: the probability of the predicted class, and whether it is right."""
        bins = (probability * RELIABILITY_BINS).astype(np.int64).clip(max=RELIABILITY_BINS - 1)
        rows = np.bincount(bins, minlength=RELIABILITY_BINS)
        sums = np.bincount(bins, probability.astype(np.float64), RELIABILITY_BINS)
        of_right = np.bincount(bins[right], minlength=RELIABILITY_BINS)
        return cls(rows.tolist(), sums.tolist(), of_right.tolist())

    def add(self, other: "Reliability") -> None:
        """Add the counts of other rows, in place."""
        for name, counts in vars(other).items():
            setattr(self, name, np.add(getattr(self, name), counts).tolist())

    @property
    def ece(self) -> float | None:
        """Expected calibration error: mean distance of probability and accuracy; None: no rows."""
        rows = sum(self.rows)
        gaps = np.abs(np.array(self.probability) - np.array(self.right))
        return float(gaps.sum() / rows) if rows else None

    def as_json(self) -> dict[str, Any]:
        """The error `ece`, and under `reliability` the counts behind it."""
        return {"ece": self.ece, "reliability": vars(self)}
