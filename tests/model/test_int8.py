"""The int8 network computes the defined integers, and its comparison with float32 is counted right."""

import json
from typing import Any

import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F

from mnistsum_ray.data.images import pixels_view
from mnistsum_ray.model.inference import make_forward
from mnistsum_ray.model.int8 import activation_maxima, int8_digit_scores, maxima_from_description, quantize, unavailable_reason
from mnistsum_ray.model.metrics import score_rows
from mnistsum_ray.model.network import PIXEL_STD, TwoHeadCNN, prepare_images
from tests.model import new_model

needs_int8 = pytest.mark.skipif(unavailable_reason() is not None, reason="this PyTorch has no integer convolutions on this CPU")


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")  # type: ignore[no-untyped-call]
def test_this_torch_has_integer_convolutions() -> None:
    """The operators are private, and without them all other tests of int8 are skipped."""
    reason = unavailable_reason()
    assert reason is None, f"torch {torch.__version__} broke the integer convolutions (torch.ops.onednn, model/int8.py): {reason}"


@pytest.fixture(scope="module")
def images(sample: pa.Table) -> torch.Tensor:
    return torch.tensor(pixels_view(sample["image"].combine_chunks())[::100])


@pytest.fixture(scope="module")
def digits(sample: pa.Table) -> torch.Tensor:
    return torch.tensor(sample["digit"].to_pylist()[::100])


@pytest.fixture(scope="module")
def model() -> TwoHeadCNN:
    return new_model().eval()


@torch.no_grad()
def exact_digit_scores(model: TwoHeadCNN, maxima: list[float], images: torch.Tensor) -> torch.Tensor:
    """Digit scores by the definition, with the integers in float64, which represents them exactly."""
    x, scale = images.unsqueeze(1).double() - 33, 1 / (255 * PIXEL_STD)
    for index, maximum in enumerate(maxima):
        layer = getattr(model, f"conv{index + 1}")
        weight_scales = layer.weight.abs().amax((1, 2, 3)) / 64
        integers = (layer.weight / weight_scales[:, None, None, None]).round().double()
        out = F.conv2d(x, integers, padding=layer.padding) * scale * weight_scales[:, None, None] + layer.bias[:, None, None]
        scale = maximum / 255
        x = (out / scale).round().clamp(0, 255)
        if index in (1, 3):
            x = F.max_pool2d(x, 2)
    scores: torch.Tensor = model.conv7((x * scale).float()).flatten(1)
    return scores


@needs_int8
def test_integers_are_those_of_the_definition(model: TwoHeadCNN, images: torch.Tensor) -> None:
    maxima = activation_maxima(model, images)
    digit_scores = int8_digit_scores(model, maxima)(images)
    expected = exact_digit_scores(model, maxima, images)
    # A value halfway between two steps may be rounded either way; that moves a score by less than 2 % of its range.
    torch.testing.assert_close(digit_scores, expected, rtol=0, atol=0.02 * expected.abs().max().item())
    assert (digit_scores - expected).abs().median() < 1e-4
    assert digit_scores.dtype == torch.float32


@needs_int8
def test_comparison_with_float32_is_counted_right(model: TwoHeadCNN, images: torch.Tensor, digits: torch.Tensor) -> None:
    rows = torch.split(torch.arange(len(images)), 32)
    batches = [{"image": images[ids], "digit": digits[ids], "row_id": ids} for ids in rows]
    with torch.no_grad():
        scored = list(score_rows(model, [(batch, model.digit_scores(prepare_images(batch["image"]))) for batch in batches]))
    result = quantize(model, images // 3, scored)  # calibrated on faint images, so that int8 and float32 differ
    numbers = torch.arange(10).repeat(len(images))
    repeated = images.repeat_interleave(10, dim=0)
    with torch.inference_mode():
        digit8, sum8, *_ = make_forward(model, torch.device("cpu"), "int8", result["maxima"])(repeated, numbers)
        digit32, sum32, *_ = model(prepare_images(repeated), numbers)
    true_digits = digits.repeat_interleave(10)

    right = {
        "digit_agreement": digit8.argmax(1) == digit32.argmax(1),
        "sum_agreement": sum8.argmax(1) == sum32.argmax(1),
        "digit_accuracy": digit8.argmax(1) == true_digits,
        "sum_accuracy": sum8.argmax(1) == true_digits + numbers,
    }
    expected = {name: rows.double().mean().item() for name, rows in right.items()}
    # Another order of sums may change a prediction; with random weights many scores are nearly tied.
    assert {name: result[name] for name in expected} == pytest.approx(expected, abs=0.01)
    assert result["digit_agreement"] < 0.95
    assert quantize(model, images, scored)["digit_agreement"] >= 0.95
    assert (result["calibration_rows"], result["test_pairs"]) == (50, 500)
    assert maxima_from_description({"int8": json.loads(json.dumps(result))}) == tuple(result["maxima"])


def test_a_description_without_a_calibration() -> None:
    entries: list[Any] = [None, {}, {"maxima": [1.0] * 5}, {"maxima": [1.0] * 5 + [0.0]}, {"maxima": "111111"}, [1.0] * 6]
    for entry in [*entries, {"maxima": [10**400] * 6}]:
        assert maxima_from_description({"int8": entry}) is None
