"""The network is the original's; its dropout and its distortions are those defined."""

import math

import pytest
import torch
import torch.nn.functional as F

from mnistsum_ray.mnist.network import (
    TwoHeadCNN,
    affine_matrices,
    distort,
    prepare_images,
    to_channels_last,
)
from tests.mnist import new_model, random_rows

ROWS = 8


def reference(model: TwoHeadCNN, x: torch.Tensor, numbers: torch.Tensor) -> list[torch.Tensor]:
    """The original's order, ReLU then pool, in PyTorch's default layout."""
    weights = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
    x = x.contiguous()
    for index in range(1, 8):
        weight, bias = weights[f"conv{index}.weight"], weights[f"conv{index}.bias"]
        x = F.conv2d(x, weight, bias, padding=1 if index <= 4 else 0)
        if index < 7:
            x = F.relu(x)
        if index in (2, 4):
            x = F.max_pool2d(x, 2)
    digit = x.flatten(1)
    both = torch.cat([digit, F.one_hot(numbers, 10).float()], dim=1)
    hidden = F.relu(F.linear(both, weights["fc1.weight"], weights["fc1.bias"]))
    return [digit, F.linear(hidden, weights["fc2.weight"], weights["fc2.bias"])]


@torch.no_grad()
def test_the_network_is_the_original_in_training_too() -> None:
    model, batch = new_model(), random_rows(ROWS)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 220_125
    expected = reference(model, prepare_images(batch["image"]), batch["number"])
    for network in (model, new_model().train()):
        for ours, theirs in zip(network(batch), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    alone = model({"image": batch["image"]})
    assert torch.equal(alone, model(batch)[0]), "held-out rows have no number"


def test_images_are_normalized_as_model_json_says_and_pixels_of_another_type_are_refused() -> None:
    pixels = torch.tensor([0, 255], dtype=torch.uint8).repeat(1, 392).view(1, 28, 28)
    x = prepare_images(pixels)
    assert (x.dtype, x.shape) == (torch.float32, (1, 1, 28, 28))
    expected = torch.tensor([(0 - 0.1307) / 0.3081, (1 - 0.1307) / 0.3081])
    torch.testing.assert_close(torch.stack([x.min(), x.max()]), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(
        TypeError, match=r"^images: must be uint8, 0 background, 255 ink; are torch.float32$"
    ):
        prepare_images(pixels.float())


@torch.no_grad()
def test_dropout_zeroes_its_share_by_the_generators_bits_and_keeps_the_mean() -> None:
    model, batch = new_model(dropout=0.25), random_rows(200)
    inputs: list[torch.Tensor] = []
    model.conv7.register_forward_pre_hook(lambda _, arguments: inputs.extend(arguments))
    for is_training in (False, True, True):
        torch.manual_seed(5)
        model.train(is_training)(batch)
    plain, dropped, again = inputs
    torch.manual_seed(5)
    factors = (torch.rand(200, 3, 3, 128).movedim(-1, 1) >= 0.25) / 0.75
    assert torch.equal(dropped, plain * factors)
    assert torch.equal(again, dropped)
    assert dropped.is_contiguous(memory_format=torch.channels_last)
    assert (factors == 0).float().mean().item() == pytest.approx(0.25, abs=0.005)


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


def test_each_dot_moves_as_its_draw_says_and_at_strength_0_not_at_all() -> None:
    """Places are x and y in pixels from the middle."""
    dots, draws = torch.full((len(CASES), 28, 28), -0.4), torch.zeros(len(CASES), 6)
    for row, (column, draw, (x, y), _) in enumerate(CASES):
        dots[row, y + 13 : y + 15, x + 13 : x + 15] = 2.0
        draws[row, column] = draw
    dots = to_channels_last(dots)
    moved = distorted(dots, draws)
    places = torch.arange(28) - 13.5
    for row, (*_, after) in enumerate(CASES):
        ink = moved[row, 0] + 0.4
        found = [(ink.sum(axis) @ places / ink.sum()).item() for axis in (0, 1)]
        assert found == pytest.approx(after, abs=0.2), row
    torch.testing.assert_close(distorted(dots, draws, strength=0.0), dots, rtol=0, atol=1e-4)
