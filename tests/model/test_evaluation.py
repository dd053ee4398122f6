"""Counts add up, and a count that does not is an error."""

import pytest
import torch
import torch.nn.functional as F

from mnistsum_ray.errors import RowCountError
from mnistsum_ray.model.evaluation import MetricAccumulator, within_one_standard_error
from mnistsum_ray.model.network import TwoHeadCNN

CPU = torch.device("cpu")


def test_scores_equal_a_plain_computation_over_all_pairs() -> None:
    torch.manual_seed(0)
    model = TwoHeadCNN()
    digits, ids = torch.randint(0, 10, (50,)), torch.arange(50) + 70_000_000
    digit_scores = 5 * F.one_hot(digits, 10).float() + torch.randn(50, 10)
    tally = MetricAccumulator(CPU)
    with torch.no_grad():
        for rows in (slice(0, 30), slice(30, 50)):
            tally.add(model, digit_scores[rows], digits[rows], ids[rows])
        scores = tally.scores(50, int(ids.sum()))
        right, losses = 0, 0.0
        for number in range(10):
            numbers = torch.full((50,), number)
            sums = model.sum_scores(digit_scores, numbers)
            right += int((sums.argmax(1) == digits + numbers).sum())
            losses += F.cross_entropy(sums, digits + numbers, reduction="sum").item()
    assert (scores.rows, scores.pairs) == (50, 500)
    assert scores.digit_accuracy == (digit_scores.argmax(1) == digits).float().mean().item()
    assert scores.sum_accuracy == right / 500
    assert scores.loss == pytest.approx((F.cross_entropy(digit_scores, digits).item() + losses / 500) / 2, rel=1e-5)


@pytest.mark.parametrize("ids", [[0, 1], [0, 1, 1], [0, 1, 2, 3]])
def test_a_row_lost_repeated_or_added_is_an_error(ids: list[int]) -> None:
    tally = MetricAccumulator(CPU)
    with torch.no_grad():
        tally.add(TwoHeadCNN(), torch.zeros(len(ids), 10), torch.zeros(len(ids), dtype=torch.int64), torch.tensor(ids))
    with pytest.raises(RowCountError, match="lost or repeated"):
        tally.scores(3, 0 + 1 + 2)


def test_an_epoch_is_as_good_as_any_within_one_standard_error() -> None:
    assert within_one_standard_error(0.0, [], 10_000)
    # The error of 0.99 on 9,900 rows is 0.001.
    assert within_one_standard_error(0.9891, [0.99, 0.5], 9_900)
    assert not within_one_standard_error(0.9889, [0.99, 0.5], 9_900)
    assert not within_one_standard_error(0.5, [0.9889, 0.99], 9_900)
    assert not within_one_standard_error(0.999, [1.0], 9_900)
    assert within_one_standard_error(1.0, [1.0], 9_900)
