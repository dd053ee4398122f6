"""The network is the original's; its loss, dropout and distortions are those defined."""

import math

import pytest
import torch
import torch.nn.functional as F

from mnistsum_ray.data.randomness import affine_matrices
from mnistsum_ray.model.heads import HEADS
from mnistsum_ray.model.network import (
    Objective,
    TwoHeadCNN,
    distort,
    dropout_factors,
    prepare_images,
    to_channels_last,
)
from tests.model import new_model, random_rows

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
def test_the_network_is_the_original_with_one_number_and_with_all() -> None:
    model, (images, _, numbers) = new_model(), random_rows(ROWS)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 220_125
    x = prepare_images(images)
    for ours, theirs in zip(model(x, numbers), reference(model, x, numbers), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    digit, total = model.logits_of_all_numbers(model.digit_logits(x))
    for number in range(10):
        alone = model(x, torch.full((ROWS,), number))
        torch.testing.assert_close(digit[:, 0], alone[0])
        torch.testing.assert_close(total[:, number], alone[1], rtol=1e-5, atol=1e-5)


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


def test_dropout_zeroes_its_share_and_keeps_the_mean() -> None:
    drawn = dropout_factors(200, 0.25, torch.Generator().manual_seed(0))
    assert drawn.is_contiguous(memory_format=torch.channels_last)
    assert (drawn == 0).float().mean().item() == pytest.approx(0.25, abs=0.005)
    torch.testing.assert_close(drawn[drawn != 0], torch.full_like(drawn[drawn != 0], 1 / 0.75))
    model, images = new_model(), prepare_images(random_rows(ROWS)[0])
    assert model.conv7.bias is not None
    logits = model.digit_logits(images, torch.zeros(ROWS, 128, 3, 3))  # before the last convolution
    torch.testing.assert_close(logits, model.conv7.bias.expand(ROWS, 10))


def test_the_loss_is_the_mean_of_the_heads_and_reported_without_smoothing() -> None:
    model, (images, digits, numbers) = new_model(), random_rows(ROWS)
    images = prepare_images(images)

    def by_definition(smoothing: float) -> float:
        loss = 0.0
        for logits, head in zip(model(images, numbers), HEADS, strict=True):
            one_hot = F.one_hot(head.target(digits, numbers), head.classes)
            targets = (1 - smoothing) * one_hot + smoothing / head.classes
            loss -= (targets * logits.log_softmax(1)).sum().item() / len(HEADS)
        return loss

    for smoothing in (0.0, 0.1):
        loss, reported = Objective(model, smoothing, bf16=False)(images, numbers, digits, None)
        assert loss.item() == pytest.approx(by_definition(smoothing), rel=1e-5)
        assert reported.item() == pytest.approx(by_definition(0.0), rel=1e-5)

    # bfloat16 is autocast, and gradients are float32.
    rounded, _ = Objective(model, 0.1, bf16=True)(images, numbers, digits, None)
    assert rounded.item() != loss.item()
    assert rounded.item() == pytest.approx(loss.item(), rel=0.01)
    gradients = torch.autograd.grad(rounded, list(model.parameters()))
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert (gradient.dtype, gradient.stride()) == (torch.float32, parameter.stride())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_worker_without_rows_has_gradients_of_zero(bf16: bool, device: str) -> None:
    model = new_model().to(device)
    images, digits, numbers = (values.to(device) for values in random_rows(0))
    loss, _ = Objective(model, 0.05, bf16=bf16)(prepare_images(images), numbers, digits, None)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


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
