"""The integer network computes what integers should, and answers as the float one does."""

import json

import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F

from mnistsum_ray.data.decoding import pixels_view
from mnistsum_ray.model.network import PIXEL_STD, TwoHeadCNN
from mnistsum_ray.model.quantization import activation_maxima, int8_forward, is_available, maxima_from_card, quantize

pytestmark = pytest.mark.skipif(not is_available(), reason="this PyTorch has no integer convolutions on this CPU")


@pytest.fixture(scope="module")
def images(sample: pa.Table) -> torch.Tensor:
    return torch.tensor(pixels_view(sample["image"].combine_chunks())[::25])


@pytest.fixture(scope="module")
def digits(sample: pa.Table) -> torch.Tensor:
    return torch.tensor(sample["digit"].to_pylist()[::25])


@pytest.fixture(scope="module")
def model() -> TwoHeadCNN:
    torch.manual_seed(0)
    return TwoHeadCNN().eval()


@torch.no_grad()
def in_exact_arithmetic(model: TwoHeadCNN, maxima: tuple[float, ...], images: torch.Tensor) -> torch.Tensor:
    """Digit scores by the definition: whole numbers in float64, which holds them all exactly."""
    x, scale = images.unsqueeze(1).double() - 33, 1 / (255 * PIXEL_STD)
    for index, largest in enumerate(maxima):
        layer = getattr(model, f"conv{index + 1}")
        steps = layer.weight.abs().amax((1, 2, 3)) / 64
        whole = (layer.weight / steps[:, None, None, None]).round().double()
        out = F.conv2d(x, whole, padding=layer.padding) * scale * steps[:, None, None] + layer.bias[:, None, None]
        scale = largest / 255
        x = (out / scale).round().clamp(0, 255)
        if index in (1, 3):
            x = F.max_pool2d(x, 2)
    scores: torch.Tensor = model.conv7((x * scale).float()).flatten(1)
    return scores


def test_the_integers_are_those_of_the_definition(model: TwoHeadCNN, images: torch.Tensor) -> None:
    maxima = activation_maxima(model, images)
    digit_scores, sum_scores = int8_forward(model, maxima)(images, torch.zeros(len(images), dtype=torch.int64))
    expected = in_exact_arithmetic(model, maxima, images)
    # A value that lies just between two steps may be rounded either way; that moves a score by less than 2 % of its range.
    torch.testing.assert_close(digit_scores, expected, rtol=0, atol=0.02 * expected.abs().max().item())
    assert (digit_scores - expected).abs().median() < 1e-4
    assert digit_scores.dtype == sum_scores.dtype == torch.float32


def test_what_it_says_of_itself_is_counted(model: TwoHeadCNN, images: torch.Tensor, digits: torch.Tensor) -> None:
    said = quantize(model, images // 3, images, digits)  # calibrated on faint ones, so that the two differ
    numbers = torch.arange(10).repeat(len(images))
    repeated = images.repeat_interleave(10, dim=0)
    with torch.no_grad():
        digit8, sum8 = int8_forward(model, said.maxima)(repeated, numbers)
        digit32, sum32 = model((repeated.float().unsqueeze(1) / 255 - 0.1307) / 0.3081, numbers)
    truth = digits.repeat_interleave(10)

    def share(right: torch.Tensor) -> float:
        return right.double().mean().item()

    # Rounding in another order of sums may tip a row; with random weights many are close to tipping.
    assert said.digit_agreement == pytest.approx(share(digit8.argmax(1) == digit32.argmax(1)), abs=0.01)
    assert said.sum_agreement == pytest.approx(share(sum8.argmax(1) == sum32.argmax(1)), abs=0.01)
    assert said.digit_accuracy == pytest.approx(share(digit8.argmax(1) == truth), abs=0.01)
    assert said.sum_accuracy == pytest.approx(share(sum8.argmax(1) == truth + numbers), abs=0.01)
    assert said.float32_digit_accuracy == pytest.approx(share(digit32.argmax(1) == truth), abs=0.01)
    assert said.float32_sum_accuracy == pytest.approx(share(sum32.argmax(1) == truth + numbers), abs=0.01)
    assert said.digit_agreement < 0.95
    assert quantize(model, images, images, digits).digit_agreement > 0.95
    assert (said.calibration_rows, said.test_pairs) == (200, 2000)
    assert maxima_from_card({"int8": json.loads(json.dumps(said.as_json()))}) == said.maxima


@pytest.mark.parametrize(
    "said", [None, {}, {"maxima": [1.0] * 5}, {"maxima": [1.0] * 5 + [0.0]}, {"maxima": "111111"}, [1.0] * 6]
)
def test_a_card_without_a_calibration(said: object) -> None:
    assert maxima_from_card({"int8": said}) is None


def test_a_batch_is_its_rows(model: TwoHeadCNN, images: torch.Tensor) -> None:
    forward = int8_forward(model, activation_maxima(model, images))
    numbers = torch.arange(len(images)) % 10
    together = forward(images, numbers)
    for rows in (slice(0, 1), slice(7, 70)):
        for whole, part in zip(together, forward(images[rows], numbers[rows]), strict=True):
            torch.testing.assert_close(whole[rows], part, rtol=1e-5, atol=1e-5)
