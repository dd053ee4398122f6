"""Tests of the network and of all that is computed with it."""

import torch

from mnistsum_ray.model.network import TwoHeadCNN, make_network


def new_model(seed: int = 0) -> TwoHeadCNN:
    """A network with random weights."""
    torch.manual_seed(seed)
    model = make_network()
    assert isinstance(model, TwoHeadCNN)
    return model


def random_rows(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images uint8[n, 28, 28], digits and numbers."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (rows, 28, 28), dtype=torch.uint8, generator=generator)
    digits, numbers = (torch.randint(0, 10, (rows,), generator=generator) for _ in range(2))
    return images, digits, numbers
