"""Analysed errors agree with the metrics, and the calibration equals a plain computation."""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mnistsum_ray.mnist.analysis import (
    MAX_MISTAKES,
    RELIABILITY_BINS,
    analyse_errors,
    fit_temperature,
    fit_temperatures,
)
from mnistsum_ray.mnist.report import draw_mistakes
from mnistsum_ray.task import Evaluated
from tests.mnist import new_model, random_rows, task

ROWS = 300
BATCH = random_rows(ROWS)
IMAGES, DIGITS = BATCH["image"], BATCH["digit"]
FIRST = int(BATCH["row_id"][0])


@cache
def rows_with_logits() -> Evaluated:
    """The rows in three batches, with their digit logits."""
    batches: Evaluated = []
    for start in (0, 128, 256):
        batch = {key: values[start : start + 128] for key, values in BATCH.items()}
        with torch.no_grad():
            batches.append((batch, new_model()({"image": batch["image"]})))
    return batches


@torch.no_grad()
def test_the_error_analysis_agrees_with_the_metrics() -> None:
    analysis, images = analyse_errors(new_model(), rows_with_logits())
    confusion = np.array(analysis["confusion"])
    assert confusion.sum(1).tolist() == np.bincount(DIGITS, minlength=10).tolist()
    right = {"digit_accuracy": 0, "sum_accuracy": 0}
    for batch, logits in rows_with_logits():
        measured = task().evaluate(new_model(), logits, batch)
        right = {name: count + int(measured[name].sum()) for name, count in right.items()}
    assert np.trace(confusion) * 10 == right["digit_accuracy"]
    for name, pairs, times in (("digit", ROWS, 10), ("sum", 10 * ROWS, 1)):
        counts = analysis["probabilities"][name]["reliability"]
        assert sum(counts["rows"]) == pairs
        assert sum(counts["right"]) * times == right[f"{name}_accuracy"]

    logits = torch.cat([logits for _, logits in rows_with_logits()])
    probability, answer = (values.numpy() for values in logits.softmax(1).max(1))
    is_right = answer == DIGITS.numpy()
    bins = (probability * RELIABILITY_BINS).astype(int)
    gaps = [abs((probability - is_right)[bins == one].sum()) for one in range(RELIABILITY_BINS)]
    assert analysis["probabilities"]["digit"]["ece"] == pytest.approx(sum(gaps) / ROWS)

    mistakes = analysis["mistakes"]
    assert len(mistakes) == MAX_MISTAKES == len({mistake["row_id"] for mistake in mistakes})
    expected = np.sort(probability * ~is_right)[::-1][:MAX_MISTAKES]
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
def test_a_calibrated_network_has_its_logits_divided_by_temperatures() -> None:
    model, batch = new_model(), random_rows(100)
    before = model(batch)
    temperatures = fit_temperatures(model, rows_with_logits())
    assert all(abs(temperature - 1) > 0.01 for temperature in temperatures.values())
    assert task().calibrate(model, rows_with_logits()) == {"temperatures_in_weights": temperatures}
    findings = task().finish(model, rows_with_logits(), rows_with_logits())
    assert {*findings.pictures} == {"mistakes.png", "reliability.png"}
    analysis: dict[str, Any] = findings.manifest["error_analysis"]
    errors = {name: head["ece"] for name, head in analysis["probabilities"].items()}
    assert findings.model["calibration_error"] == errors
    after = model(batch)
    for head, logits, folded in zip(temperatures, before, after, strict=True):
        torch.testing.assert_close(folded, logits / temperatures[head], rtol=1e-5, atol=1e-5)


def test_a_wrong_answer_is_named_with_the_right_one() -> None:
    mistake: dict[str, Any] = {"digit": 3, "number": 4}
    mistake |= {"pred_digit": 5, "digit_prob": 0.9, "pred_sum": 9, "sum_prob": 0.8}
    figure = draw_mistakes([mistake, mistake | {"pred_digit": 3}], IMAGES[:2].numpy())
    assert [axes.get_title() for axes in figure.axes[:2]] == [
        "image + 4\ndigit 5 (90%), not 3\nsum 9 (80%), not 7",
        "image + 4\ndigit 3 (90%)\nsum 9 (80%), not 7",
    ]
