"""The two-head network, its loss, and how pixels become its input. Nothing of Ray.

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

from mnistsum_ray.model.calibration import Temperatures

PARAMETERS: Final = 220_125
DIGITS: Final = 10
SUMS: Final = 19

# Mean and standard deviation of MNIST's 60,000 training images on the scale 0..1, as everybody uses them.
PIXEL_MEAN: Final = 0.1307
PIXEL_STD: Final = 0.3081


def prepare_images(images: Tensor) -> Tensor:
    """uint8[n, 28, 28] (0 background, 255 ink) to float32[n, 1, 28, 28], mean 0 and deviation 1 over MNIST, channels last.

    Training and scoring both call this, on the device, so a row is scored as it was trained.
    `.to` and not `.contiguous`: with one channel the latter finds nothing to do and the convolutions run in the slow layout.
    """
    scaled = images.unsqueeze(1).float().mul_(1 / (255 * PIXEL_STD)).sub_(PIXEL_MEAN / PIXEL_STD)
    return scaled.to(memory_format=torch.channels_last)


class TwoHeadCNN(nn.Module):
    """The original's network: 220,125 trainable parameters."""

    temperatures: Temperatures
    """What the scores are divided by where probabilities are made of them; `forward` gives the scores themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.temperatures = Temperatures()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.conv3 = nn.Conv2d(64, 64, 3, padding=1)
        self.conv4 = nn.Conv2d(64, 64, 3, padding=1)
        self.conv5 = nn.Conv2d(64, 64, 3)
        self.conv6 = nn.Conv2d(64, 128, 3)
        self.conv7 = nn.Conv2d(128, DIGITS, 3)
        self.fc1 = nn.Linear(DIGITS + 10, 128)
        self.fc2 = nn.Linear(128, SUMS)
        self._initialize()
        count = sum(p.numel() for p in self.parameters())
        assert count == PARAMETERS, f"the network has {count:,} parameters, not {PARAMETERS:,}"
        for parameter in self.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.to(memory_format=torch.channels_last)

    def _initialize(self) -> None:
        """He et al. 2015 where a ReLU follows, Glorot and Bengio 2010 where it does not.

        PyTorch's default is smaller; with it the sum head is at 34 % where this is at 47 %, three epochs into the sample.
        """
        for layer in (self.conv1, self.conv2, self.conv3, self.conv4, self.conv5, self.conv6, self.fc1):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        for layer in (self.conv7, self.fc2):
            nn.init.xavier_normal_(layer.weight)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)

    def digit_scores(self, images: Tensor, dropout: Tensor | None = None) -> Tensor:
        """float[n, 1, 28, 28] to ten digit scores (logits) [n, 10]; `dropout` [n, 128, 3, 3] multiplies what conv7 reads."""
        layers = (self.conv1, self.conv2, self.conv3, self.conv4, self.conv5, self.conv6)
        hidden = _hidden(images, layers)
        if dropout is not None:
            hidden = hidden * dropout.to(hidden.dtype)
        scores: Tensor = self.conv7(hidden).flatten(1)
        return scores

    def sum_scores(self, digit_scores: Tensor, numbers: Tensor) -> Tensor:
        """Digit scores [n, 10] and numbers int64[n] in 0..9 to nineteen sum scores (logits) [n, 19]."""
        one_hot = F.one_hot(numbers, 10).to(digit_scores.dtype)
        scores: Tensor = self.fc2(F.relu(self.fc1(torch.cat([digit_scores, one_hot], dim=1))))
        return scores

    def forward(self, images: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Images float[n, 1, 28, 28] and numbers int64[n] to (digit scores [n, 10], sum scores [n, 19])."""
        digit_scores = self.digit_scores(images)
        return digit_scores, self.sum_scores(digit_scores, numbers)

    def sum_scores_of_all_numbers(self, digit_scores: Tensor) -> Tensor:
        """Digit scores [n, 10] to the sum scores of each with every number 0..9: [n, 10, 19].

        The convolutions, nearly all of the work, have then run once an image and not ten times.
        """
        rows = len(digit_scores)
        numbers = torch.arange(10, device=digit_scores.device).repeat(rows)
        return self.sum_scores(digit_scores.repeat_interleave(10, dim=0), numbers).view(rows, 10, SUMS)


def _hidden(x: Tensor, layers: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
    """The first six convolutions: [n, 1, 28, 28] to [n, 128, 3, 3]."""
    for index, layer in enumerate(layers):
        x = layer(x)
        if index in (1, 3):
            x = F.max_pool2d(x, 2)
        # ReLU after the max-pool gives the same values and gradients as before it, on a quarter of the elements.
        x = torch.relu_(x)
    return x


def mkldnn_digit_scores(model: TwoHeadCNN) -> Callable[[Tensor], Tensor]:
    """`model.digit_scores` for inference in float32 on a CPU, with all that it touches in oneDNN's own layout: a tenth faster.

    Gives what `model` gives, up to the order of sums (1e-5 of a score). It does not follow later changes of `model`.
    """
    *layers, last = [
        partial(F.conv2d, weight=layer.weight.detach().to_mkldnn(), bias=layer.bias.detach().to_mkldnn(), padding=layer.padding)
        for layer in model.children()
        if isinstance(layer, nn.Conv2d) and layer.bias is not None
    ]

    def digit_scores(images: Tensor) -> Tensor:
        return last(_hidden(images.to_mkldnn(), layers)).to_dense().flatten(1)

    return digit_scores
