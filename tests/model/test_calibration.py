"""Fitted temperatures and probability metrics equal their definitions."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mnistsum_ray.model.calibration import Temperatures, fit_temperature
from mnistsum_ray.model.loss import probability_losses
from mnistsum_ray.model.reliability import BINS, Reliability, auroc


def sampled(rows: int, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Scores of ten classes, and labels drawn from their distribution at this temperature."""
    random = np.random.default_rng(0)
    scores = random.normal(0, 3, (rows, 10))
    probabilities = np.exp(scores / temperature)
    probabilities /= probabilities.sum(1, keepdims=True)
    labels = (probabilities.cumsum(1) > random.random((rows, 1))).argmax(1)
    return scores.astype(np.float32), labels


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_fit_recovers_the_temperature_of_the_labels(temperature: float) -> None:
    scores, labels = sampled(20_000, temperature)
    assert fit_temperature(scores, labels) == pytest.approx(temperature, rel=0.03)


def test_fitted_temperature_minimizes_the_loss() -> None:
    scores, labels = sampled(20_000, 1.7)
    fitted = fit_temperature(scores, labels)

    def loss(temperature: float) -> float:
        return F.cross_entropy(torch.tensor(scores).double() / temperature, torch.tensor(labels)).item()

    assert loss(fitted) < min(loss(fitted * 1.02), loss(fitted / 1.02))


def test_temperature_is_bounded_if_no_row_is_wrong() -> None:
    scores = np.eye(10, dtype=np.float32)[np.arange(500) % 10] * 12
    assert 0.22 < fit_temperature(scores, np.arange(500) % 10) <= 1.0


@pytest.mark.parametrize("value", [None, {}, {"digit": 1.0}, {"digit": 1.0, "sum": "2"}, {"digit": math.nan, "sum": 1.0}])
def test_invalid_temperatures_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match="not a positive number"):
        Temperatures.from_json(value)


def test_temperatures_round_trip_through_json() -> None:
    assert Temperatures.from_json(Temperatures(1.5, 0.5).as_json()) == Temperatures(1.5, 0.5)


def metrics_by_definition(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
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


def reliability(scores: np.ndarray, labels: np.ndarray) -> Reliability:
    nll, brier = probability_losses(torch.tensor(scores), torch.tensor(labels))
    best = torch.tensor(scores).softmax(1).max(1)
    return Reliability.from_predictions(best.values.numpy(), best.indices.numpy() == labels, nll.numpy(), brier.numpy())


def test_metrics_equal_their_definitions() -> None:
    scores, labels = sampled(3_000, 1.5)
    assert reliability(scores, labels).metrics() == pytest.approx(metrics_by_definition(scores, labels), rel=1e-4)


def test_reliability_of_parts_adds_up() -> None:
    scores, labels = sampled(1_000, 1.0)
    total = Reliability()
    for part in (slice(0, 1), slice(1, 700), slice(700, 1_000)):
        total.add(Reliability.from_json(reliability(scores[part], labels[part]).as_json()))
    whole = reliability(scores, labels)
    assert (total.rows, total.right, total.total_rows) == (whole.rows, whole.right, 1_000)
    assert total.metrics() == pytest.approx(whole.metrics(), rel=1e-6)


def test_metrics_without_rows_are_none() -> None:
    assert Reliability().metrics() == {"nll": None, "brier": None, "ece": None}


def test_auroc_is_the_share_of_pairs_in_order() -> None:
    random = np.random.default_rng(0)
    probability, right = random.integers(0, 20, 300) / 20, random.random(300) < 0.7
    pairs = [(a > b) + (a == b) / 2 for a in probability[right] for b in probability[~right]]
    assert auroc(probability, right) == pytest.approx(np.mean(pairs))
    assert auroc(probability, np.ones(300, bool)) is None
