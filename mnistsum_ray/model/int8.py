"""The network in 8-bit integers on a CPU: nearly twice as fast as bfloat16, from the same float32 weights.

The convolutions are PyTorch's private operators `torch.ops.onednn`, which its compiler calls for quantized networks on CPUs. The
documented alternative, quantized tensors, is as fast and about to be removed. A release of PyTorch may change the operators
without notice: this module is their only user, and a test in tests/model/test_quantization.py fails if it does.
"""

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn

from mnistsum_ray.errors import one_line
from mnistsum_ray.model.network import PIXEL_MEAN, PIXEL_STD, TwoHeadCNN

MAX_ACTIVATION: Final = 255

MAX_WEIGHT: Final = 64
"""Largest integer weight. CPUs without VNNI add two products in 16 bits: with larger weights they would overflow silently."""

_PIXEL_ZERO: Final = round(255 * PIXEL_MEAN)
"""Pixel value nearest to 0 in a prepared image; the padding is 0."""


class Int8Convolution:
    """Convolution of uint8 activations with int8 weights, stride 1; ReLU follows if the output is uint8.

    Args:
        weight: int8[out, in, height, width] in -MAX_WEIGHT..MAX_WEIGHT.
        weight_scales: float32[out]; the weight that an integer represents is integer * scale.
        bias: float32[out], or None.
        padding: pixels at each edge, vertically and horizontally; they are filled with `input_zero`.
        input_scale, input_zero: the activation that an input integer represents is (integer - input_zero) * input_scale.
        output_scale: activation that one step of the uint8 output represents; None for float32 output.
    """

    def __init__(
        self,
        weight: Tensor,
        weight_scales: Tensor,
        bias: Tensor | None,
        padding: list[int],
        input_scale: float,
        input_zero: int,
        output_scale: float | None,
    ) -> None:
        stride = dilation = [1, 1]
        groups = 1
        packed = torch.ops.onednn.qconv_prepack(
            weight, weight_scales, input_scale, input_zero, stride, padding, dilation, groups, None
        )
        weight_zeros = torch.zeros(len(weight), dtype=torch.int32)
        output = (1.0, 0, torch.float32, "none") if output_scale is None else (output_scale, 0, torch.uint8, "relu")
        values = (input_scale, input_zero, packed, weight_scales, weight_zeros, bias)
        self._arguments: tuple[Any, ...] = (*values, stride, padding, dilation, groups, *output, [], "")

    def __call__(self, x: Tensor) -> Tensor:
        """Convolve uint8[n, in, height, width], channels last."""
        output: Tensor = torch.ops.onednn.qconv2d_pointwise(x, *self._arguments)
        return output


def unavailable_reason() -> str | None:
    """Why this PyTorch cannot run integer convolutions on this CPU; None if it can and they are exact for the largest values."""
    channels = 64
    image = torch.full((1, channels, 3, 3), MAX_ACTIVATION, dtype=torch.uint8).to(memory_format=torch.channels_last)
    weight = torch.full((channels, channels, 3, 3), MAX_WEIGHT, dtype=torch.int8)
    try:
        output = Int8Convolution(weight, torch.ones(channels), None, [0, 0], 1.0, 0, None)(image)
    except (AttributeError, NotImplementedError, RuntimeError) as error:
        return one_line(error)
    expected = MAX_ACTIVATION * MAX_WEIGHT * channels * 9
    if not (output == expected).all():
        return f"a sum of {expected:,} is computed as {output.flatten()[0].item():,.0f}"
    return None


def quantized_layers(model: TwoHeadCNN) -> list[nn.Conv2d]:
    """The convolutions that multiply integers; conv7 and the sum head, a thousandth of the work, stay float32."""
    return [model.conv1, model.conv2, model.conv3, model.conv4, model.conv5, model.conv6]


def int8_digit_scores(model: TwoHeadCNN, maxima: tuple[float, ...]) -> Callable[[Tensor], Tensor]:
    """Function from pixels uint8[n, 28, 28] to digit scores float32[n, 10], for inference on a CPU.

    `model` must not change afterwards.
    """
    scale, zero = 1 / (255 * PIXEL_STD), _PIXEL_ZERO
    layers: list[Int8Convolution] = []
    for layer, maximum in zip(quantized_layers(model), maxima, strict=True):
        weight = layer.weight.detach().contiguous()
        weight_scales = weight.abs().amax((1, 2, 3)).clamp(min=1e-8) / MAX_WEIGHT
        rounded = (weight / weight_scales[:, None, None, None]).round().to(torch.int8)
        bias = layer.bias.detach() if layer.bias is not None else None
        output_scale = maximum / MAX_ACTIVATION
        layers.append(Int8Convolution(rounded, weight_scales, bias, [*layer.padding], scale, zero, output_scale))
        scale, zero = output_scale, 0

    @torch.inference_mode()
    def digit_scores(images: Tensor) -> Tensor:
        x = images.unsqueeze(1).to(memory_format=torch.channels_last)
        for index, layer in enumerate(layers):
            x = layer(x)
            if index in (1, 3):
                x = _max_pool(x)
        scores: Tensor = model.conv7(x.float().mul_(scale)).flatten(1)
        return scores

    return digit_scores


def _max_pool(x: Tensor) -> Tensor:
    """2 x 2 max-pool of uint8[n, c, h, w], channels last; PyTorch's own does not take integers."""
    rows = x.permute(0, 2, 3, 1)
    rows = torch.maximum(rows[:, ::2], rows[:, 1::2])
    return torch.maximum(rows[:, :, ::2], rows[:, :, 1::2]).permute(0, 3, 1, 2)
