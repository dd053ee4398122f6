"""Distortions do to an image what they say, and nothing else."""

import math

import pyarrow as pa
import pytest
import torch

from mnistsum_ray.data.decoding import pixels_view
from mnistsum_ray.data.sampling import DRAWS
from mnistsum_ray.model.augmentation import distort
from mnistsum_ray.model.network import prepare_images

TURN, RIGHT, DOWN, SLANT, X, Y = range(6)


@pytest.fixture(scope="module")
def images(sample: pa.Table) -> torch.Tensor:
    return prepare_images(torch.tensor(pixels_view(sample["image"].combine_chunks())[::50]))


def only(rows: int, column: int, value: float = 1.0) -> torch.Tensor:
    draws = torch.zeros(rows, DRAWS)
    draws[:, column] = value
    return draws


def center(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the ink is on average: x and y, in pixels from the middle."""
    ink = images[:, 0] - images.amin()
    places = torch.arange(28) - 13.5
    total = ink.sum((1, 2))
    return (ink.sum(1) * places).sum(1) / total, (ink.sum(2) * places).sum(1) / total


def test_no_distortion_is_the_image(images: torch.Tensor) -> None:
    for draws, strength in ((torch.zeros(len(images), DRAWS), 1.0), (torch.rand(len(images), DRAWS), 0.0)):
        torch.testing.assert_close(distort(images, draws, strength), images, rtol=0, atol=1e-4)


def test_moving(images: torch.Tensor) -> None:
    moved = distort(images, only(len(images), X, 1 / 3), 1.0)  # the window moves right by a pixel, so the ink left
    torch.testing.assert_close(moved[..., 2:-2, 2:-2], images[..., 2:-2, 3:-1], rtol=0, atol=1e-3)
    x, y = center(images)
    to_x, to_y = center(distort(images, only(len(images), Y, -1.0), 1.0))
    assert (to_y - y).median().item() == pytest.approx(3, abs=0.1)  # a few lose ink, or have more of it, at the edge
    assert (to_x - x).median().item() == pytest.approx(0, abs=0.05)


def test_turning(images: torch.Tensor) -> None:
    """Ink at (x, y) is found at the place that turning takes it to."""
    dot = torch.full((1, 1, 28, 28), -0.4)
    dot[0, 0, 13:15, 22:24] = 2.0  # 9 pixels right of the middle
    x, y = (value.item() for value in center(distort(dot, only(1, TURN), 1.0)))
    assert math.hypot(x, y) == pytest.approx(9, abs=0.2)
    assert math.degrees(math.atan2(y, x)) == pytest.approx(-10, abs=1)  # the window turns right, so the ink left


def test_slanting() -> None:
    """What is above the middle moves to one side, what is below to the other, and nothing up or down."""
    for row in (5, 21):
        dot = torch.full((1, 1, 28, 28), -0.4)
        dot[0, 0, row : row + 2, 13:15] = 2.0
        x, y = (value.item() for value in center(distort(dot, only(1, SLANT), 1.0)))
        assert y == pytest.approx(row + 0.5 - 13.5, abs=0.1)
        assert x == pytest.approx(-0.1 * (row + 0.5 - 13.5), abs=0.1)


@pytest.mark.parametrize(("column", "axis"), [(RIGHT, 0), (DOWN, 1)])
def test_stretching(images: torch.Tensor, column: int, axis: int) -> None:
    dot = torch.full((1, 1, 28, 28), -0.4)
    dot[0, 0, 21:23, 21:23] = 2.0  # 8 pixels right of and below the middle
    place = center(distort(dot, only(1, column, -1.0), 1.0))
    assert place[axis].item() == pytest.approx(8 * math.exp(0.1), abs=0.2)
    assert place[1 - axis].item() == pytest.approx(8, abs=0.2)


def test_each_row_by_itself(images: torch.Tensor) -> None:
    draws = torch.rand(len(images), DRAWS, generator=torch.Generator().manual_seed(0)) * 2 - 1
    whole = distort(images, draws, 1.0)
    torch.testing.assert_close(distort(images[3:5], draws[3:5], 1.0), whole[3:5], rtol=0, atol=1e-5)
    assert whole.is_contiguous(memory_format=torch.channels_last)
    assert len(distort(images[:0], draws[:0], 1.0)) == 0
