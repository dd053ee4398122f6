"""Each distortion alone moves the ink of an image as it should."""

import math

import pytest
import torch

from mnistsum_ray.data.randomness import affine_matrices
from mnistsum_ray.model.network import distort, prepare_images
from tests.model import random_rows

ROTATION, WIDTH, HEIGHT, SHEAR, X, Y = range(6)
TURN, SCALE = math.radians(10), math.exp(0.1)


def distorted(images: torch.Tensor, draws: torch.Tensor, strength: float = 1.0) -> torch.Tensor:
    return distort(images, torch.from_numpy(affine_matrices(draws.numpy(), strength)))


CASES = [
    # The sampling grid moves right or turns right, so the ink moves left or turns left.
    (ROTATION, 1, (9, 0), (9 * math.cos(TURN), -9 * math.sin(TURN))),
    (X, 1 / 3, (5, 5), (4, 5)),
    (Y, -1, (5, 5), (5, 8)),
    (WIDTH, -1, (8, 8), (8 * SCALE, 8)),
    (HEIGHT, -1, (8, 8), (8, 8 * SCALE)),
    (SHEAR, 1, (0, -8), (0.8, -8)),
]


@pytest.mark.parametrize(("column", "draw", "before", "after"), CASES)
def test_a_dot_moves(
    column: int, draw: float, before: tuple[int, int], after: tuple[float, float]
) -> None:
    """Places are x and y in pixels from the middle."""
    dot, draws = torch.full((1, 1, 28, 28), -0.4), torch.zeros(1, 6)
    dot[0, 0, before[1] + 13 : before[1] + 15, before[0] + 13 : before[0] + 15] = 2.0
    draws[0, column] = draw
    ink = distorted(dot, draws)[0, 0] + 0.4
    places = torch.arange(28) - 13.5
    found = ((ink.sum(0) * places).sum() / ink.sum(), (ink.sum(1) * places).sum() / ink.sum())
    assert [value.item() for value in found] == pytest.approx(after, abs=0.2)


def test_rows_are_distorted_independently_and_not_at_all_at_strength_0() -> None:
    images = prepare_images(random_rows(20)[0])
    draws = torch.rand(20, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1
    whole = distorted(images, draws)
    torch.testing.assert_close(distorted(images[3:5], draws[3:5]), whole[3:5], rtol=0, atol=1e-5)
    assert whole.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(distorted(images, draws, strength=0.0), images, rtol=0, atol=1e-4)
