"""Fitted temperatures minimize the loss, and folded into the weights they divide the scores."""

import pytest
import torch
import torch.nn.functional as F

from mnistsum_ray.model.heads import HEADS
from mnistsum_ray.model.metrics import fit_temperature, fit_temperatures, score_rows
from mnistsum_ray.model.network import prepare_images
from mnistsum_ray.model.parts import find_parts
from tests.model import new_model, random_rows


def sampled(rows: int, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of ten classes, and labels drawn from their distribution at this temperature."""
    generator = torch.Generator().manual_seed(0)
    scores = 3 * torch.randn(rows, 10, generator=generator)
    return scores, (scores / temperature).softmax(1).multinomial(1, generator=generator).squeeze(1)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_the_fit_recovers_the_temperature_of_the_labels_and_minimizes_the_loss(temperature: float) -> None:
    scores, labels = sampled(20_000, temperature)
    fitted = fit_temperature(scores, labels)
    assert fitted == pytest.approx(temperature, rel=0.03)
    losses = [F.cross_entropy(scores.double() / (fitted * factor), labels).item() for factor in (1, 1.02, 1 / 1.02)]
    assert losses[0] == min(losses)


def test_temperature_is_bounded_if_no_row_is_wrong() -> None:
    labels = torch.arange(500) % 10
    assert 0.22 < fit_temperature(12 * F.one_hot(labels, 10).float(), labels) <= 1.0


@torch.no_grad()
def test_folded_temperatures_divide_the_scores() -> None:
    model = new_model().eval()
    images, digits, numbers = random_rows(100)
    batch = {"image": images, "digit": digits, "row_id": torch.arange(100)}
    before = model(prepare_images(images), numbers)
    temperatures = fit_temperatures(score_rows(model, [(batch, model.digit_scores(prepare_images(images)))]))
    find_parts(model).fold_temperatures(temperatures)
    assert all(abs(temperature - 1) > 0.01 for temperature in temperatures.values())
    for head, scores, folded in zip(HEADS, before, model(prepare_images(images), numbers), strict=True):
        torch.testing.assert_close(folded, scores / temperatures[head.name], rtol=1e-5, atol=1e-5)
    assert all(model.get_parameter(f"conv{index}.weight").is_contiguous(memory_format=torch.channels_last) for index in (1, 7))
