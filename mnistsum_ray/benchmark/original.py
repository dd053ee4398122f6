"""The assignment as its original implements it: plain PyTorch, one row at a time through a DataLoader, float32."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import Compose, Normalize, ToTensor

from mnistsum_ray.benchmark.memory import BATCH
from mnistsum_ray.benchmark.timing import BatchDone, Speed, time_loop
from mnistsum_ray.data.images import Pixels
from mnistsum_ray.model.network import PIXEL_MEAN, PIXEL_STD


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


def train(images: Pixels, digits: list[int], seconds: float, device: torch.device, command_time: float) -> Speed:
    """Training loop of the original, for some seconds."""
    _, batches = _training(images, digits, device)

    def loop(batch_done: BatchDone) -> None:
        for rows in batches:
            if batch_done(rows):
                return

    return time_loop(loop, seconds, device, command_time)


def train_epochs(images: Pixels, digits: list[int], epochs: int, device: torch.device) -> OriginalNet:
    """Training loop of the original, to its end."""
    model, batches = _training(images, digits, device)
    left = epochs * len(digits)
    while left:
        left -= next(batches)
    return model


def _training(images: Pixels, digits: list[int], device: torch.device) -> tuple[OriginalNet, Iterator[int]]:
    """The network, and its training with Adam as an endless iterator that trains on a batch and yields its number of rows."""
    loader = DataLoader(OriginalDataset(images, digits), batch_size=BATCH, shuffle=True)
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


def score(images: Pixels, digits: list[int], seconds: float, device: torch.device, command_time: float) -> Speed:
    """Evaluation loop of the original."""
    loader = DataLoader(OriginalDataset(images, digits), batch_size=BATCH)
    model = OriginalNet().eval().to(device)

    @torch.no_grad()
    def loop(batch_done: BatchDone) -> None:
        while True:
            for image, number, _, _ in loader:
                for scores in model(image.to(device), number.to(device)):
                    scores.argmax(1).cpu()
                if batch_done(len(image)):
                    return

    return time_loop(loop, seconds, device, command_time)
