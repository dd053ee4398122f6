"""Metrics equal a plain computation over all pairs, and wrong row counts raise an error."""

import pytest
import torch
import torch.nn.functional as F

from mnistsum_ray.data.order import RowRanges
from mnistsum_ray.errors import RowCountError
from mnistsum_ray.model.evaluation import MetricAccumulator, PairScores
from mnistsum_ray.model.network import TwoHeadCNN

CPU = torch.device("cpu")


@torch.no_grad()
def test_metrics_equal_a_plain_computation_over_all_pairs() -> None:
    torch.manual_seed(0)
    model = TwoHeadCNN()
    digits, ids = torch.randint(0, 10, (50,)), torch.arange(50) + 70_000_000
    digit_scores = 5 * F.one_hot(digits, 10).float() + 2 * torch.randn(50, 10)
    accumulator = MetricAccumulator(CPU)
    for rows in (slice(0, 30), slice(30, 50)):
        accumulator.add(PairScores.from_digit_scores(model, digit_scores[rows]), digits[rows], ids[rows])
    metrics = accumulator.metrics(50, RowRanges.from_ids(ids.numpy()).id_sum)
    right, consistent, losses = 0, 0, 0.0
    for number in range(10):
        numbers = torch.full((50,), number)
        sum_scores = model.sum_scores(digit_scores, numbers)
        right += int((sum_scores.argmax(1) == digits + numbers).sum())
        consistent += int((sum_scores.argmax(1) == digit_scores.argmax(1) + numbers).sum())
        losses += F.cross_entropy(sum_scores, digits + numbers, reduction="sum").item()
    assert (metrics.rows, metrics.pairs) == (50, 500)
    assert metrics.digit_accuracy == (digit_scores.argmax(1) == digits).double().mean().item()
    assert (metrics.sum_accuracy, metrics.consistency) == (right / 500, consistent / 500)
    assert right != consistent
    assert metrics.loss == pytest.approx((F.cross_entropy(digit_scores, digits).item() + losses / 500) / 2, rel=1e-5)


@pytest.mark.parametrize("ids", [[0, 1], [0, 1, 1], [0, 1, 2, 3]])
def test_lost_repeated_and_extra_rows_are_errors(ids: list[int]) -> None:
    accumulator = MetricAccumulator(CPU)
    with torch.no_grad():
        scores = PairScores.from_digit_scores(TwoHeadCNN(), torch.zeros(len(ids), 10))
        accumulator.add(scores, torch.zeros(len(ids), dtype=torch.int64), torch.tensor(ids))
    with pytest.raises(RowCountError, match="lost or repeated"):
        accumulator.metrics(3, 0 + 1 + 2)
