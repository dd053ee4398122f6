"""Post-training quantization: calibration of the int8 network on training rows, and its comparison with float32.

Static quantization as in Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference" (2018): one scale for each output channel of a convolution's weights, and one scale for its output. The scale of the
output follows from the largest activation on the calibration rows.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import inf
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from mnistsum_ray.data.order import NUMBERS
from mnistsum_ray.model.evaluation import PairScores, sums_by_number
from mnistsum_ray.model.int8 import int8_digit_scores, quantized_layers, unavailable_reason
from mnistsum_ray.model.network import TwoHeadCNN, prepare_images

CALIBRATION_ROWS: Final = 2048

COMPARED_ROWS: Final = 10_000
"""Maximum number of test rows on which int8 is compared with float32: all of MNIST's."""

CONVOLUTIONS: Final = 6
"""Number of convolutions in integers."""

_BATCH: Final = 256


@dataclass(frozen=True)
class QuantizationResult:
    """Calibration of the int8 network, and its agreement with float32 on test rows."""

    maxima: tuple[float, ...]
    """Largest activation of each of the six convolutions on the calibration rows."""
    calibration_rows: int
    test_pairs: int
    """Number of test images times ten numbers."""
    digit_agreement: float
    """Share of the test images on which int8 and float32 predict the same digit."""
    sum_agreement: float
    """Share of the test pairs on which int8 and float32 predict the same sum."""
    digit_accuracy: float
    sum_accuracy: float
    float32_digit_accuracy: float
    float32_sum_accuracy: float

    def as_json(self) -> dict[str, Any]:
        """The entry `int8` of model.json."""
        return asdict(self) | {"maxima": list(self.maxima)}


def maxima_from_card(card: dict[str, Any]) -> tuple[float, ...] | None:
    """Largest activations from a model card (model.json); None if the model was not calibrated."""
    entry = card.get("int8")
    maxima = entry.get("maxima") if isinstance(entry, dict) else None
    if not isinstance(maxima, list) or len(maxima) != CONVOLUTIONS:
        return None
    return tuple(maxima) if all(isinstance(value, float) and 0 < value < inf for value in maxima) else None


def is_available() -> bool:
    """True if this PyTorch has exact integer convolutions on this CPU."""
    return unavailable_reason() is None


@torch.inference_mode()
def quantize(
    model: TwoHeadCNN,
    training_images: Tensor,
    images: Tensor,
    digits: Tensor,
    on_progress: Callable[[int], None] = lambda _: None,
) -> QuantizationResult:
    """Calibrate on training rows and compare with float32 on test rows.

    Args:
        model: float32, on the CPU.
        training_images: uint8[n, 28, 28]; the first CALIBRATION_ROWS are used.
        images, digits: test rows uint8[m, 28, 28] and int64[m].
        on_progress: called with the number of test rows done since the last call.
    """
    calibration_images = training_images[:CALIBRATION_ROWS]
    maxima = activation_maxima(model, calibration_images)
    int8_scores = int8_digit_scores(model, maxima)
    counts = torch.zeros(6, dtype=torch.int64)
    for start in range(0, len(images), _BATCH):
        image, digit = images[start : start + _BATCH], digits[start : start + _BATCH]
        sums = sums_by_number(digit)
        int8 = PairScores.from_digit_scores(model, int8_scores(image))
        float32 = PairScores.from_digit_scores(model, model.digit_scores(prepare_images(image)))
        comparisons = [
            int8.digits == float32.digits,
            int8.sums == float32.sums,
            int8.digits == digit,
            int8.sums == sums,
            float32.digits == digit,
            float32.sums == sums,
        ]
        counts += torch.stack([equal.sum() for equal in comparisons])
        on_progress(len(image))
    pairs = NUMBERS * len(images)
    shares = (counts.double() / torch.tensor([len(images), pairs] * 3)).tolist()
    return QuantizationResult(maxima, len(calibration_images), pairs, *shares)


@torch.inference_mode()
def activation_maxima(model: TwoHeadCNN, images: Tensor) -> tuple[float, ...]:
    """Largest output of each of the six convolutions over uint8[n, 28, 28].

    Four digits of each are kept, so that differences between CPUs mostly vanish.
    """
    maxima = [0.0] * CONVOLUTIONS
    for start in range(0, len(images), _BATCH):
        x = prepare_images(images[start : start + _BATCH])
        for index, layer in enumerate(quantized_layers(model)):
            x = F.relu(layer(x))
            maxima[index] = max(maxima[index], x.max().item())
            if index in (1, 3):
                x = F.max_pool2d(x, 2)
    return tuple(float(f"{max(value, 1e-6):.4g}") for value in maxima)
