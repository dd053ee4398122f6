"""What a network is, the two-head network, the preparation and distortion of its input, its loss, and dropout.

conv1 1->32  conv2 32->64  max-pool      28 -> 14     3x3, padding 1
conv3 64->64 conv4 64->64  max-pool      14 -> 7      3x3, padding 1
conv5 64->64 conv6 64->128 conv7 128->10  7 -> 1      3x3, no padding: ten digit scores
fc1 20->128  fc2 128->19                              on [digit scores, one-hot number]: nineteen sum scores
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from mnistsum_ray.data.images import SIDE
from mnistsum_ray.data.order import NUMBERS
from mnistsum_ray.model.heads import DIGIT, HEADS, NETWORK, SUM

Scores = tuple[Tensor, ...]
"""Logits by head, in the order of HEADS: [n, classes] each."""

# Mean and standard deviation of MNIST's 60,000 training images on the scale 0..1: the usual values.
PIXEL_MEAN: Final = 0.1307
PIXEL_STD: Final = 0.3081


LAYERS: Final = (nn.Conv2d, nn.Linear)
"""Layers that multiply matrices: in bfloat16 where that is chosen, trained by Muon, and the last ones of the heads."""


def prepare_images(images: Tensor) -> Tensor:
    """Pixels uint8[n, 28, 28] (0 background, 255 ink) to the network's input float32[n, 1, 28, 28], normalized, channels last.

    Training and scoring both call this function, on the device, so a row is scored as it was trained. Raises TypeError if pixels
    are not uint8: on a scale of 0..1, all answers would be wrong.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"images: must be uint8, 0 background, 255 ink; are {str(images.dtype).removeprefix('torch.')}")
    return to_channels_last(images.float().mul_(1 / (255 * PIXEL_STD)).sub_(PIXEL_MEAN / PIXEL_STD))


def to_channels_last(images: Tensor) -> Tensor:
    """Images [n, 28, 28] as [n, 1, 28, 28], channels last; a view.

    `Tensor.contiguous` would find nothing to do with one channel, and the convolutions would run in the slow layout.
    """
    return images.unsqueeze(3).permute(0, 3, 1, 2)


def split_views(flat: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Views of these shapes, one after the other."""
    parts = torch.split(flat, [math.prod(shape) for shape in shapes])
    return [part.view(*shape) for part, shape in zip(parts, shapes, strict=True)]


def pixel_places(device: torch.device) -> Tensor:
    """The place (x, y, 1) of each pixel, x and y from -1 to 1: float32[3, 784]. What `F.affine_grid` makes anew each time."""
    middles = (torch.arange(SIDE, device=device) + 0.5) * (2 / SIDE) - 1
    return torch.stack([middles.repeat(SIDE), middles.repeat_interleave(SIDE), torch.ones(SIDE * SIDE, device=device)])


def distort(images: Tensor, matrices: Tensor, places: Tensor) -> Tensor:
    """Distort prepared images float32[n, 1, 28, 28] by float32[n, 6] of `data/distortion.py`; `places` as `pixel_places`."""
    rows = len(images)
    if not rows:
        return images
    grid = torch.mm(matrices.view(2 * rows, 3), places).view(rows, 2, SIDE, SIDE).permute(0, 2, 3, 1)
    # "border" fills what moves in at the edge with background; zeros would be gray in a prepared image.
    return to_channels_last(F.grid_sample(images, grid, padding_mode="border", align_corners=False).squeeze(1))


class Network(nn.Module, ABC):
    """What is trained, calibrated, scored with and exported. A subclass defines `digit_scores` and `scores`; NETWORK names it.

    Its parts are found by running it, see `find_parts`: Muon trains the weights of LAYERS, except those of the first layer and of
    the last ones, and AdamW the rest. `check_network` refuses what cannot be trained whole or calibrated. Buffers that change, as
    of `nn.BatchNorm2d`, are those of rank 0. It must not draw random numbers, as `nn.Dropout`: a resumed run would draw others.
    """

    dropout_shape: ClassVar[tuple[int, ...] | None] = None
    """Shape of the dropout of an image, channels first; None: the network has no dropout."""

    one_hot: Tensor
    """Row k is the one-hot vector of number k."""
    background: int = 0
    """Brightness, 0 or 255, of the background of its training images; 0 is MNIST's."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("one_hot", torch.eye(NUMBERS), persistent=False)

    @abstractmethod
    def digit_scores(self, images: Tensor, dropout: Tensor | None = None) -> Tensor:
        """Digit scores (logits) [n, 10] of prepared images float[n, 1, 28, 28] and `dropout_factors`, if given."""

    @abstractmethod
    def scores(self, digit_scores: Tensor, numbers: Tensor) -> Scores:
        """Scores of all heads, of digit scores [n, 10] and numbers int64[n]: the digit scores as they are, and those of
        heads that read them as the first inputs of an `nn.Linear`."""

    def forward(self, images: Tensor, numbers: Tensor, dropout: Tensor | None = None) -> Scores:
        """Scores of all heads, of prepared images, numbers int64[n] and the dropout of `digit_scores`."""
        return self.scores(self.digit_scores(images, dropout), numbers)

    def scores_of_all_numbers(self, digit_scores: Tensor) -> Scores:
        """Scores of all heads with every number: [n, NUMBERS, classes], and of the digit, which needs none, [n, 1, 10]."""
        rows = len(digit_scores)
        numbers = torch.arange(NUMBERS, device=digit_scores.device).repeat(rows)
        _, *others = self.scores(digit_scores.repeat_interleave(NUMBERS, dim=0), numbers)
        return digit_scores[:, None], *(scores.view(rows, NUMBERS, -1) for scores in others)


class TwoHeadCNN(Network):
    """The original's network: 220,125 trainable parameters. int8 inference computes its `convolutions` and conv7 anew."""

    dropout_shape = (128, 3, 3)

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
        self._initialize()

    def _initialize(self) -> None:
        """Initialize as in He et al. 2015 before a ReLU and as in Glorot and Bengio 2010 elsewhere; biases are 0.

        PyTorch's default weights are smaller. With them the sum head is at 34 % after three epochs on the sample, against 47 %.
        """
        for weight in (*(convolution.weight for convolution in self.convolutions), self.fc1.weight):
            nn.init.kaiming_normal_(weight, nonlinearity="relu")
        for weight in (self.conv7.weight, self.fc2.weight):
            nn.init.xavier_normal_(weight)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)

    @property
    def convolutions(self) -> list[nn.Conv2d]:
        """The first six convolutions, in order: all but the one that computes the digit scores."""
        return [self.conv1, self.conv2, self.conv3, self.conv4, self.conv5, self.conv6]

    def digit_scores(self, images: Tensor, dropout: Tensor | None = None) -> Tensor:
        """As of `Network`; the dropout is multiplied with conv7's input."""
        features = images
        for index, convolution in enumerate(self.convolutions):
            features = convolution(features)
            if index in (1, 3):
                features = F.max_pool2d(features, 2)
            # ReLU after the max-pool gives the same values and gradients as before it, on a quarter of the elements.
            features = torch.relu_(features)
        if dropout is not None:
            features = features * dropout.to(features.dtype)
        scores: Tensor = self.conv7(features).flatten(1)
        return scores

    def scores(self, digit_scores: Tensor, numbers: Tensor) -> Scores:
        """As of `Network`."""
        # Not `F.one_hot`: it looks for the smallest and the largest number first, and waits for them.
        one_hot = self.one_hot[numbers].to(digit_scores.dtype)
        return digit_scores, self.fc2(F.relu(self.fc1(torch.cat([digit_scores, one_hot], dim=1))))


