"""The assignment as its original implements it: plain PyTorch, one row at a time through a DataLoader, float32."""

from collections.abc import Iterator
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import Compose, Normalize, ToTensor

from mnistsum_ray.data.images import Pixels
from mnistsum_ray.data.sources import Source
from mnistsum_ray.model.network import PIXEL_MEAN, PIXEL_STD

BATCH: Final = 256
_EPOCHS: Final = 5


class OriginalNet(nn.Module):
    """The network in the layout of the assignment: ReLU before pooling, PyTorch's default initialization and memory format."""

    def __init__(self) -> None:
        super().__init__()
        channels = [(1, 32, 1), (32, 64, 1), (64, 64, 1), (64, 64, 1), (64, 64, 0), (64, 128, 0), (128, 10, 0)]
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, padding=padding) for a, b, padding in channels)
        self.fc1, self.fc2 = nn.Linear(20, 128), nn.Linear(128, 19)

    def forward(self, x: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
        for index, convolution in enumerate(self.convolutions):
            x = convolution(x)
            if index < 6:
                x = F.relu(x)
            if index in (1, 3):
                x = F.max_pool2d(x, 2)
        digit = x.flatten(1)
        return digit, self.fc2(F.relu(self.fc1(torch.cat([digit, number], dim=1))))


class OriginalDataset(Dataset[tuple[Tensor, Tensor, int, int]]):
    """Rows of (image, one-hot random number, digit, sum), each made when it is read."""

    def __init__(self, images: Pixels, digits: list[int]) -> None:
        self.images, self.digits = images, digits
        self.transform = Compose([ToTensor(), Normalize((PIXEL_MEAN,), (PIXEL_STD,))])

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int, int]:
        number = int(torch.randint(0, 10, (1,)))
        image = self.transform(self.images[index][:, :, None])
        return image, F.one_hot(torch.tensor(number), 10).float(), self.digits[index], self.digits[index] + number


def train(rows: OriginalDataset, device: torch.device) -> tuple[OriginalNet, Iterator[int]]:
    """The network, and its training with Adam: an endless iterator that trains on a batch and yields its number of rows."""
    loader = DataLoader(rows, batch_size=BATCH, shuffle=True)
    model = OriginalNet().to(device)
    optimizer = torch.optim.Adam(model.parameters())

    def batches() -> Iterator[int]:
        while True:
            for batch in loader:
                image, number, digit, total = (values.to(device) for values in batch)
                optimizer.zero_grad()
                digit_scores, sum_scores = model(image, number)
                loss = (F.cross_entropy(digit_scores, digit) + F.cross_entropy(sum_scores, total)) / 2
                torch.autograd.backward(loss)
                optimizer.step()
                yield len(image)

    return model, batches()


def score(rows: OriginalDataset, model: OriginalNet, device: torch.device) -> Iterator[tuple[int, int, int]]:
    """Evaluation loop of the original, once over the rows: yields rows, right digits and right sums of each batch."""
    model.eval().to(device)

    @torch.no_grad()
    def batches() -> Iterator[tuple[int, int, int]]:
        for image, number, digit, total in DataLoader(rows, batch_size=BATCH):
            digits, sums = (scores.argmax(1).cpu() for scores in model(image.to(device), number.to(device)))
            yield len(image), int((digits == digit).sum()), int((sums == total).sum())

    return batches()


def measure_accuracy(source: Source, device: torch.device) -> dict[str, float]:
    """Test accuracies of the original's way: five epochs over all training rows, then the test rows, a random number each."""

    def rows_of(ids: np.ndarray) -> OriginalDataset:
        images, digits = source.data.fetch(ids)
        return OriginalDataset(images, digits.tolist())

    rows = rows_of(np.concatenate([source.train.ids(), source.validation.ids()]))
    model, batches = train(rows, device)
    left = _EPOCHS * len(rows)
    while left:
        left -= next(batches)
    count, digits, sums = map(sum, zip(*score(rows_of(source.test.ids()), model, device), strict=True))
    return {"digit_accuracy": digits / count, "sum_accuracy": sums / count}
