"""The two-head network and its input.

conv1 1->32  conv2 32->64  max-pool      28 -> 14     3x3, padding 1
conv3 64->64 conv4 64->64  max-pool      14 -> 7      3x3, padding 1
conv5 64->64 conv6 64->128 conv7 128->10  7 -> 1      3x3, no padding: ten digit logits
fc1 20->128  fc2 128->19                              on [digit logits, one-hot number]: sum logits
"""

from collections.abc import Mapping
from typing import Final, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnistsum_ray.data.columns.base import Array
from mnistsum_ray.mnist import DIGITS, NUMBERS, SIDE, SUMS
from mnistsum_ray.task import Batch

# The usual values, of MNIST's 60,000 training images on the scale 0..1.
PIXEL_MEAN: Final = 0.1307
PIXEL_STD: Final = 0.3081


def prepare_images(images: Tensor) -> Tensor:
    """Convert pixels uint8[n, 28, 28] (0 background, 255 ink) to float32[n, 1, 28, 28], normalized.

    Raises TypeError if they are not uint8: on a scale of 0..1 all answers would be wrong.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"images: must be uint8, 0 background, 255 ink; are {images.dtype}")
    scaled = images.float().mul_(1 / (255 * PIXEL_STD)).sub_(PIXEL_MEAN / PIXEL_STD)
    return to_channels_last(scaled)


def to_channels_last(images: Tensor) -> Tensor:
    """Return images [n, 28, 28] as [n, 1, 28, 28], channels last; a view."""
    # `Tensor.contiguous` would find nothing to do with one channel, and convolutions would be slow.
    return images.unsqueeze(3).permute(0, 3, 1, 2)


def affine_matrices(draws: Array, strength: float) -> Array:
    """Matrices float32[n, 6] of small rotations, scalings, shears and shifts, for `distort`.

    Each is two rows that take a place (x, y, 1) in the distorted image to one in the image, x and y
    in -1..1. `draws`, float32[n, 6] in -1..1, are multiplied by `strength`. As in Simard et al.,
    "Best Practices for Convolutional Neural Networks" (2003).
    """
    # By NumPy: on a GPU these lines would be twenty kernels of each step. In float64, so that the
    # rounded values hardly depend on how a machine computes sines.
    rotation, log_width, log_height, shear, x, y = (strength * draws.astype(np.float64)).T
    angle = np.radians(rotation * 10)
    cos, sin = np.cos(angle), np.sin(angle)
    width, height = np.exp(log_width * 0.1), np.exp(log_height * 0.1)
    shear = shear * 0.1  # pixels to the right for each pixel down
    most = 3 / 14  # three pixels, as a share of the 14 from the middle to the edge
    x_row = [cos * width, shear - sin * height, x * most]
    y_row = [sin * width, cos * height, y * most]
    return np.stack(x_row + y_row, axis=1, dtype=np.float32)


def distort(images: Tensor, matrices: Tensor) -> Tensor:
    """Distort prepared images float32[n, 1, 28, 28] by `affine_matrices`."""
    # (x, y, 1) of each pixel, x and y from -1 to 1. `F.affine_grid` would add in another order, and
    # give other bits than earlier versions of this package.
    middles = (torch.arange(SIDE, device=images.device) + 0.5) * (2 / SIDE) - 1
    x, y = middles.repeat(SIDE), middles.repeat_interleave(SIDE)
    pixels = torch.stack([x, y, torch.ones_like(x)])
    grid = torch.mm(matrices.view(-1, 3), pixels).view(-1, 2, SIDE, SIDE).permute(0, 2, 3, 1)
    # Zeros would be grey in a prepared image: "border" fills what moves in with background.
    moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return to_channels_last(moved.squeeze(1))


class TwoHeadCNN(nn.Module):
    """The network of the original, a course assignment (see README): 220,125 parameters."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout  # rate, in training, before conv7 (Srivastava et al. 2014)
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.conv3 = nn.Conv2d(64, 64, 3, padding=1)
        self.conv4 = nn.Conv2d(64, 64, 3, padding=1)
        self.conv5 = nn.Conv2d(64, 64, 3)
        self.conv6 = nn.Conv2d(64, 128, 3)
        self.conv7 = nn.Conv2d(128, DIGITS, 3)
        self.fc1 = nn.Linear(DIGITS + NUMBERS, 128)
        self.fc2 = nn.Linear(128, SUMS)
        # He et al. 2015 before a ReLU, Glorot and Bengio 2010 elsewhere. With PyTorch's smaller
        # weights the sum head is at 34 % after three epochs on the sample, and not at 47.
        before_relu: list[nn.Conv2d | nn.Linear] = [*self.convolutions, self.fc1]
        for layer in before_relu:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        for layer in (self.conv7, self.fc2):
            nn.init.xavier_normal_(layer.weight)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
        # The fast layout of convolutions.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def convolutions(self) -> list[nn.Conv2d]:
        """All but the one that computes the digit logits, in order."""
        return [self.conv1, self.conv2, self.conv3, self.conv4, self.conv5, self.conv6]

    def forward(self, batch: Batch) -> Tensor | tuple[Tensor, Tensor]:
        """Digit logits [n, 10] and sum logits [n, 19]; without `number`, the former alone.

        Images uint8[n, 28, 28] are distorted by `affine`, where the batch has these matrices.
        """
        images = batch["image"]
        with torch.autocast(images.device.type, enabled=False):
            prepared = prepare_images(images)
            if "affine" in batch:
                prepared = distort(prepared, batch["affine"])
        digits = self.digit_logits(prepared)
        if "number" not in batch:
            return digits
        if self.training:
            return digits, self.sum_logits(digits, batch["number"])
        # float32, as in the evaluation: the sum head is a thousandth of the work.
        with torch.autocast(images.device.type, enabled=False):
            return digits, self.sum_logits(digits.float(), batch["number"])

    def digit_logits(self, images: Tensor) -> Tensor:
        """Digit logits [n, 10] of prepared images."""
        features = images
        for index, convolution in enumerate(self.convolutions):
            features = convolution(features)
            if index in (1, 3):
                features = F.max_pool2d(features, 2)
            # ReLU gives the same values and gradients after the pool, on a quarter of the elements.
            features = torch.relu_(features)
        if self.training and self.dropout:
            # Channels last. `F.dropout` would draw other bits than earlier versions did.
            draws = torch.rand(len(features), 3, 3, 128, device=features.device)
            factors = (draws >= self.dropout) / (1 - self.dropout)
            features = features * factors.movedim(-1, 1).to(features.dtype)
        return cast(Tensor, self.conv7(features).flatten(1))

    def sum_logits(self, digit_logits: Tensor, numbers: Tensor) -> Tensor:
        """Sum logits [n, 19] of digit logits [n, 10] and numbers int64[n]."""
        # `F.one_hot` would look for the smallest and the largest number first, and wait.
        one_hot = numbers[:, None] == torch.arange(NUMBERS, device=numbers.device)
        hidden = self.fc1(torch.cat([digit_logits, one_hot.to(digit_logits.dtype)], dim=1))
        return cast(Tensor, self.fc2(F.relu(hidden)))

    @torch.no_grad()
    def fold_temperatures(self, temperatures: Mapping[str, float]) -> None:
        """Divide each head's logits by its temperature."""
        for head, layer in (("digit", self.conv7), ("sum", self.fc2)):
            for parameter in layer.parameters():
                parameter.div_(temperatures[head])
        # The sum head must see the undivided digit logits.
        self.fc1.weight[:, :DIGITS] *= temperatures["digit"]
