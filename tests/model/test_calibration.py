"""Fitted temperatures minimize the loss, and folded into the weights they divide the scores."""

import pytest
import torch
import torch.nn.functional as F

from mnistsum_ray.model.calibration import fit_temperature, fit_temperatures, fold_temperatures
from mnistsum_ray.model.metrics import score_rows
from mnistsum_ray.model.network import TwoHeadCNN, prepare_images
from tests.model.test_optimizer import random_rows


def sampled(rows: int, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of ten classes, and labels drawn from their distribution at this temperature."""
    generator = torch.Generator().manual_seed(0)
    scores = 3 * torch.randn(rows, 10, generator=generator)
    return scores, (scores / temperature).softmax(1).multinomial(1, generator=generator).squeeze(1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_fit_recovers_the_temperature_of_the_labels(temperature: float) -> None:
    assert fit_temperature(*sampled(20_000, temperature)) == pytest.approx(temperature, rel=0.03)


def test_fitted_temperature_minimizes_the_loss() -> None:
    scores, labels = sampled(20_000, 1.7)
    fitted = fit_temperature(scores, labels)

    def loss(temperature: float) -> float:
        return F.cross_entropy(scores.double() / temperature, labels).item()

    assert loss(fitted) < min(loss(fitted * 1.02), loss(fitted / 1.02))


def test_temperature_is_bounded_if_no_row_is_wrong() -> None:
    labels = torch.arange(500) % 10
    assert 0.22 < fit_temperature(12 * F.one_hot(labels, 10).float(), labels) <= 1.0


def test_folded_temperatures_divide_the_scores_and_make_the_fit_one() -> None:
    torch.manual_seed(0)
    model = TwoHeadCNN().eval()
    images, digits, numbers = random_rows(200)
    batch = {"image": images, "digit": digits, "row_id": torch.arange(200)}

    def fit() -> dict[str, float]:
        return fit_temperatures(score_rows(model, lambda rows: model.digit_scores(prepare_images(rows["image"])), [batch]))

    with torch.no_grad():
        before = model(prepare_images(images), numbers)
        temperatures = fit()
        fold_temperatures(model, temperatures)
        after = model(prepare_images(images), numbers)
    assert all(abs(temperature - 1) > 0.01 for temperature in temperatures.values())
    for name, scores, folded in zip(("digit", "sum"), before, after, strict=True):
        torch.testing.assert_close(folded, scores / temperatures[name], rtol=1e-5, atol=1e-5)
    assert all(model.get_parameter(f"conv{index}.weight").is_contiguous(memory_format=torch.channels_last) for index in (1, 7))
