"""Counts and sums over rows, added up over workers, divided once at the end. Nothing of Ray."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mnistsum_ray.data.sampling import check_row_counts
from mnistsum_ray.model.distributed import all_reduce_sum
from mnistsum_ray.model.network import TwoHeadCNN


@dataclass(frozen=True)
class Metrics:
    """What a model scored on a set of rows, each paired with all ten numbers."""

    rows: int
    pairs: int
    loss: float
    """Mean over the pairs of (digit cross-entropy + sum cross-entropy) / 2, in nats."""
    digit_accuracy: float
    sum_accuracy: float


class MetricAccumulator:
    """Adds up what `Metrics` needs, batch by batch, on the device; asks the other workers only at the end."""

    def __init__(self, device: torch.device) -> None:
        self._rows = 0
        self._counts = torch.zeros(3, dtype=torch.int64, device=device)  # row ids added up, digits right, sums right
        self._losses = torch.zeros(2, dtype=torch.float64, device=device)  # of the digits, of the sums

    def add(self, model: TwoHeadCNN, digit_scores: Tensor, digits: Tensor, row_ids: Tensor) -> None:
        """Count one batch: digit scores [n, 10], digits int64[n], row ids int64[n]."""
        digit_scores = digit_scores.float()
        sum_scores = model.sum_scores_of_all_numbers(digit_scores).float()
        sums = digits[:, None] + torch.arange(10, device=digits.device)
        digit_loss = F.cross_entropy(digit_scores, digits, reduction="sum")
        sum_loss = F.cross_entropy(sum_scores.flatten(0, 1), sums.flatten(), reduction="sum")
        digits_right = (digit_scores.argmax(1) == digits).sum()
        sums_right = (sum_scores.argmax(2) == sums).sum()
        self._rows += len(digits)
        self._counts += torch.stack([row_ids.sum(), digits_right, sums_right])
        self._losses += torch.stack([digit_loss, sum_loss])

    def scores(self, expected_rows: int, expected_id_sum: int) -> Metrics:
        """Add up over the workers and divide.

        Raises:
            RowCountError: not every row was counted exactly once.
        """
        counts = torch.cat([torch.tensor([self._rows], device=self._counts.device), self._counts])
        rows, id_sum, digits_right, sums_right = all_reduce_sum(counts).tolist()
        digit_loss, sum_loss = all_reduce_sum(self._losses).tolist()
        check_row_counts(rows, id_sum, expected_rows, expected_id_sum, "evaluation")
        pairs = rows * 10
        return Metrics(
            rows=rows,
            pairs=pairs,
            loss=(digit_loss / rows + sum_loss / pairs) / 2,
            digit_accuracy=digits_right / rows,
            sum_accuracy=sums_right / pairs,
        )


def within_one_standard_error(accuracy: float, earlier: Iterable[float], rows: int) -> bool:
    """Whether no earlier accuracy, measured on the same rows, is better by more than one standard error.

    By this rule (Breiman et al., "Classification and Regression Trees", 1984) the last epoch stands, at which the learning rate
    has come down, unless validation rows speak against it. The highest accuracy of many is that of the luckiest epoch.
    """
    best = max(earlier, default=0.0)
    return accuracy >= best - math.sqrt(best * (1 - best) / rows)
