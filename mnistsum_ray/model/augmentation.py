"""Distortion of training images, on the device."""

import torch.nn.functional as F
from torch import Tensor

from mnistsum_ray.data.images import SIDE
from mnistsum_ray.model.network import to_channels_last


def distort(images: Tensor, matrices: Tensor) -> Tensor:
    """Distort prepared images.

    Args:
        images: float32[n, 1, 28, 28].
        matrices: float32[n, 6] of `data/distortion.py`, on the same device.

    Returns:
        float32[n, 1, 28, 28], channels last.
    """
    rows = len(images)
    if not rows:
        return images
    grid = F.affine_grid(matrices.view(rows, 2, 3), [rows, 1, SIDE, SIDE], align_corners=False)
    # "border" fills what moves in at the edge with background; zeros would be gray in a prepared image.
    return to_channels_last(F.grid_sample(images, grid, padding_mode="border", align_corners=False).squeeze(1))
