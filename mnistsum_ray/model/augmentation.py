"""Data augmentation: small random rotations, scalings, shears and shifts of training images, on the device.

Affine distortions as in Simard et al., "Best Practices for Convolutional Neural Networks Applied to Visual Document Analysis"
(2003). A row's distortion follows from its draws alone, and these from (seed, epoch, row id): `data/sampling.py`.
"""

import math
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from mnistsum_ray.data.pixels import SIDE

# Largest distortion at strength 1.
_ROTATION_DEGREES: Final = 10.0
_LOG_SCALE: Final = 0.1
"""Natural logarithm of the factor along each axis."""
_SHEAR: Final = 0.1
"""Horizontal shift in pixels for each pixel down."""
_SHIFT_PIXELS: Final = 3.0


def distort(images: Tensor, draws: Tensor, strength: float) -> Tensor:
    """Distort prepared images.

    Args:
        images: float32[n, 1, 28, 28].
        draws: float32[n, DISTORTION_DRAWS] in -1..1, on the same device.
        strength: factor on all distortions; 0 leaves the images as they are.

    Returns:
        float32[n, 1, 28, 28], channels last.
    """
    rows = len(images)
    if not rows:
        return images
    rotation, log_width, log_height, shear, x, y = (strength * draws).unbind(1)
    angle = rotation * math.radians(_ROTATION_DEGREES)
    cos, sin = torch.cos(angle), torch.sin(angle)
    width, height = torch.exp(log_width * _LOG_SCALE), torch.exp(log_height * _LOG_SCALE)
    shift = _SHIFT_PIXELS / (SIDE / 2)  # affine_grid's coordinates run from -1 to 1
    x_row = torch.stack([cos * width, shear * _SHEAR - sin * height, x * shift], 1)
    y_row = torch.stack([sin * width, cos * height, y * shift], 1)
    grid = F.affine_grid(torch.stack([x_row, y_row], 1), [rows, 1, SIDE, SIDE], align_corners=False)
    # "border" fills what moves in at the edge with background; zeros would be gray in a prepared image.
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False).to(memory_format=torch.channels_last)
