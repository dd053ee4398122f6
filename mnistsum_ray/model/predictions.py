"""Predictions of both heads with their probabilities, computed from scores."""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from mnistsum_ray.model.calibration import Temperatures
from mnistsum_ray.model.loss import probability_losses

PREDICTION_FIELDS: Final = pa.schema(
    {
        "pred_digit": pa.int8(),
        "digit_prob": pa.float32(),
        "pred_sum": pa.int8(),
        "sum_prob": pa.float32(),
        "consistent": pa.bool_(),  # pred_sum == pred_digit + number
    }
)
"""Columns that scoring adds to the input's, in their order. An output whose files have other columns is not resumed, see
`PredictionSpec`."""


@dataclass(frozen=True)
class ProbabilityLosses:
    """Losses of the probabilities of n rows, float32[n] each; 0 for rows without a label."""

    digit_nll: npt.NDArray[np.float32]
    digit_brier: npt.NDArray[np.float32]
    sum_nll: npt.NDArray[np.float32]
    sum_brier: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Predictions:
    """Most likely digit int8[n] and sum int8[n] of n rows, and the probability float32[n] of each."""

    digit: npt.NDArray[np.int8]
    digit_prob: npt.NDArray[np.float32]
    sum: npt.NDArray[np.int8]
    sum_prob: npt.NDArray[np.float32]
    losses: ProbabilityLosses | None = None
    """None if no labels were given."""

    def columns(self, numbers: npt.NDArray[np.int64]) -> tuple[npt.NDArray[Any], ...]:
        """Values of PREDICTION_FIELDS, [n] each; `numbers` are those of the rows."""
        return self.digit, self.digit_prob, self.sum, self.sum_prob, self.sum == self.digit + numbers

    @classmethod
    def from_scores(
        cls,
        digit_scores: Tensor,
        sum_scores: Tensor,
        temperatures: Temperatures,
        numbers: npt.NDArray[np.int64],
        labels: npt.NDArray[np.int64] | None = None,
    ) -> "Predictions":
        """Predict n rows from their scores.

        Args:
            digit_scores, sum_scores: logits float32[n, 10] and float32[n, 19], on any device, where all is computed.
            temperatures: divisors of the scores.
            numbers: int64[n] in 0..9.
            labels: true digits int64[n], -1 where unknown; if given, the predictions have losses.
        """
        digit_scores, sum_scores = digit_scores / temperatures.digit, sum_scores / temperatures.sum
        (digit_prob, digit), (sum_prob, total) = (scores.softmax(1).max(1) for scores in (digit_scores, sum_scores))
        columns = [digit, total, digit_prob, sum_prob]
        if labels is not None:
            device = digit_scores.device
            known, digits = torch.tensor(labels >= 0, device=device), torch.tensor(np.maximum(labels, 0), device=device)
            sums = digits + torch.tensor(numbers, device=device)
            losses = (*probability_losses(digit_scores, digits), *probability_losses(sum_scores, sums))
            columns += [loss * known for loss in losses]
        # Digits and sums are exact in float32.
        digit_, total_, digit_prob_, sum_prob_, *losses_ = torch.stack([column.float() for column in columns]).cpu().numpy()
        of_losses = ProbabilityLosses(*losses_) if losses_ else None
        return cls(digit_.astype(np.int8), digit_prob_, total_.astype(np.int8), sum_prob_, of_losses)

    def slice(self, start: int, end: int) -> "Predictions":
        """Predictions of rows start..end-1."""
        rows = slice(start, end)
        losses = self.losses and ProbabilityLosses(**{name: value[rows] for name, value in vars(self.losses).items()})
        return Predictions(self.digit[rows], self.digit_prob[rows], self.sum[rows], self.sum_prob[rows], losses)
