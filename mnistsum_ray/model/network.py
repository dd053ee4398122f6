"""The two-head network, its input, and its loss.

conv1 1->32  conv2 32->64  max-pool      28 -> 14     3x3, padding 1
conv3 64->64 conv4 64->64  max-pool      14 -> 7      3x3, padding 1
conv5 64->64 conv6 64->128 conv7 128->10  7 -> 1      3x3, no padding: ten digit logits
fc1 20->128  fc2 128->19                              on [digit logits, one-hot number]: sum logits
"""

from collections.abc import Mapping
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnistsum_ray.data.images import SIDE
from mnistsum_ray.data.randomness import NUMBERS
from mnistsum_ray.model.heads import DIGIT, HEADS, SUM

Logits = tuple[Tensor, ...]
"""By head, in the order of HEADS: [n, classes] each, or for all numbers [n, NUMBERS, classes]."""

# The usual values, of MNIST's 60,000 training images on the scale 0..1.
PIXEL_MEAN: Final = 0.1307
PIXEL_STD: Final = 0.3081


def prepare_images(images: Tensor) -> Tensor:
    """Pixels uint8[n, 28, 28] (0 background, 255 ink) to float32[n, 1, 28, 28], normalized.

    Raises TypeError if they are not uint8: on a scale of 0..1 all answers would be wrong.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"images: must be uint8, 0 background, 255 ink; are {images.dtype}")
    scaled = images.float().mul_(1 / (255 * PIXEL_STD)).sub_(PIXEL_MEAN / PIXEL_STD)
    return to_channels_last(scaled)


def to_channels_last(images: Tensor) -> Tensor:
    """Images [n, 28, 28] as [n, 1, 28, 28], channels last; a view."""
    # `Tensor.contiguous` would find nothing to do with one channel, and convolutions would be slow.
    return images.unsqueeze(3).permute(0, 3, 1, 2)


def distort(images: Tensor, matrices: Tensor) -> Tensor:
    """Distort prepared images float32[n, 1, 28, 28] by float32[n, 6] of `data/randomness.py`."""
    rows = len(images)
    if not rows:
        return images
    # (x, y, 1) of each pixel, x and y from -1 to 1. `F.affine_grid` would add in another order, and
    # give other bits than earlier versions of this package.
    middles = (torch.arange(SIDE, device=images.device) + 0.5) * (2 / SIDE) - 1
    x, y = middles.repeat(SIDE), middles.repeat_interleave(SIDE)
    pixels = torch.stack([x, y, torch.ones_like(x)])
    grid = torch.mm(matrices.view(2 * rows, 3), pixels).view(rows, 2, SIDE, SIDE)
    grid = grid.permute(0, 2, 3, 1)
    # Zeros would be grey in a prepared image: "border" fills what moves in with background.
    moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return to_channels_last(moved.squeeze(1))


class TwoHeadCNN(nn.Module):
    """The network of the original, a course assignment (see README): 220,125 parameters.

    The module draws no random numbers, as `nn.Dropout` would: a resumed run would draw others.
    """

    muon_layers: Final = ("conv2", "conv3", "conv4", "conv5", "conv6", "fc1")
    """Layers between the first and the last ones, whose weights Muon trains."""
    sum_layers: Final = ("fc1", "fc2")
    """Layers of the sum head, which reads the digit logits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.conv3 = nn.Conv2d(64, 64, 3, padding=1)
        self.conv4 = nn.Conv2d(64, 64, 3, padding=1)
        self.conv5 = nn.Conv2d(64, 64, 3)
        self.conv6 = nn.Conv2d(64, 128, 3)
        self.conv7 = nn.Conv2d(128, DIGIT.classes, 3)
        self.fc1 = nn.Linear(DIGIT.classes + NUMBERS, 128)
        self.fc2 = nn.Linear(128, SUM.classes)
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

    @property
    def convolutions(self) -> list[nn.Conv2d]:
        """All but the one that computes the digit logits, in order."""
        return [self.conv1, self.conv2, self.conv3, self.conv4, self.conv5, self.conv6]

    def digit_logits(self, images: Tensor, dropout: Tensor | None = None) -> Tensor:
        """Digit logits [n, 10] of prepared images and `dropout_factors`."""
        features = images
        for index, convolution in enumerate(self.convolutions):
            features = convolution(features)
            if index in (1, 3):
                features = F.max_pool2d(features, 2)
            # ReLU gives the same values and gradients after the pool, on a quarter of the elements.
            features = torch.relu_(features)
        if dropout is not None:
            features = features * dropout.to(features.dtype)
        logits: Tensor = self.conv7(features).flatten(1)
        return logits

    def logits(self, digit_logits: Tensor, numbers: Tensor) -> Logits:
        """Logits of both heads with numbers int64[n]; the first are the digit logits as given."""
        # `F.one_hot` would look for the smallest and the largest number first, and wait.
        one_hot = numbers[:, None] == torch.arange(NUMBERS, device=numbers.device)
        hidden = self.fc1(torch.cat([digit_logits, one_hot.to(digit_logits.dtype)], dim=1))
        return digit_logits, self.fc2(F.relu(hidden))

    def forward(self, images: Tensor, numbers: Tensor, dropout: Tensor | None = None) -> Logits:
        return self.logits(self.digit_logits(images, dropout), numbers)

    @torch.no_grad()
    def logits_of_all_numbers(self, digit_logits: Tensor) -> Logits:
        """Logits of both heads with every number, of digit logits [n, 10] in any dtype.

        float32[n, NUMBERS, classes]; of the digit, which does not depend on it, [n, 1, 10].
        """
        digit_logits = digit_logits.float()  # the sum head is a thousandth of the work
        rows = len(digit_logits)
        numbers = torch.arange(NUMBERS, device=digit_logits.device).repeat(rows)
        _, sums = self.logits(digit_logits.repeat_interleave(NUMBERS, dim=0), numbers)
        return digit_logits[:, None], sums.view(rows, NUMBERS, -1)

    @torch.no_grad()
    def fold_temperatures(self, temperatures: Mapping[str, float]) -> None:
        """Divide each head's logits by its temperature."""
        for head, layer in ((DIGIT, self.conv7), (SUM, self.fc2)):
            for parameter in layer.parameters():
                parameter.div_(temperatures[head.name])
        # The sum head must see the undivided digit logits.
        self.fc1.weight[:, : DIGIT.classes] *= temperatures["digit"]


