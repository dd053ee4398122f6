"""Metrics of a model on images whose digit is known, each paired with all ten numbers."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mnistsum_ray.data.order import NUMBERS, check_row_counts, mix_ids
from mnistsum_ray.model.distributed import all_reduce_sum
from mnistsum_ray.model.network import TwoHeadCNN


@dataclass(frozen=True)
class PairScores:
    """Scores of both heads for n images, each paired with every number 0..9.

    All ten numbers, and not one random number an image: the sum accuracy then has no luck in it. The convolutions, nearly all of
    the work, run once an image.
    """

    digit: Tensor
    """Digit scores (logits), float32[n, 10]."""
    sum: Tensor
    """Sum scores (logits) by number, float32[n, 10, 19]."""

    @classmethod
    def from_digit_scores(cls, model: TwoHeadCNN, digit_scores: Tensor) -> "PairScores":
        """Run the sum head on digit scores [n, 10]: in float32, also where the convolutions ran in bfloat16."""
        digit_scores = digit_scores.float()
        return cls(digit_scores, model.scores_of_all_numbers(digit_scores)[1].float())

    @property
    def digits(self) -> Tensor:
        """Predicted digits, int64[n]."""
        return self.digit.argmax(1)

    @property
    def sums(self) -> Tensor:
        """Predicted sums by number, int64[n, 10]."""
        return self.sum.argmax(2)


def sums_by_number(digits: Tensor) -> Tensor:
    """Digits int64[n] plus each number 0..9: int64[n, 10]."""
    return digits[:, None] + torch.arange(NUMBERS, device=digits.device)


@dataclass(frozen=True)
class Metrics:
    """Metrics over a set of rows, each paired with all ten numbers."""

    rows: int
    pairs: int
    loss: float
    """Mean over the pairs of (digit cross-entropy + sum cross-entropy) / 2, in nats."""
    digit_accuracy: float
    sum_accuracy: float
    consistency: float
    """Share of the pairs whose predicted sum is the predicted digit plus the number."""


class MetricAccumulator:
    """Sums that `Metrics` are computed from, kept on the device; the workers exchange them once, at the end."""

    def __init__(self, device: torch.device) -> None:
        # Rows, sum of their scrambled ids, right digits, right sums, consistent pairs.
        self._counts = torch.zeros(5, dtype=torch.int64, device=device)
        # Cross-entropies of the digits and of the sums, in nats.
        self._losses = torch.zeros(2, dtype=torch.float64, device=device)

    def add(self, scores: PairScores, digits: Tensor, row_ids: Tensor) -> None:
        """Add one batch: its scores, true digits int64[n] and row ids int64[n]."""
        true_sums, predicted_digits, predicted_sums = sums_by_number(digits), scores.digits, scores.sums
        counts = [
            torch.tensor(len(digits), device=digits.device),
            mix_ids(row_ids).sum(),
            (predicted_digits == digits).sum(),
            (predicted_sums == true_sums).sum(),
            (predicted_sums == sums_by_number(predicted_digits)).sum(),
        ]
        losses = [
            F.cross_entropy(scores.digit, digits, reduction="sum"),
            F.cross_entropy(scores.sum.flatten(0, 1), true_sums.flatten(), reduction="sum"),
        ]
        self._counts += torch.stack(counts)
        self._losses += torch.stack(losses)

    def metrics(self, expected_rows: int, expected_id_sum: int) -> Metrics:
        """Sum over the workers and divide.

        Raises:
            RowCountError: a row was not counted exactly once.
        """
        rows, id_sum, digits_right, sums_right, consistent = all_reduce_sum(self._counts).tolist()
        digit_loss, sum_loss = all_reduce_sum(self._losses).tolist()
        check_row_counts(rows, id_sum, expected_rows, expected_id_sum, "evaluation")
        pairs = rows * NUMBERS
        return Metrics(
            rows=rows,
            pairs=pairs,
            loss=(digit_loss / rows + sum_loss / pairs) / 2,
            digit_accuracy=digits_right / rows,
            sum_accuracy=sums_right / pairs,
            consistency=consistent / pairs,
        )