def make_network() -> Network:
    """A new network of the class NETWORK, whose convolutions are channels last: their fast layout, and that of Muon's views."""
    network: Network = globals()[NETWORK]()
    for parameter in network.parameters():
        layout = torch.channels_last if parameter.dim() == 4 else torch.contiguous_format
        parameter.data = parameter.data.to(memory_format=layout)  # `contiguous` does nothing with one channel
    return network


def dropout_factors(rows: int, shape: Sequence[int], probability: float, generator: torch.Generator) -> Tensor:
    """Dropout factors (Srivastava et al. 2014), 0 or 1 / (1 - probability): float32[rows, *shape], channels last.

    The caller seeds the generator for each step, and names the device by it.
    """
    draws = torch.rand(rows, *shape[1:], shape[0], generator=generator, device=generator.device)
    return ((draws >= probability) / (1 - probability)).movedim(-1, 1)


class Objective(nn.Module):
    """The network and its loss as one module, so that DDP and the compiler see the whole step."""

    def __init__(self, model: Network, label_smoothing: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.label_smoothing = label_smoothing
        self.dtype = dtype
        """Type of the computation, by autocast; parameters and gradients are float32."""

    def forward(self, images: Tensor, numbers: Tensor, digits: Tensor, dropout: Tensor | None) -> tuple[Tensor, Tensor]:
        """The `joint_loss` of prepared images with numbers and digits int64[n], and `dropout_factors`."""
        if self.dtype == torch.float32:
            scores = self.model(images, numbers, dropout)
        else:
            with torch.autocast(images.device.type, torch.bfloat16):
                scores = functional_call(self.model, self._cast_parameters(), (images, numbers, dropout))
        return joint_loss(scores, digits, numbers, self.label_smoothing)

    def _cast_parameters(self) -> dict[str, Tensor]:
        """The parameters of LAYERS in bfloat16, cast together: autocast has two launches for each, with that of its gradient."""
        layers = [(name, layer) for name, layer in self.model.named_modules() if isinstance(layer, LAYERS)]
        parameters = {f"{name}.{key}": value for name, layer in layers for key, value in layer.named_parameters(recurse=False)}
        # They are cast in the order of their memory, channels last, so that no element moves.
        values = [value.movedim(1, -1) if value.dim() == 4 else value for value in parameters.values()]
        flat = torch.cat([value.reshape(-1) for value in values]).to(self.dtype)
        cast = split_views(flat, [value.shape for value in values])
        return {name: part.movedim(-1, 1) if part.dim() == 4 else part for name, part in zip(parameters, cast, strict=True)}


def joint_loss(scores: Scores, digits: Tensor, numbers: Tensor, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """Mean of the heads' cross-entropies, float32 scalars: with label smoothing, and without, which has no gradient.

    They are sums over the rows, so that each row has the same weight in workers and batches of unequal size; the caller divides.

    Label smoothing (Szegedy et al., "Rethinking the Inception Architecture", 2016) is the share of the uniform distribution in
    the targets: bounded digit scores generalize better. It is that of all heads, because the sum head reads the digit scores;
    with unsmoothed sums its loss would still push them up without bound.
    """
    exact, smooth = [], []
    for head, logits in zip(HEADS, scores, strict=True):
        logarithms = F.log_softmax(logits.float(), dim=1)
        exact.append(F.nll_loss(logarithms, head.target(digits, numbers), reduction="sum"))
        if label_smoothing:
            smooth.append(logarithms.sum() / -head.classes)
    loss = torch.stack(exact).mean()
    if not smooth:
        return loss, loss.detach()
    return torch.lerp(loss, torch.stack(smooth).mean(), label_smoothing), loss.detach()
