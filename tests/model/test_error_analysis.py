"""The error analysis equals a computation row by row."""

import contextlib

import numpy as np
import pytest
import torch

from mnistsum_ray.data.order import RowRanges
from mnistsum_ray.model.error_analysis import BATCH, MAX_MISTAKES, ErrorAnalysis, analyse_errors
from mnistsum_ray.model.evaluation import MetricAccumulator, Metrics, PairScores
from mnistsum_ray.model.network import TwoHeadCNN, prepare_images

ROWS = 700
FIRST = 1000
"""First row id: ids differ from positions in the arrays."""


@pytest.fixture(scope="module")
def rows() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {"image": random.integers(0, 256, (ROWS, 28, 28)).astype(np.uint8), "digit": random.integers(0, 10, ROWS)}


@pytest.fixture(scope="module")
def model() -> TwoHeadCNN:
    torch.manual_seed(0)
    return TwoHeadCNN().eval()


@pytest.fixture(scope="module")
def analysis(model: TwoHeadCNN, rows: dict[str, np.ndarray]) -> ErrorAnalysis:
    numbered = rows | {"row_id": np.arange(FIRST, FIRST + ROWS)}
    batches = ({name: values[start : start + BATCH] for name, values in numbered.items()} for start in range(0, ROWS, BATCH))
    return analyse_errors(model, batches, contextlib.nullcontext())


@torch.no_grad()
def evaluated(model: TwoHeadCNN, rows: dict[str, np.ndarray]) -> Metrics:
    scores = PairScores.from_digit_scores(model, model.digit_scores(prepare_images(torch.from_numpy(rows["image"]))))
    accumulator = MetricAccumulator(torch.device("cpu"))
    accumulator.add(scores, torch.from_numpy(rows["digit"]), torch.arange(ROWS))
    return accumulator.metrics(ROWS, RowRanges.of([0], [ROWS]).id_sum)


def test_counts_agree_with_the_metrics(model: TwoHeadCNN, rows: dict[str, np.ndarray], analysis: ErrorAnalysis) -> None:
    metrics = evaluated(model, rows)
    confusion = np.array(analysis.confusion)
    assert confusion.sum(1).tolist() == np.bincount(rows["digit"], minlength=10).tolist()
    assert np.trace(confusion) / ROWS == pytest.approx(metrics.digit_accuracy)
    assert np.sum(analysis.sums_right) / (10 * ROWS) == pytest.approx(metrics.sum_accuracy)
    assert analysis.consistent == pytest.approx(metrics.consistency)


def test_most_confident_mistakes_come_first_one_an_image(
    model: TwoHeadCNN, rows: dict[str, np.ndarray], analysis: ErrorAnalysis
) -> None:
    assert len(analysis.mistakes) == MAX_MISTAKES == len({mistake.row_id for mistake in analysis.mistakes})
    confidences = []
    for row in range(ROWS):
        image = torch.from_numpy(rows["image"][row : row + 1]).expand(10, 28, 28)
        with torch.no_grad():
            heads = [scores.softmax(1).max(1) for scores in model(prepare_images(image), torch.arange(10))]
        wrong = [heads[0].indices != rows["digit"][row], heads[1].indices != rows["digit"][row] + torch.arange(10)]
        digit, total = [(head.values * mask).max().item() for head, mask in zip(heads, wrong, strict=True)]
        confidences.append(digit or total)
    expected = sorted(confidences, reverse=True)[:MAX_MISTAKES]
    assert [mistake.confidence for mistake in analysis.mistakes] == pytest.approx(expected, abs=1e-4)
    for mistake in analysis.mistakes:
        assert mistake.digit == rows["digit"][mistake.row_id - FIRST]
        assert mistake.pred_digit != mistake.digit or mistake.pred_sum != mistake.digit + mistake.number
