"""Each distortion alone moves the ink of an image as it should."""

import math

import pyarrow as pa
import pytest
import torch

from mnistsum_ray.data.distortion import affine_matrices
from mnistsum_ray.data.images import pixels_view
from mnistsum_ray.data.order import DISTORTION_DRAWS
from mnistsum_ray.model.network import distort as distort_by
from mnistsum_ray.model.network import prepare_images

ROTATION, WIDTH, HEIGHT, SHEAR, X, Y = range(6)


@pytest.fixture(scope="module")
def images(sample: pa.Table) -> torch.Tensor:
    return prepare_images(torch.tensor(pixels_view(sample["image"].combine_chunks())[::50]))


def only(rows: int, column: int, value: float = 1.0) -> torch.Tensor:
    """Draws that are 0 but in one column."""
    draws = torch.zeros(rows, DISTORTION_DRAWS)
    draws[:, column] = value
    return draws


def distort(images: torch.Tensor, draws: torch.Tensor, strength: float) -> torch.Tensor:
    return distort_by(images, torch.from_numpy(affine_matrices(draws.numpy(), strength)))


def center(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Center of mass of the ink: x and y, in pixels from the middle."""
    ink = images[:, 0] - images.amin()
    positions = torch.arange(28) - 13.5
    total = ink.sum((1, 2))
    return (ink.sum(1) * positions).sum(1) / total, (ink.sum(2) * positions).sum(1) / total


def test_zero_draws_or_strength_leave_the_image(images: torch.Tensor) -> None:
    for draws, strength in ((torch.zeros(len(images), DISTORTION_DRAWS), 1.0), (torch.rand(len(images), DISTORTION_DRAWS), 0.0)):
        torch.testing.assert_close(distort(images, draws, strength), images, rtol=0, atol=1e-4)


def test_shift(images: torch.Tensor) -> None:
    shifted = distort(images, only(len(images), X, 1 / 3), 1.0)  # the sampling grid moves right by a pixel, so the ink moves left
    torch.testing.assert_close(shifted[..., 2:-2, 2:-2], images[..., 2:-2, 3:-1], rtol=0, atol=1e-3)
    x, y = center(images)
    to_x, to_y = center(distort(images, only(len(images), Y, -1.0), 1.0))
    assert (to_y - y).median().item() == pytest.approx(3, abs=0.1)  # a few images lose or gain ink at the edge
    assert (to_x - x).median().item() == pytest.approx(0, abs=0.05)


def test_rotation(images: torch.Tensor) -> None:
    """A dot keeps its distance from the middle and turns by ten degrees."""
    dot = torch.full((1, 1, 28, 28), -0.4)
    dot[0, 0, 13:15, 22:24] = 2.0  # 9 pixels right of the middle
    x, y = (value.item() for value in center(distort(dot, only(1, ROTATION), 1.0)))
    assert math.hypot(x, y) == pytest.approx(9, abs=0.2)
    assert math.degrees(math.atan2(y, x)) == pytest.approx(-10, abs=1)  # the sampling grid turns right, so the ink turns left


def test_shear() -> None:
    """A dot above the middle moves to one side, a dot below to the other, and neither moves vertically."""
    for row in (5, 21):
        dot = torch.full((1, 1, 28, 28), -0.4)
        dot[0, 0, row : row + 2, 13:15] = 2.0
        x, y = (value.item() for value in center(distort(dot, only(1, SHEAR), 1.0)))
        assert y == pytest.approx(row + 0.5 - 13.5, abs=0.1)
        assert x == pytest.approx(-0.1 * (row + 0.5 - 13.5), abs=0.1)


@pytest.mark.parametrize(("column", "axis"), [(WIDTH, 0), (HEIGHT, 1)])
def test_scale(images: torch.Tensor, column: int, axis: int) -> None:
    dot = torch.full((1, 1, 28, 28), -0.4)
    dot[0, 0, 21:23, 21:23] = 2.0  # 8 pixels right of and below the middle
    position = center(distort(dot, only(1, column, -1.0), 1.0))
    assert position[axis].item() == pytest.approx(8 * math.exp(0.1), abs=0.2)
    assert position[1 - axis].item() == pytest.approx(8, abs=0.2)


def test_rows_are_distorted_independently(images: torch.Tensor) -> None:
    draws = torch.rand(len(images), DISTORTION_DRAWS, generator=torch.Generator().manual_seed(0)) * 2 - 1
    whole = distort(images, draws, 1.0)
    torch.testing.assert_close(distort(images[3:5], draws[3:5], 1.0), whole[3:5], rtol=0, atol=1e-5)
    assert whole.is_contiguous(memory_format=torch.channels_last)
    assert len(distort(images[:0], draws[:0], 1.0)) == 0
