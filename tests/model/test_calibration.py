"""Temperatures and probability metrics, beside what they are by definition."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mnistsum_ray.model.calibration import BINS, Reliability, Temperatures, auroc, fit_temperature
from mnistsum_ray.model.loss import probability_losses


def sampled(rows: int, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Scores of ten classes, and labels drawn from their distribution at this temperature."""
    random = np.random.default_rng(0)
    scores = random.normal(0, 3, (rows, 10))
    chances = np.exp(scores / temperature)
    chances /= chances.sum(1, keepdims=True)
    labels = (chances.cumsum(1) > random.random((rows, 1))).argmax(1)
    return scores.astype(np.float32), labels


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_temperature_that_the_labels_were_drawn_with_is_found(temperature: float) -> None:
    scores, labels = sampled(20_000, temperature)
    assert fit_temperature(scores, labels) == pytest.approx(temperature, rel=0.03)


def test_the_fitted_temperature_gives_the_smallest_loss() -> None:
    scores, labels = sampled(20_000, 1.7)
    found = fit_temperature(scores, labels)

    def loss(temperature: float) -> float:
        return F.cross_entropy(torch.tensor(scores).double() / temperature, torch.tensor(labels)).item()

    assert loss(found) < min(loss(found * 1.02), loss(found / 1.02))


def test_where_no_row_is_wrong_the_temperature_stays_a_number() -> None:
    scores = np.eye(10, dtype=np.float32)[np.arange(500) % 10] * 12
    assert 0.22 < fit_temperature(scores, np.arange(500) % 10) <= 1.0


@pytest.mark.parametrize("value", [None, {}, {"digit": 1.0}, {"digit": 1.0, "sum": "2"}, {"digit": math.nan, "sum": 1.0}])
def test_what_is_no_temperature_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="not a positive number"):
        Temperatures.from_json(value)


def test_temperatures_come_back() -> None:
    assert Temperatures.from_json(Temperatures(1.5, 0.5).as_json()) == Temperatures(1.5, 0.5)


def metrics_by_definition(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Row by row, class by class."""
    nll = brier = 0.0
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(BINS)]
    for row, label in zip(scores.astype(float), labels, strict=True):
        chances = [math.exp(score) for score in row]
        chances = [chance / sum(chances) for chance in chances]
        nll -= math.log(chances[label])
        brier += sum((chance - (place == label)) ** 2 for place, chance in enumerate(chances))
        answer = max(range(10), key=chances.__getitem__)
        bins[min(BINS - 1, int(chances[answer] * BINS))].append((chances[answer], answer == label))
    gaps = [abs(sum(chance for chance, _ in one) - sum(right for _, right in one)) for one in bins]
    return {"nll": nll / len(labels), "brier": brier / len(labels), "ece": sum(gaps) / len(labels)}


def reliability_of(scores: np.ndarray, labels: np.ndarray) -> Reliability:
    nll, brier = probability_losses(torch.tensor(scores), torch.tensor(labels))
    best = torch.tensor(scores).softmax(1).max(1)
    return Reliability.of(best.values.numpy(), best.indices.numpy() == labels, nll.numpy(), brier.numpy())


def test_metrics_are_what_their_definitions_say() -> None:
    scores, labels = sampled(3_000, 1.5)
    assert reliability_of(scores, labels).metrics() == pytest.approx(metrics_by_definition(scores, labels), rel=1e-4)


def test_parts_add_up_to_the_whole() -> None:
    scores, labels = sampled(1_000, 1.0)
    total = Reliability()
    for part in (slice(0, 1), slice(1, 700), slice(700, 1_000)):
        total.add(Reliability.from_json(reliability_of(scores[part], labels[part]).as_json()))
    whole = reliability_of(scores, labels)
    assert (total.rows, total.right, total.total) == (whole.rows, whole.right, 1_000)
    assert total.metrics() == pytest.approx(whole.metrics(), rel=1e-6)


def test_no_rows_have_no_metrics() -> None:
    assert Reliability().metrics() == {"nll": None, "brier": None, "ece": None}


def test_auroc_is_the_share_of_pairs_in_the_right_order() -> None:
    random = np.random.default_rng(0)
    probability, right = random.integers(0, 20, 300) / 20, random.random(300) < 0.7
    pairs = [(a > b) + (a == b) / 2 for a in probability[right] for b in probability[~right]]
    assert auroc(probability, right) == pytest.approx(np.mean(pairs))
    assert auroc(probability, np.ones(300, bool)) is None
