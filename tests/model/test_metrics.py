"""Metrics, error analysis and calibration equal a plain computation."""

from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mnistsum_ray.data.randomness import RowTotals
from mnistsum_ray.model.heads import HEADS
from mnistsum_ray.model.metrics import (
    MAX_MISTAKES,
    RELIABILITY_BINS,
    AnswerCounts,
    Metrics,
    RowsWithLogits,
    analyse_errors,
    fit_temperature,
    fit_temperatures,
)
from mnistsum_ray.model.network import prepare_images
from tests.model import new_model, random_rows

ROWS = 300
FIRST = 70_000_000
"""First row id: ids differ from positions in the arrays."""

IMAGES, DIGITS, _ = random_rows(ROWS)


@cache
def digit_logits() -> torch.Tensor:
    with torch.no_grad():
        return new_model().digit_logits(prepare_images(IMAGES))


@cache
def rows_with_logits() -> RowsWithLogits:
    """The rows in three batches."""
    ids = torch.arange(FIRST, FIRST + ROWS)
    columns = [torch.split(values, 128) for values in (IMAGES, DIGITS, ids, digit_logits())]
    batches = []
    for images, digits, ids, logits in zip(*columns, strict=True):
        batch = {"image": images, "digit": digits, "row_id": ids}
        batches.append((batch, new_model().logits_of_all_numbers(logits)))
    return batches


def count(rows: RowsWithLogits, ids: np.ndarray) -> Metrics:
    counts = AnswerCounts(torch.device("cpu"))
    for batch, logits in rows:
        counts.add(batch, logits)
    return counts.metrics(RowTotals.of(ids))


@cache
def metrics() -> Metrics:
    return count(rows_with_logits(), np.arange(FIRST, FIRST + ROWS))


@torch.no_grad()
def test_metrics_equal_a_plain_computation_over_all_pairs() -> None:
    right, losses = 0, 0.0
    for number in range(10):
        numbers = torch.full((ROWS,), number)
        _, sum_logits, *_ = logits = new_model().logits(digit_logits(), numbers)
        right += int((sum_logits.argmax(1) == DIGITS + number).sum())
        for of_head, head in zip(logits, HEADS, strict=True):
            losses += F.cross_entropy(of_head, head.target(DIGITS, number)).item()
    expected = {
        "rows": ROWS,
        "pairs": 10 * ROWS,
        "loss": losses / 10 / len(HEADS),
        "digit_accuracy": (digit_logits().argmax(1) == DIGITS).double().mean().item(),
        "sum_accuracy": right / (10 * ROWS),
    }
    # Another order of sums may change an answer.
    assert metrics() == pytest.approx(expected, rel=1e-5, abs=0.001)


def test_the_error_analysis_agrees_with_the_metrics() -> None:
    analysis, images = analyse_errors(rows_with_logits(), {"digit": 1.0, "sum": 2.0})
    confusion = np.array(analysis["confusion"])
    assert confusion.sum(1).tolist() == np.bincount(DIGITS, minlength=10).tolist()
    assert np.trace(confusion) / ROWS == pytest.approx(metrics()["digit_accuracy"])
    for name, pairs in (("digit", ROWS), ("sum", 10 * ROWS)):
        counts = analysis["probabilities"][name]["reliability"]
        assert sum(counts["rows"]) == pairs
        assert sum(counts["right"]) / pairs == pytest.approx(metrics()[f"{name}_accuracy"])

    probability, answer = (values.numpy() for values in digit_logits().softmax(1).max(1))
    right = answer == DIGITS.numpy()
    bins = (probability * RELIABILITY_BINS).astype(int)
    gaps = [abs((probability - right)[bins == index].sum()) for index in range(RELIABILITY_BINS)]
    assert analysis["probabilities"]["digit"]["ece"] == pytest.approx(sum(gaps) / ROWS)

    mistakes = analysis["mistakes"]
    assert len(mistakes) == MAX_MISTAKES == len({mistake["row_id"] for mistake in mistakes})
    expected = np.sort(probability * ~right)[::-1][:MAX_MISTAKES]
    for mistake, image, least in zip(mistakes, images, expected, strict=True):
        row, digit, number = mistake["row_id"] - FIRST, mistake["digit"], mistake["number"]
        assert max(mistake["digit_prob"], mistake["sum_prob"]) >= least - 1e-4
        assert digit == DIGITS[row]
        assert np.array_equal(image, IMAGES[row])
        assert (mistake["pred_digit"], mistake["pred_sum"]) != (digit, digit + number)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_the_fit_recovers_the_temperature_of_the_labels_and_minimizes_the_loss(
    temperature: float,
) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(20_000, 10, generator=generator)
    drawn = (logits / temperature).softmax(1).multinomial(1, generator=generator)
    labels = drawn.squeeze(1)
    fitted = fit_temperature(logits, labels)
    assert fitted == pytest.approx(temperature, rel=0.03)
    exact = logits.double()
    losses = [F.cross_entropy(exact / (fitted * by), labels).item() for by in (1, 1.02, 0.98)]
    assert losses[0] == min(losses)


@torch.no_grad()
def test_folded_temperatures_divide_the_logits() -> None:
    model, (images, _, numbers) = new_model(), random_rows(100)
    before = model(prepare_images(images), numbers)
    temperatures = fit_temperatures(rows_with_logits())
    model.fold_temperatures(temperatures)
    assert all(abs(temperature - 1) > 0.01 for temperature in temperatures.values())
    after = model(prepare_images(images), numbers)
    for head, logits, folded in zip(HEADS, before, after, strict=True):
        torch.testing.assert_close(folded, logits / temperatures[head.name], rtol=1e-5, atol=1e-5)
