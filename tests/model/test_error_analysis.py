"""What a model gets wrong, counted the slow way beside it."""

import contextlib

import numpy as np
import pytest
import torch

from mnistsum_ray.data.sampling import RowIds
from mnistsum_ray.model.error_analysis import MISTAKES, ErrorAnalysis, analyse_errors
from mnistsum_ray.model.evaluation import MetricAccumulator
from mnistsum_ray.model.network import TwoHeadCNN, prepare_images

ROWS = 700
FIRST = 1000
"""Row ids are not places."""


@pytest.fixture(scope="module")
def rows() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {"image": random.integers(0, 256, (ROWS, 28, 28)).astype(np.uint8), "digit": random.integers(0, 10, ROWS)}


@pytest.fixture(scope="module")
def model() -> TwoHeadCNN:
    torch.manual_seed(0)
    return TwoHeadCNN().eval()


@pytest.fixture(scope="module")
def found(model: TwoHeadCNN, rows: dict[str, np.ndarray]) -> ErrorAnalysis:
    def rows_of(row_ids: RowIds) -> dict[str, np.ndarray]:
        return {name: values[row_ids - FIRST] for name, values in rows.items()}

    return analyse_errors(model, rows_of, np.arange(FIRST, FIRST + ROWS), contextlib.nullcontext())


def test_every_row_and_pair_is_counted_as_the_evaluation_counts_it(
    model: TwoHeadCNN, rows: dict[str, np.ndarray], found: ErrorAnalysis
) -> None:
    tally = MetricAccumulator(torch.device("cpu"))
    images, digits = torch.from_numpy(rows["image"]), torch.from_numpy(rows["digit"])
    with torch.no_grad():
        tally.add(model, model.digit_scores(prepare_images(images)), digits, torch.arange(ROWS))
    scores = tally.scores(ROWS, sum(range(ROWS)))
    confusion = np.array(found.confusion)
    assert confusion.sum(1).tolist() == np.bincount(rows["digit"], minlength=10).tolist()
    assert np.trace(confusion) / ROWS == pytest.approx(scores.digit_accuracy)
    assert np.sum(found.sums_right) / (10 * ROWS) == pytest.approx(scores.sum_accuracy)


def test_the_surest_mistakes_come_first_one_an_image(
    model: TwoHeadCNN, rows: dict[str, np.ndarray], found: ErrorAnalysis
) -> None:
    assert len(found.mistakes) == MISTAKES == len({one.row_id for one in found.mistakes})
    surest = []
    for row in range(ROWS):
        image = torch.from_numpy(rows["image"][row : row + 1]).expand(10, 28, 28)
        with torch.no_grad():
            heads = [scores.softmax(1).max(1) for scores in model(prepare_images(image), torch.arange(10))]
        wrong = [heads[0].indices != rows["digit"][row], heads[1].indices != rows["digit"][row] + torch.arange(10)]
        digit, total = [(head.values * bad).max().item() for head, bad in zip(heads, wrong, strict=True)]
        surest.append(digit or total)
    expected = sorted(surest, reverse=True)[:MISTAKES]
    shown = [one.digit_prob if one.pred_digit != one.digit else one.sum_prob for one in found.mistakes]
    assert shown == pytest.approx(expected, abs=1e-4)
    for one in found.mistakes:
        assert one.digit == rows["digit"][one.row_id - FIRST]
        assert one.pred_digit != one.digit or one.pred_sum != one.digit + one.number
