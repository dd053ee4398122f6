"""The assignment as its original implements it: plain PyTorch, one row at a time through a DataLoader, float32."""

from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import Compose, Normalize, ToTensor

from mnistsum_ray.data.images import Pixels
from mnistsum_ray.data.sources import Digits, Source
from mnistsum_ray.model.network import PIXEL_MEAN, PIXEL_STD

BATCH: Final = 256
_EPOCHS: Final = 5

_CONVOLUTIONS: Final = [(1, 32, 1, 0), (32, 64, 1, 1), (64, 64, 1, 0), (64, 64, 1, 1), (64, 64, 0, 0), (64, 128, 0, 0)]
"""Channels before and after, padding, and whether a pool follows."""

Tensors = list[Tensor]
"""Images float32[n, 1, 28, 28], one-hot numbers float32[n, 10], digits and sums int64[n]."""


class OriginalNet(nn.Module):
    """The network in the layout of the assignment: ReLU before pooling, PyTorch's default initialization and memory format."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after, padding, pooled in _CONVOLUTIONS:
            layers += [nn.Conv2d(before, after, 3, padding=padding), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if pooled else []
        self.digit = nn.Sequential(*layers, nn.Conv2d(128, 10, 3), nn.Flatten())
        self.sum = nn.Sequential(nn.Linear(20, 128), nn.ReLU(), nn.Linear(128, 19))

    def forward(self, x: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
        digit = self.digit(x)
        return digit, self.sum(torch.cat([digit, number], dim=1))


class OriginalDataset(Dataset[tuple[Tensor, Tensor, int, int]]):
    """Rows of (image, one-hot random number, digit, sum), each made when it is read."""

    def __init__(self, images: Pixels, digits: Digits) -> None:
        self.images, self.digits = images, digits
        self.transform = Compose([ToTensor(), Normalize((PIXEL_MEAN,), (PIXEL_STD,))])

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int, int]:
        digit, number = int(self.digits[index]), int(torch.randint(0, 10, (1,)))
        image = self.transform(self.images[index][:, :, None])
        return image, F.one_hot(torch.tensor(number), 10).float(), digit, digit + number


class Original:
    """The network on a device, with Adam."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.model = device, OriginalNet().to(device)
        self.optimizer = torch.optim.Adam(self.model.parameters())

    def train(self, batch: Tensors) -> int:
        """Train with a batch; return its rows."""
        image, number, digit, total = (values.to(self.device) for values in batch)
        self.optimizer.zero_grad()
        digit_scores, sum_scores = self.model(image, number)
        torch.autograd.backward((F.cross_entropy(digit_scores, digit) + F.cross_entropy(sum_scores, total)) / 2)
        self.optimizer.step()
        return len(image)

    @torch.no_grad()
    def evaluate(self, batch: Tensors) -> tuple[int, int, int]:
        """Rows, right digits and right sums of a batch."""
        image, number, digit, total = batch
        digits, sums = (scores.argmax(1).cpu() for scores in self.model(image.to(self.device), number.to(self.device)))
        return len(image), int((digits == digit).sum()), int((sums == total).sum())


def loader(rows: tuple[Pixels, Digits], *, training: bool) -> DataLoader[Any]:
    """Batches of images and their digits, shuffled for training."""
    return DataLoader(OriginalDataset(*rows), BATCH, shuffle=training)


def measure_accuracy(source: Source, device: torch.device) -> dict[str, float]:
    """Test accuracies of the original's way: five epochs over all training rows, then the test rows, a random number each."""
    original, training = Original(device), np.concatenate([source.train.ids(), source.validation.ids()])
    batches = loader(source.data.fetch(training), training=True)
    for _ in range(_EPOCHS):
        for batch in batches:
            original.train(batch)
    test = loader(source.data.fetch(source.test.ids()), training=False)
    rows, digits, sums = np.sum([original.evaluate(batch) for batch in test], axis=0).tolist()
    return {"digit_accuracy": digits / rows, "sum_accuracy": sums / rows}
