"""The network in 8-bit integers on a CPU: nearly twice as fast as bfloat16, from the same float32 weights. Of `TwoHeadCNN` alone.

Static quantization as in Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference" (2018): one scale for each output channel of a convolution's weights, and one for its output, from the largest
activation on some training rows. conv7 and the sum head, a thousandth of the work, stay float32.

The convolutions are PyTorch's private operators `torch.ops.onednn`. A release of PyTorch may change them without notice: this
module is their only user, and a test in tests/model/test_int8.py fails if it does.
"""

from collections.abc import Callable, Sequence
from math import inf
from typing import Any, Final

import torch
from torch import Tensor

from mnistsum_ray.data.order import NUMBERS
from mnistsum_ray.errors import one_line
from mnistsum_ray.model.heads import HEADS
from mnistsum_ray.model.metrics import AnswerCounts, ScoredRows
from mnistsum_ray.model.network import PIXEL_MEAN, PIXEL_STD, TwoHeadCNN, prepare_images

CALIBRATION_ROWS: Final = 512
"""Maximum number of training rows; 2,048 give maxima that are up to 6 % larger, and the same accuracies."""

COMPARED_ROWS: Final = 10_000
"""Maximum number of test rows on which int8 is compared with the trained network: all of MNIST's."""

MIN_AGREEMENT: Final = 0.9
"""Share of the digits that a calibration must give as the network does: with fewer, its layers are not those computed here."""

MAX_ACTIVATION: Final = 255
MAX_WEIGHT: Final = 64
"""Largest integer weight. CPUs without VNNI add two products in 16 bits: with larger weights they would overflow silently."""

_BATCH: Final = 256


def _convolution(
    weight: Tensor, scales: Tensor, bias: Tensor | None, padding: int, zero: int, scale: float, output: Sequence[Any]
) -> Callable[[Tensor], Tensor]:
    """Convolution of activations (uint8[n, in, h, w] - zero) * scale with weights int8[out, in, 3, 3] * scales float32[out].

    The padding is `zero`. `output` is its scale, zero, dtype and activation function, as oneDNN takes them.
    """
    geometry = ([1, 1], [padding, padding], [1, 1], 1)  # stride, padding, dilation, groups
    packed = torch.ops.onednn.qconv_prepack(weight, scales, scale, zero, *geometry, None)
    weight_zeros = torch.zeros(len(weight), dtype=torch.int32)
    values = (scale, zero, packed, scales, weight_zeros, bias, *geometry, *output, [], "")
    return lambda x: torch.ops.onednn.qconv2d_pointwise(x, *values)


def unavailable_reason() -> str | None:
    """Why this PyTorch cannot run integer convolutions on this CPU; None if it can and they are exact for the largest values."""
    channels = 64
    image = torch.full((1, channels, 3, 3), MAX_ACTIVATION, dtype=torch.uint8).to(memory_format=torch.channels_last)
    weight = torch.full((channels, channels, 3, 3), MAX_WEIGHT, dtype=torch.int8)
    try:
        output = _convolution(weight, torch.ones(channels), None, 0, 0, 1.0, (1.0, 0, torch.float32, "none"))(image)
    except (AttributeError, NotImplementedError, RuntimeError) as error:
        return one_line(error)
    expected = MAX_ACTIVATION * MAX_WEIGHT * channels * 9
    if not (output == expected).all():
        return f"a sum of {expected:,} is computed as {output.flatten()[0].item():,.0f}"
    return None


