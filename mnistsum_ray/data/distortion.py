"""Small random rotations, scalings, shears and shifts of training images, as matrices.

As in Simard et al., "Best Practices for Convolutional Neural Networks Applied to Visual Document
Analysis" (2003). They are computed where rows are gathered: on a GPU they were twenty kernels of
each step. `distort` in `model/network.py` applies them.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

from mnistsum_ray.data.images import SIDE
from mnistsum_ray.data.order import RowIds, distortion_draws

AFFINE_VALUES: Final = 6
"""Elements of a matrix."""

# Largest distortion at strength 1.
_ROTATION_DEGREES: Final = 10.0
_LOG_SCALE: Final = 0.1  # natural logarithm of the factor along each axis
_SHEAR: Final = 0.1  # horizontal shift in pixels for each pixel down
_SHIFT_PIXELS: Final = 3.0


def distortions(seed: int, epoch: int, row_ids: RowIds, strength: float) -> npt.NDArray[np.float32]:
    """The distortion of each training image in an epoch, as of `affine_matrices`."""
    return affine_matrices(distortion_draws(seed, epoch, row_ids), strength)


def affine_matrices(draws: npt.NDArray[np.float32], strength: float) -> npt.NDArray[np.float32]:
    """Matrices float32[n, AFFINE_VALUES] of draws float32[n, DISTORTION_DRAWS] in -1..1.

    Each is two rows that take a place (x, y, 1) in the distorted image to one in the image, where
    x and y run from -1 to 1. `strength` multiplies the draws.
    """
    # In float64, so that the rounded values hardly depend on how a machine computes sines.
    rotation, log_width, log_height, shear, x, y = (strength * draws.astype(np.float64)).T
    angle = np.radians(rotation * _ROTATION_DEGREES)
    cos, sin = np.cos(angle), np.sin(angle)
    width, height = np.exp(log_width * _LOG_SCALE), np.exp(log_height * _LOG_SCALE)
    shift = _SHIFT_PIXELS / (SIDE / 2)
    x_row = [cos * width, shear * _SHEAR - sin * height, x * shift]
    y_row = [sin * width, cos * height, y * shift]
    return np.stack(x_row + y_row, axis=1, dtype=np.float32)
