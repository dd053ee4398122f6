"""Training images turned, stretched, slanted and moved a little, on the device. Nothing of Ray.

Affine distortions as in Simard et al., "Best Practices for Convolutional Neural Networks Applied to Visual
Document Analysis" (2003). What is done to a row follows from its draws alone, and those from (seed, epoch, row id): pairs.py.
"""

import math
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from mnistsum_ray.data.decoding import SIDE

# The most that strength 1 does to an image.
_DEGREES: Final = 10.0
_STRETCH: Final = 0.1
"""Natural logarithm of the factor, along each axis."""
_SLANT: Final = 0.1
"""Pixels sideways a pixel down."""
_PIXELS: Final = 3.0


def distort(images: Tensor, draws: Tensor, strength: float) -> Tensor:
    """Distort prepared images.

    Args:
        images: float32[n, 1, 28, 28].
        draws: float32[n, DRAWS] in -1..1, on the same device.
        strength: 0 leaves the images as they are, 1 is the usual.

    Returns:
        float32[n, 1, 28, 28], channels last.
    """
    rows = len(images)
    if not rows:
        return images
    turn, right, down, slant, x, y = (strength * draws).unbind(1)
    cos, sin = torch.cos(turn * math.radians(_DEGREES)), torch.sin(turn * math.radians(_DEGREES))
    wide, high = torch.exp(right * _STRETCH), torch.exp(down * _STRETCH)
    half = SIDE / 2  # the sampling grid runs from -1 to 1
    top = torch.stack([cos * wide, slant * _SLANT - sin * high, x * (_PIXELS / half)], 1)
    bottom = torch.stack([sin * wide, cos * high, y * (_PIXELS / half)], 1)
    grid = F.affine_grid(torch.stack([top, bottom], 1), [rows, 1, SIDE, SIDE], align_corners=False)
    # What comes in at the edge is as the edge is: background.
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False).to(memory_format=torch.channels_last)