def int8_digit_scores(model: TwoHeadCNN, maxima: Sequence[float]) -> Callable[[Tensor], Tensor]:
    """Function from pixels uint8[n, 28, 28] to digit scores float32[n, 10], for inference on a CPU.

    `maxima` are the `activation_maxima`. `model` must not change afterwards.
    """
    scale, zero = 1 / (255 * PIXEL_STD), round(255 * PIXEL_MEAN)  # the pixel nearest to 0 in a prepared image
    layers = []
    for layer, maximum in zip(model.convolutions, maxima, strict=True):
        weight, bias = layer.weight.detach().contiguous(), layer.bias
        assert bias is not None
        scales = weight.abs().amax((1, 2, 3)).clamp(min=1e-8) / MAX_WEIGHT
        integers = (weight / scales[:, None, None, None]).round().to(torch.int8)
        output = (maximum / MAX_ACTIVATION, 0, torch.uint8, "relu")
        layers.append(_convolution(integers, scales, bias.detach(), int(layer.padding[0]), zero, scale, output))
        scale, zero = maximum / MAX_ACTIVATION, 0

    @torch.inference_mode()
    def digit_scores(images: Tensor) -> Tensor:
        x = images.unsqueeze(1).to(memory_format=torch.channels_last)
        for index, layer in enumerate(layers):
            x = layer(x)
            if index in (1, 3):  # 2 x 2 max-pool, which PyTorch's own does not do for integers
                x = torch.maximum(x[:, :, ::2], x[:, :, 1::2])
                x = torch.maximum(x[..., ::2], x[..., 1::2])
        scores: Tensor = model.conv7(x.float().mul_(scale)).flatten(1)
        return scores

    return digit_scores


@torch.inference_mode()
def activation_maxima(model: TwoHeadCNN, images: Tensor) -> list[float]:
    """Largest output of each of the first six convolutions over uint8[n, 28, 28]: four digits, so that most CPUs agree."""
    maxima = dict.fromkeys(model.convolutions, 1e-6)

    def keep(layer: torch.nn.Conv2d, _: Any, output: Tensor) -> None:
        maxima[layer] = max(maxima[layer], output.max().item())

    hooks = [layer.register_forward_hook(keep) for layer in maxima]
    for batch in torch.split(images, _BATCH):
        model.digit_scores(prepare_images(batch))
    for hook in hooks:
        hook.remove()
    return [float(f"{value:.4g}") for value in maxima.values()]


@torch.no_grad()
def quantize(
    model: TwoHeadCNN, training_images: Tensor, scored: ScoredRows, on_progress: Callable[[int], None] = lambda _: None
) -> dict[str, Any]:
    """Calibrate a model on the CPU on training rows uint8[n, 28, 28], at most the first CALIBRATION_ROWS, and compare its answers
    on test rows with `scored`, which is in the precision that it was trained in.

    Returns:
        The entry `int8` of model.json: `maxima`, `calibration_rows`, `test_pairs`, and by head `<head>_accuracy` with int8 and
        `<head>_agreement`, the share of the test pairs on which int8 gives the answer of `scored`.
    """
    maxima = activation_maxima(model, training_images[:CALIBRATION_ROWS])
    digit_scores = int8_digit_scores(model, maxima)
    counts = AnswerCounts(torch.device("cpu"))
    same = {head.name: 0.0 for head in HEADS}
    rows = 0
    for batch, scores in scored:
        on_cpu = {name: batch[name].cpu() for name in ("image", "digit", "row_id")}
        int8 = model.scores_of_all_numbers(digit_scores(on_cpu["image"]))
        counts.add(on_cpu, int8)
        for name, ours, theirs in zip(same, int8, scores, strict=True):
            same[name] += (ours.argmax(2) == theirs.argmax(2).cpu()).double().mean(1).sum().item()
        rows += len(batch["digit"])
        on_progress(len(batch["digit"]))
    return {
        "maxima": maxima,
        "calibration_rows": min(len(training_images), CALIBRATION_ROWS),
        "test_pairs": NUMBERS * rows,
        **{f"{name}_agreement": rows_alike / rows for name, rows_alike in same.items()},
        **{name: share for name, share in counts.shares().items() if name.endswith("_accuracy")},
    }


def maxima_from_description(description: dict[str, Any]) -> tuple[float, ...] | None:
    """The calibration in a description (model.json); None if the model was not calibrated."""
    entry = description.get("int8")
    maxima = entry.get("maxima") if isinstance(entry, dict) else None
    if isinstance(maxima, list) and len(maxima) == 6 and all(isinstance(value, float) and 0 < value < inf for value in maxima):
        return tuple(maxima)
    return None
