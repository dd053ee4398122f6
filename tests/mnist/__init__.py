"""Tests of the built-in task."""

import torch

from mnistsum_ray.mnist.network import TwoHeadCNN
from mnistsum_ray.mnist.task import MnistSettings, MnistSum
from mnistsum_ray.task import Batch


def task(**settings: float) -> MnistSum:
    """The task with these settings, without any that is random or smooths."""
    return MnistSum(MnistSettings.model_validate({"label_smoothing": 0} | settings))


def new_model(seed: int = 0, dropout: float = 0.0) -> TwoHeadCNN:
    """A network with random weights, in evaluation mode."""
    torch.manual_seed(seed)
    return TwoHeadCNN(dropout).eval()


def random_rows(rows: int) -> Batch:
    """A batch of images uint8[n, 28, 28], digits, numbers and row ids."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (rows, 28, 28), dtype=torch.uint8, generator=generator)
    digits, numbers = (torch.randint(0, 10, (rows,), generator=generator) for _ in range(2))
    ids = torch.arange(70_000_000, 70_000_000 + rows)  # which differ from places in the batch
    return {"image": images, "digit": digits, "number": numbers, "row_id": ids}