def make_network() -> TwoHeadCNN:
    """A new network, its convolutions channels last: their fast layout."""
    network = TwoHeadCNN()
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


def dropout_factors(rows: int, probability: float, generator: torch.Generator) -> Tensor:
    """Dropout factors (Srivastava et al. 2014) before conv7: 0 or 1 / (1 - probability).

    float32[rows, 128, 3, 3], channels last, on the generator's device.
    """
    draws = torch.rand(rows, 3, 3, 128, generator=generator, device=generator.device)
    return ((draws >= probability) / (1 - probability)).movedim(-1, 1)


@torch.no_grad()
def compute_digit_logits(model: TwoHeadCNN, images: Tensor, *, bf16: bool) -> Tensor:
    """Digit logits [n, 10] of images uint8[n, 28, 28], in bfloat16 or float32."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        return model.digit_logits(prepare_images(images))


class Objective(nn.Module):
    """The network, with `bf16` computed in bfloat16 by autocast, and its loss: what DDP wraps."""

    def __init__(self, model: TwoHeadCNN, label_smoothing: float, *, bf16: bool) -> None:
        super().__init__()
        self.model = model
        self.label_smoothing = label_smoothing
        self.bf16 = bf16

    def forward(
        self, images: Tensor, numbers: Tensor, digits: Tensor, dropout: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Mean of the heads' cross-entropies, summed over rows: with and without label smoothing.

        The latter has no gradient. Label smoothing (Szegedy et al., "Rethinking the Inception
        Architecture", 2016) is that of all heads, because the sum head reads the digit logits: with
        unsmoothed sums its loss would push them up without bound.
        """
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.model(images, numbers, dropout)
        exact, smooth = [], []
        for index, head in enumerate(HEADS):
            logarithms = F.log_softmax(logits[index].float(), dim=1)
            exact.append(F.nll_loss(logarithms, head.target(digits, numbers), reduction="sum"))
            smooth.append(logarithms.sum() / -head.classes)
        loss = torch.stack(exact).mean()
        if not self.label_smoothing:
            return loss, loss.detach()
        smoothed = torch.lerp(loss, torch.stack(smooth).mean(), self.label_smoothing)
        return smoothed, loss.detach()
