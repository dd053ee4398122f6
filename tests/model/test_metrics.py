"""Metrics, error analysis and calibration metrics equal a plain computation, and wrong row counts raise an error."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mnistsum_ray.data.order import RowRanges
from mnistsum_ray.errors import RowCountError
from mnistsum_ray.model.loss import probability_losses
from mnistsum_ray.model.metrics import (
    BINS,
    MAX_MISTAKES,
    Batch,
    Counts,
    ErrorAnalysis,
    Metrics,
    Reliability,
    ScoredRows,
    analyse_errors,
    score_rows,
)
from mnistsum_ray.model.network import TwoHeadCNN, prepare_images
from tests.model.test_calibration import sampled

CPU = torch.device("cpu")
ROWS = 700
FIRST = 70_000_000
"""First row id: ids differ from positions in the arrays."""


@pytest.fixture(scope="module")
def model() -> TwoHeadCNN:
    torch.manual_seed(0)
    return TwoHeadCNN().eval()


@pytest.fixture(scope="module")
def rows() -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (ROWS, 28, 28), dtype=torch.uint8, generator=generator)
    digits = torch.randint(0, 10, (ROWS,), generator=generator)
    return {"image": images, "digit": digits, "row_id": torch.arange(FIRST, FIRST + ROWS)}


@pytest.fixture(scope="module")
def scored(model: TwoHeadCNN, rows: Batch) -> ScoredRows:
    """In three batches."""

    def digit_scores(batch: Batch) -> torch.Tensor:
        return model.digit_scores(prepare_images(batch["image"]))

    batches = [{name: values[start : start + 256] for name, values in rows.items()} for start in range(0, ROWS, 256)]
    return list(score_rows(model, digit_scores, batches))


@pytest.fixture(scope="module")
def metrics(scored: ScoredRows) -> Metrics:
    counts = Counts(CPU)
    for batch, scores in scored:
        counts.add(batch, scores)
    return counts.metrics(ROWS, RowRanges.of([FIRST], [FIRST + ROWS]).id_sum)


@pytest.fixture(scope="module")
def analysis(scored: ScoredRows) -> ErrorAnalysis:
    return analyse_errors(scored)


@torch.no_grad()
def test_metrics_equal_a_plain_computation_over_all_pairs(model: TwoHeadCNN, rows: Batch, metrics: Metrics) -> None:
    digits, digit_scores = rows["digit"], model.digit_scores(prepare_images(rows["image"]))
    right, consistent, losses = 0, 0, 0.0
    for number in range(10):
        sum_scores = model.sum_scores(digit_scores, torch.full((ROWS,), number))
        right += int((sum_scores.argmax(1) == digits + number).sum())
        consistent += int((sum_scores.argmax(1) == digit_scores.argmax(1) + number).sum())
        losses += F.cross_entropy(sum_scores, digits + number, reduction="sum").item()
    assert (metrics.rows, metrics.pairs) == (ROWS, 10 * ROWS)
    assert metrics.digit_accuracy == pytest.approx((digit_scores.argmax(1) == digits).double().mean().item(), abs=0.005)
    assert (metrics.sum_accuracy, metrics.consistency) == pytest.approx((right / 7000, consistent / 7000), abs=0.001)
    assert right != consistent
    assert metrics.loss == pytest.approx((F.cross_entropy(digit_scores, digits).item() + losses / 7000) / 2, rel=1e-5)


@pytest.mark.parametrize("ids", [[0, 1], [0, 1, 1], [0, 1, 2, 3]])
def test_lost_repeated_and_extra_rows_are_errors(ids: list[int]) -> None:
    counts = Counts(CPU)
    batch = {"digit": torch.zeros(len(ids), dtype=torch.int64), "row_id": torch.tensor(ids)}
    for rows, scores in score_rows(TwoHeadCNN(), lambda batch: torch.zeros(len(ids), 10), [batch]):
        counts.add(rows, scores)
    with pytest.raises(RowCountError, match="lost or repeated"):
        counts.metrics(3, 0 + 1 + 2)


def test_the_error_analysis_agrees_with_the_metrics(rows: Batch, metrics: Metrics, analysis: ErrorAnalysis) -> None:
    confusion = np.array(analysis.confusion)
    assert confusion.sum(1).tolist() == np.bincount(rows["digit"], minlength=10).tolist()
    assert np.trace(confusion) / ROWS == pytest.approx(metrics.digit_accuracy)
    assert np.sum(analysis.sums_right) / (10 * ROWS) == pytest.approx(metrics.sum_accuracy)
    assert analysis.consistent == pytest.approx(metrics.consistency)
    assert {name: sum(sums.rows) for name, sums in analysis.reliability.items()} == {"digit": ROWS, "sum": 10 * ROWS}
    assert sum(analysis.reliability["sum"].right) == np.sum(analysis.sums_right)


def test_most_confident_mistakes_come_first_one_an_image(model: TwoHeadCNN, rows: Batch, analysis: ErrorAnalysis) -> None:
    assert len(analysis.mistakes) == MAX_MISTAKES == len({mistake.row_id for mistake in analysis.mistakes})
    confidences = []
    for image, true_digit in zip(rows["image"], rows["digit"], strict=True):
        with torch.no_grad():
            heads = [scores.softmax(1).max(1) for scores in model(prepare_images(image.expand(10, 28, 28)), torch.arange(10))]
        wrong = [heads[0].indices != true_digit, heads[1].indices != true_digit + torch.arange(10)]
        digit, total = [(head.values * mask).max().item() for head, mask in zip(heads, wrong, strict=True)]
        confidences.append(digit or total)
    expected = sorted(confidences, reverse=True)[:MAX_MISTAKES]
    assert [mistake.confidence for mistake in analysis.mistakes] == pytest.approx(expected, abs=1e-4)
    for mistake in analysis.mistakes:
        assert mistake.digit == rows["digit"][mistake.row_id - FIRST]
        assert mistake.pred_digit != mistake.digit or mistake.pred_sum != mistake.digit + mistake.number


def probability_metrics_by_definition(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Row by row, class by class."""
    nll = brier = 0.0
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(BINS)]
    for row, label in zip(scores.astype(float), labels, strict=True):
        probabilities = [math.exp(score) for score in row]
        probabilities = [probability / sum(probabilities) for probability in probabilities]
        nll -= math.log(probabilities[label])
        brier += sum((probability - (index == label)) ** 2 for index, probability in enumerate(probabilities))
        answer = max(range(10), key=probabilities.__getitem__)
        bins[min(BINS - 1, int(probabilities[answer] * BINS))].append((probabilities[answer], answer == label))
    gaps = [abs(sum(probability for probability, _ in rows) - sum(right for _, right in rows)) for rows in bins]
    return {"nll": nll / len(labels), "brier": brier / len(labels), "ece": sum(gaps) / len(labels)}


def test_probability_metrics_equal_their_definitions() -> None:
    scores, labels = sampled(3_000, 1.5)
    found = Reliability.from_scores(scores[:, None], labels[:, None]).metrics()
    assert found == pytest.approx(probability_metrics_by_definition(scores.numpy(), labels.numpy()), rel=1e-4)
    nll, brier = (losses.mean().item() for losses in probability_losses(scores, labels))
    assert (found["nll"], found["brier"]) == pytest.approx((nll, brier), rel=1e-4)


def test_reliability_of_parts_adds_up() -> None:
    scores, labels = (values[:, None] for values in sampled(1_000, 1.0))
    total, whole = Reliability(), Reliability.from_scores(scores, labels)
    for part in (slice(0, 1), slice(1, 700), slice(700, 1_000)):
        total.add(Reliability(**Reliability.from_scores(scores[part], labels[part]).as_json()["reliability"]))
    assert (total.rows, total.right, sum(total.rows)) == (whole.rows, whole.right, 1_000)
    assert total.metrics() == pytest.approx(whole.metrics(), rel=1e-6)


def test_metrics_without_rows_are_none() -> None:
    assert Reliability().metrics() == {"nll": None, "brier": None, "ece": None}
