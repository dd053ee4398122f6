"""What is measured without Ray: the assignment as its original implements it, and the job's own training step and predictor."""

from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import Compose, Normalize, ToTensor

from mnistsum_ray.config import recipe_defaults
from mnistsum_ray.data.distortion import distortions
from mnistsum_ray.data.images import Pixels
from mnistsum_ray.data.order import NUMBERS
from mnistsum_ray.data.sources import Digits, Source
from mnistsum_ray.model.device import enable_determinism, faster_with_bf16, tune_malloc
from mnistsum_ray.model.inference import Predictor
from mnistsum_ray.model.network import PIXEL_MEAN, PIXEL_STD, Objective, distort, make_network, prepare_images
from mnistsum_ray.model.optimizer import MuonAdamW
from mnistsum_ray.model.serialization import copy_weights, load_model
from mnistsum_ray.storage.paths import locate

BATCH: Final = 256
DEVICE: Final = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class OriginalNet(nn.Module):
    """The network in the layout of the assignment: ReLU before pooling, PyTorch's default initialization and memory format."""

    def __init__(self) -> None:
        super().__init__()

        def convolution(before: int, after: int, padding: int = 0) -> nn.Module:
            return nn.Sequential(nn.Conv2d(before, after, 3, padding=padding), nn.ReLU())

        first = [convolution(1, 32, 1), convolution(32, 64, 1), nn.MaxPool2d(2)]
        second = [convolution(64, 64, 1), convolution(64, 64, 1), nn.MaxPool2d(2)]
        third = [convolution(64, 64), convolution(64, 128), nn.Conv2d(128, 10, 3), nn.Flatten()]
        self.digit = nn.Sequential(*first, *second, *third)
        self.sum = nn.Sequential(nn.Linear(20, 128), nn.ReLU(), nn.Linear(128, 19))

    def forward(self, image: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
        digit = self.digit(image)
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


class OriginalStep:
    """A step of training as in the original: float32, and Adam."""

    def __init__(self) -> None:
        self.model = OriginalNet().to(DEVICE)
        self.optimizer = torch.optim.Adam(self.model.parameters())

    def __call__(self, *batch: Tensor) -> int:
        """Train with images float32[n, 1, 28, 28], one-hot numbers float32[n, 10], digits and sums int64[n]; return n."""
        image, number, digit, total = (values.to(DEVICE) for values in batch)
        self.optimizer.zero_grad()
        digit_scores, sum_scores = self.model(image, number)
        torch.autograd.backward((F.cross_entropy(digit_scores, digit) + F.cross_entropy(sum_scores, total)) / 2)
        self.optimizer.step()
        return len(image)


def original_batches(images: Pixels, digits: Digits, *, shuffle: bool = True) -> DataLoader[Any]:
    return DataLoader(OriginalDataset(images, digits), BATCH, shuffle=shuffle)


def original_accuracy(source: Source) -> dict[str, float]:
    """Test accuracies of the original's way: five epochs over all training rows, then the test rows, a random number each."""
    step, training = OriginalStep(), np.concatenate([source.train.ids(), source.validation.ids()])
    batches = original_batches(*source.data.fetch(training))
    for _ in range(5):
        for batch in batches:
            step(*batch)
    test, right = source.test.ids(), np.zeros(2, np.int64)
    with torch.no_grad():
        for image, number, *labels in original_batches(*source.data.fetch(test), shuffle=False):
            scores = step.model(image.to(DEVICE), number.to(DEVICE))
            right += [int((of_head.argmax(1).cpu() == label).sum()) for of_head, label in zip(scores, labels, strict=True)]
    return dict(zip(("digit_accuracy", "sum_accuracy"), (right / len(test)).tolist(), strict=True))


class TrainingStep:
    """A step of training as in the job: distorted rows, and the package's model, loss and optimizer."""

    def __init__(self) -> None:
        if DEVICE.type == "cpu":
            enable_determinism()
            tune_malloc()
        strength = recipe_defaults("short", small=False)["distortion"]
        self.matrices = torch.from_numpy(distortions(0, 0, np.arange(BATCH), strength)).to(DEVICE)
        self.model = make_network().to(DEVICE)
        dtype = torch.bfloat16 if faster_with_bf16(DEVICE) else torch.float32
        self.objective: nn.Module = Objective(self.model, 0.0, dtype)
        self.optimizer = MuonAdamW(self.model, 0.01, dtype)
        self.optimizer.set_learning_rate(0.01)

    def __call__(self, pixels: Tensor, digits: Tensor) -> int:
        """Train with a batch on the device, uint8[n, 28, 28] and int64[n]; return n."""
        self.optimizer.zero_grad()
        numbers = torch.randint(0, NUMBERS, (len(digits),), device=DEVICE)
        images = distort(prepare_images(pixels), self.matrices[: len(digits)])
        loss, _ = self.objective(images, numbers, digits, None)
        torch.autograd.backward(loss / BATCH)
        self.optimizer.step()
        return len(digits)


def load_predictor(model: Path | str) -> Predictor:
    network, _ = load_model(locate(str(model), "--model"))
    return Predictor(copy_weights(network), DEVICE, "bf16" if faster_with_bf16(DEVICE) else "fp32", None)
