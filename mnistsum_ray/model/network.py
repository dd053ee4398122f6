"""The two-head network, and the preparation of its input.

conv1 1->32  conv2 32->64  max-pool      28 -> 14     3x3, padding 1
conv3 64->64 conv4 64->64  max-pool      14 -> 7      3x3, padding 1
conv5 64->64 conv6 64->128 conv7 128->10  7 -> 1      3x3, no padding: ten digit scores
fc1 20->128  fc2 128->19                              on [digit scores, one-hot number]: nineteen sum scores
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnistsum_ray.data.order import NUMBERS
from mnistsum_ray.model.calibration import Temperatures
from mnistsum_ray.model.heads import DIGIT, SUM

PARAMETERS: Final = 220_125

Scores = tuple[Tensor, ...]
"""Logits by head, in the order of HEADS: [n, classes] each."""

# Mean and standard deviation of MNIST's 60,000 training images on the scale 0..1: the usual values.
PIXEL_MEAN: Final = 0.1307
PIXEL_STD: Final = 0.3081


def prepare_images(images: Tensor) -> Tensor:
    """Pixels uint8[n, 28, 28] (0 background, 255 ink) to the network's input float32[n, 1, 28, 28], normalized, channels last.

    Training and scoring both call this function, on the device, so a row is scored as it was trained.
    """
    return to_channels_last(images.float().mul_(1 / (255 * PIXEL_STD)).sub_(PIXEL_MEAN / PIXEL_STD))


def to_channels_last(images: Tensor) -> Tensor:
    """Images [n, 28, 28] as [n, 1, 28, 28], channels last; a view.

    `Tensor.contiguous` would find nothing to do with one channel, and the convolutions would run in the slow layout.
    """
    return images.unsqueeze(3).permute(0, 3, 1, 2)


class TwoHeadCNN(nn.Module):
    """The original's network: 220,125 trainable parameters."""

    one_hot: Tensor
    """Row k is the one-hot vector of number k."""
    temperatures: Temperatures
    """Divisors of the scores where probabilities are computed; `forward` returns the scores undivided."""

    def __init__(self) -> None:
        super().__init__()
        self.temperatures = Temperatures()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.conv3 = nn.Conv2d(64, 64, 3, padding=1)
        self.conv4 = nn.Conv2d(64, 64, 3, padding=1)
        self.conv5 = nn.Conv2d(64, 64, 3)
        self.conv6 = nn.Conv2d(64, 128, 3)
        self.conv7 = nn.Conv2d(128, DIGIT.classes, 3)
        self.fc1 = nn.Linear(DIGIT.classes + NUMBERS, 128)
        self.fc2 = nn.Linear(128, SUM.classes)
        self.register_buffer("one_hot", torch.eye(NUMBERS), persistent=False)
        self._initialize()
        count = sum(p.numel() for p in self.parameters())
        assert count == PARAMETERS, f"the network has {count:,} parameters, not {PARAMETERS:,}"
        for parameter in self.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.to(memory_format=torch.channels_last)

    def _initialize(self) -> None:
        """Initialize as in He et al. 2015 before a ReLU and as in Glorot and Bengio 2010 elsewhere; biases are 0.

        PyTorch's default weights are smaller. With them the sum head is at 34 % after three epochs on the sample, against 47 %.
        """
        for layer in (self.conv1, self.conv2, self.conv3, self.conv4, self.conv5, self.conv6, self.fc1):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        for layer in (self.conv7, self.fc2):
            nn.init.xavier_normal_(layer.weight)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)

    def digit_scores(self, images: Tensor, dropout: Tensor | None = None) -> Tensor:
        """Digit scores (logits) [n, 10] of prepared images float[n, 1, 28, 28].

        `dropout`, [n, 128, 3, 3] if given, is multiplied with conv7's input.
        """
        layers = (self.conv1, self.conv2, self.conv3, self.conv4, self.conv5, self.conv6)
        features = _features(images, layers)
        if dropout is not None:
            features = features * dropout.to(features.dtype)
        scores: Tensor = self.conv7(features).flatten(1)
        return scores

    def sum_scores(self, digit_scores: Tensor, numbers: Tensor) -> Tensor:
        """Sum scores (logits) [n, 19] of digit scores [n, 10] and numbers int64[n] in 0..9."""
        # Not `F.one_hot`: it looks for the smallest and the largest number first, and waits for them.
        one_hot = self.one_hot[numbers].to(digit_scores.dtype)
        scores: Tensor = self.fc2(F.relu(self.fc1(torch.cat([digit_scores, one_hot], dim=1))))
        return scores

    def scores(self, digit_scores: Tensor, numbers: Tensor) -> Scores:
        """Scores of all heads, of digit scores [n, 10] and numbers int64[n]."""
        return digit_scores, self.sum_scores(digit_scores, numbers)

    def forward(self, images: Tensor, numbers: Tensor, dropout: Tensor | None = None) -> Scores:
        """Scores of all heads, of prepared images float[n, 1, 28, 28] and numbers int64[n]; `dropout` as in `digit_scores`."""
        return self.scores(self.digit_scores(images, dropout), numbers)

    def scores_of_all_numbers(self, digit_scores: Tensor) -> Scores:
        """Scores of all heads, of digit scores [n, 10] with every number 0..9.

        Returns:
            By head [n, 10, classes]; of the digit [n, 1, 10], since it does not depend on the number.
        """
        rows = len(digit_scores)
        numbers = torch.arange(NUMBERS, device=digit_scores.device).repeat(rows)
        _, *others = self.scores(digit_scores.repeat_interleave(NUMBERS, dim=0), numbers)
        return digit_scores[:, None], *(scores.view(rows, NUMBERS, -1) for scores in others)


def _features(x: Tensor, convolutions: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
    """Apply the first six convolutions: [n, 1, 28, 28] to [n, 128, 3, 3]."""
    for index, convolution in enumerate(convolutions):
        x = convolution(x)
        if index in (1, 3):
            x = F.max_pool2d(x, 2)
        # ReLU after the max-pool gives the same values and gradients as before it, on a quarter of the elements.
        x = torch.relu_(x)
    return x


def mkldnn_digit_scores(model: TwoHeadCNN) -> Callable[[Tensor], Tensor]:
    """`model.digit_scores` for float32 inference on a CPU, with weights and activations in oneDNN's own layout: a tenth faster.

    The scores equal those of `model` up to the order of sums (1e-5). Later changes of `model` have no effect.
    """
    *layers, last = [
        partial(F.conv2d, weight=layer.weight.detach().to_mkldnn(), bias=layer.bias.detach().to_mkldnn(), padding=layer.padding)
        for layer in model.children()
        if isinstance(layer, nn.Conv2d) and layer.bias is not None
    ]

    def digit_scores(images: Tensor) -> Tensor:
        return last(_features(images.to_mkldnn(), layers)).to_dense().flatten(1)

    return digit_scores
