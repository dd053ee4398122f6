"""Counts and sums over rows, added up over workers, divided once at the end. Nothing of Ray."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mnistsum_ray.errors import RunFailed
from mnistsum_ray.model import TwoHeadCNN


def add_up(values: Tensor) -> Tensor:
    """The element-wise sum over all workers, on every worker (itself where there is no process group)."""
    if dist.is_initialized():
        values = values.clone()
        dist.all_reduce(values)
    return values


def same_everywhere(values: Iterable[Tensor]) -> None:
    """Have every worker go on with the values of rank 0: on unlike CPUs or GPUs they differ by roundings, which would grow."""
    if dist.is_initialized():
        for value in values:
            sent = value.detach().contiguous()
            dist.broadcast(sent, src=0)
            value.detach().copy_(sent)


@dataclass(frozen=True)
class Scores:
    """What a model scored on a set of rows, each paired with all ten numbers."""

    rows: int
    pairs: int
    loss: float
    """Mean over the pairs of (digit cross-entropy + sum cross-entropy) / 2, in nats."""
    digit_accuracy: float
    sum_accuracy: float


class Tally:
    """Adds up what `Scores` needs, batch by batch, on the device; asks the other workers only at the end."""

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

    def scores(self, expected_rows: int, expected_id_sum: int) -> Scores:
        """Add up over the workers and divide.

        Raises:
            RowsLost: not every row was counted exactly once.
        """
        counts = torch.cat([torch.tensor([self._rows], device=self._counts.device), self._counts])
        rows, id_sum, digits_right, sums_right = add_up(counts).tolist()
        digit_loss, sum_loss = add_up(self._losses).tolist()
        check_rows(rows, id_sum, expected_rows, expected_id_sum, "evaluation")
        pairs = rows * 10
        return Scores(
            rows=rows,
            pairs=pairs,
            loss=(digit_loss / rows + sum_loss / pairs) / 2,
            digit_accuracy=digits_right / rows,
            sum_accuracy=sums_right / pairs,
        )


def as_good(accuracy: float, earlier: Iterable[float], rows: int) -> bool:
    """Whether no earlier accuracy, measured on the same rows, is better by more than one standard error.

    By this rule (Breiman et al., "Classification and Regression Trees", 1984) the last epoch stands, at which the learning rate
    has come down, unless validation rows speak against it. The highest accuracy of many is that of the luckiest epoch.
    """
    best = max(earlier, default=0.0)
    return accuracy >= best - math.sqrt(best * (1 - best) / rows)


class RowsLost(RunFailed):
    """Rows were lost or seen twice, so what was computed from them cannot be trusted."""


def check_rows(rows: int, id_sum: int, expected_rows: int, expected_id_sum: int, where: str) -> None:
    """Refuse a count that is not the plan's; the sum of the row ids catches one row lost and another seen twice."""
    if (rows, id_sum) != (expected_rows, expected_id_sum):
        raise RowsLost(
            f"{where} saw {rows:,} rows (ids add up to {id_sum:,}), the plan has {expected_rows:,} "
            f"({expected_id_sum:,}): rows were lost or repeated, so this run cannot be trusted"
        )
