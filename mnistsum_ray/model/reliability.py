"""Calibration of probabilities: sums over rows, and the metrics that follow from them. Needs no PyTorch."""

from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

RELIABILITY_BINS: Final = 15
"""Bins of equal width over the probability 0..1, as in Guo et al. (2017)."""

Floats = npt.NDArray[np.floating[Any]]


@dataclass
class Reliability:
    """Sums over rows that the probability metrics of a head are computed from. The bins are by the probability of the predicted
    class."""

    nll: float = 0.0
    """Sum of the negative log-likelihoods of the true classes, in nats."""
    brier: float = 0.0
    """Sum of the Brier scores."""
    rows: list[int] = field(default_factory=lambda: [0] * RELIABILITY_BINS)
    """Number of rows in each bin."""
    probability: list[float] = field(default_factory=lambda: [0.0] * RELIABILITY_BINS)
    """Sum of the probabilities of the predicted classes in each bin."""
    right: list[int] = field(default_factory=lambda: [0] * RELIABILITY_BINS)
    """Number of right predictions in each bin."""

    @classmethod
    def from_predictions(cls, probability: Floats, right: npt.NDArray[np.bool_], nll: Floats, brier: Floats) -> "Reliability":
        """Sum over n rows: of each the probability of the predicted class, whether it is right, and its `probability_losses`."""
        bins = np.minimum((probability * RELIABILITY_BINS).astype(np.int64), RELIABILITY_BINS - 1)
        return cls(
            nll=float(nll.sum(dtype=np.float64)),
            brier=float(brier.sum(dtype=np.float64)),
            rows=np.bincount(bins, minlength=RELIABILITY_BINS).tolist(),
            probability=np.bincount(bins, probability.astype(np.float64), RELIABILITY_BINS).tolist(),
            right=np.bincount(bins[right], minlength=RELIABILITY_BINS).tolist(),
        )

    def add(self, other: "Reliability") -> None:
        """Add the sums over other rows, in place."""
        for name, sums in vars(other).items():
            setattr(self, name, np.add(getattr(self, name), sums).tolist())

    def metrics(self) -> dict[str, float | None]:
        """Mean `nll` in nats, mean `brier` in 0..2 and `ece` (expected calibration error) in 0..1; None without rows."""
        rows = sum(self.rows)
        if not rows:
            return {"nll": None, "brier": None, "ece": None}
        gaps = np.abs(np.array(self.probability) - np.array(self.right))
        return {"nll": self.nll / rows, "brier": self.brier / rows, "ece": float(gaps.sum() / rows)}

    def as_json(self) -> dict[str, Any]:
        """The metrics, and under `reliability` the sums behind them."""
        return {**self.metrics(), "reliability": vars(self)}
