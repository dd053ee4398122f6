"""The network in 8-bit integers on a CPU: nearly twice as fast as bfloat16, from the same float32 weights.

Post-training static quantization (Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", 2018): the first six convolutions multiply integers, a scale for each output channel of
their weights and one for what each hands on, which is found on training rows. The ten digit scores and the sum head, a
thousandth of the work, stay float32. The convolutions are those that PyTorch's own compiler calls for quantized
networks on CPUs; its older quantized tensors, which are as fast, are about to be removed. Nothing of Ray.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import inf
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnistsum_ray.model.network import PIXEL_MEAN, PIXEL_STD, TwoHeadCNN, prepare_images

CALIBRATION_ROWS: Final = 2048

COMPARED_ROWS: Final = 10_000
"""Test rows, at most, on which the two are compared, evenly over all: MNIST has so many."""

CONVOLUTIONS: Final = 6
"""In integers; the seventh is a thousandth of the work."""

_WEIGHT: Final = 64
"""The largest whole weight: with more, CPUs without VNNI would overflow in silence, as they add two products in 16 bits."""

_LEVELS: Final = 255

_PIXEL_ZERO: Final = round(255 * PIXEL_MEAN)
"""The pixel that comes nearest to 0 once prepared; padding is 0."""

_ROWS_AT_ONCE: Final = 256


@dataclass(frozen=True)
class QuantizationResult:
    """What makes an integer network of the float one, and how the two agree."""

    maxima: tuple[float, ...]
    """The largest activation of each of the six convolutions on the calibration rows."""
    calibration_rows: int
    test_pairs: int
    """Test images with each of the ten numbers."""
    digit_agreement: float
    """Share of the test images on which the digit is that of float32."""
    sum_agreement: float
    """Share of the test pairs on which the sum is that of float32."""
    digit_accuracy: float
    sum_accuracy: float
    float32_digit_accuracy: float
    float32_sum_accuracy: float

    def as_json(self) -> dict[str, Any]:
        """What model.json says under `int8`."""
        return asdict(self) | {"maxima": list(self.maxima)}


def maxima_from_card(card: dict[str, Any]) -> tuple[float, ...] | None:
    """What a model's card says of the largest activations; None where it does not."""
    said = card.get("int8")
    maxima = said.get("maxima") if isinstance(said, dict) else None
    if not isinstance(maxima, list) or len(maxima) != CONVOLUTIONS:
        return None
    return tuple(maxima) if all(isinstance(value, float) and 0 < value < inf for value in maxima) else None


def is_available() -> bool:
    """Whether this PyTorch has the integer convolutions on this CPU, and they are exact where the numbers are largest."""
    image = torch.full((1, 64, 3, 3), _LEVELS, dtype=torch.uint8).to(memory_format=torch.channels_last)
    weight = torch.full((64, 64, 3, 3), _WEIGHT, dtype=torch.int8)
    scales, zeros = torch.ones(64), torch.zeros(64, dtype=torch.int32)
    ones, none = [1, 1], [0, 0]
    try:
        packed = torch.ops.onednn.qconv_prepack(weight, scales, 1.0, 0, ones, none, ones, 1, None)
        found = torch.ops.onednn.qconv2d_pointwise(
            image, 1.0, 0, packed, scales, zeros, None, ones, none, ones, 1, 1.0, 0, torch.float32, "none", [], ""
        )
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    return bool((found == _LEVELS * _WEIGHT * 64 * 9).all())


def quantize(
    model: TwoHeadCNN,
    training_images: Tensor,
    images: Tensor,
    digits: Tensor,
    seen: Callable[[int], None] = lambda _: None,
) -> QuantizationResult:
    """Calibrate on training rows and compare with float32 on test rows.

    Args:
        model: float32, on the CPU.
        training_images: uint8[n, 28, 28]; the first CALIBRATION_ROWS are used.
        images, digits: uint8[m, 28, 28] and int64[m], to compare on.
        seen: is told of so many more of those, batch by batch.
    """
    rows = training_images[:CALIBRATION_ROWS]
    maxima = activation_maxima(model, rows)
    integer = int8_forward(model, maxima)
    none = torch.zeros(1, dtype=torch.int64)
    counts = torch.zeros(6, dtype=torch.int64)
    with torch.inference_mode():
        for start in range(0, len(images), _ROWS_AT_ONCE):
            image, digit = images[start : start + _ROWS_AT_ONCE], digits[start : start + _ROWS_AT_ONCE]
            sums = digit[:, None] + torch.arange(10)
            both = integer(image, none.expand(len(image)))[0], model.digit_scores(prepare_images(image))
            (digit8, digit32), (sum8, sum32) = (
                [scores.argmax(1) for scores in both],
                [model.sum_scores_of_all_numbers(scores).argmax(2) for scores in both],
            )
            equal = [digit8 == digit32, sum8 == sum32, digit8 == digit, sum8 == sums, digit32 == digit, sum32 == sums]
            counts += torch.stack([one.sum() for one in equal])
            seen(len(image))
    pairs = 10 * len(images)
    shares = (counts.double() / torch.tensor([len(images), pairs] * 3)).tolist()
    return QuantizationResult(maxima, len(rows), pairs, *shares)


@torch.inference_mode()
def activation_maxima(model: TwoHeadCNN, images: Tensor) -> tuple[float, ...]:
    """The largest output of each of the six convolutions over uint8[n, 28, 28], to four digits: nearly the same on every CPU."""
    maxima = [0.0] * CONVOLUTIONS
    for start in range(0, len(images), _ROWS_AT_ONCE):
        x = prepare_images(images[start : start + _ROWS_AT_ONCE])
        for index, layer in enumerate(_convolutions(model)):
            x = F.relu(layer(x))
            maxima[index] = max(maxima[index], x.max().item())
            if index in (1, 3):
                x = F.max_pool2d(x, 2)
    return tuple(float(f"{max(value, 1e-6):.4g}") for value in maxima)


def int8_forward(model: TwoHeadCNN, maxima: tuple[float, ...]) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """`model` for inference on a CPU: pixels uint8[n, 28, 28] and numbers int64[n] to the two heads' scores, float32.

    `model` must not change afterwards.
    """
    onednn = torch.ops.onednn
    scale, zero = 1 / (255 * PIXEL_STD), _PIXEL_ZERO
    layers: list[tuple[Any, ...]] = []
    for layer, largest in zip(_convolutions(model), maxima, strict=True):
        weight = layer.weight.detach().contiguous()
        weight_scales = weight.abs().amax((1, 2, 3)).clamp(min=1e-8) / _WEIGHT
        rounded = (weight / weight_scales[:, None, None, None]).round().to(torch.int8)
        padding, ones = list(layer.padding), [1, 1]
        packed = onednn.qconv_prepack(rounded, weight_scales, scale, zero, ones, padding, ones, 1, None)
        zeros = torch.zeros(len(weight), dtype=torch.int32)
        out_scale = largest / _LEVELS
        bias = layer.bias.detach() if layer.bias is not None else None
        layers.append(
            (scale, zero, packed, weight_scales, zeros, bias, ones, padding, ones, 1, out_scale, 0, torch.uint8, "relu", [], "")
        )
        scale, zero = out_scale, 0

    @torch.inference_mode()
    def forward(images: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        x = images.unsqueeze(1).to(memory_format=torch.channels_last)
        for index, arguments in enumerate(layers):
            x = onednn.qconv2d_pointwise(x, *arguments)
            if index in (1, 3):
                x = _halved(x)
        digit_scores = model.conv7(x.float().mul_(scale)).flatten(1)
        return digit_scores, model.sum_scores(digit_scores, numbers)

    return forward


def _halved(x: Tensor) -> Tensor:
    """2 x 2 max-pool of uint8[n, c, h, w], channels last, which PyTorch's own cannot do for integers."""
    rows = x.permute(0, 2, 3, 1)
    rows = torch.maximum(rows[:, ::2], rows[:, 1::2])
    return torch.maximum(rows[:, :, ::2], rows[:, :, 1::2]).permute(0, 3, 1, 2)


def _convolutions(model: TwoHeadCNN) -> list[nn.Conv2d]:
    return [model.conv1, model.conv2, model.conv3, model.conv4, model.conv5, model.conv6]
