"""The network equals the original, and its optimized paths equal the plain ones."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mnistsum_ray.model.loss import joint_loss
from mnistsum_ray.model.network import PARAMETERS, TwoHeadCNN, prepare_images


@pytest.fixture(scope="module")
def model() -> TwoHeadCNN:
    torch.manual_seed(0)
    return TwoHeadCNN()


def images(rows: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (rows, 28, 28), dtype=np.uint8))


def test_parameters(model: TwoHeadCNN) -> None:
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == PARAMETERS == 220_125


def test_empty_batch(model: TwoHeadCNN) -> None:
    digit, total = model(prepare_images(images(0)), torch.zeros(0, dtype=torch.int64))
    loss = joint_loss((digit, total), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))[0]
    assert loss.item() == 0.0
    torch.autograd.backward(loss)


def reference(model: TwoHeadCNN, x: torch.Tensor, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The original's order, ReLU then pool, in PyTorch's default layout, straight from the assignment."""
    weights = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
    x = x.contiguous()
    for index in range(1, 8):
        x = F.conv2d(x, weights[f"conv{index}.weight"], weights[f"conv{index}.bias"], padding=1 if index <= 4 else 0)
        if index < 7:
            x = F.relu(x)
        if index in (2, 4):
            x = F.max_pool2d(x, 2)
    digit = x.flatten(1)
    both = torch.cat([digit, F.one_hot(numbers, 10).float()], dim=1)
    hidden = F.relu(F.linear(both, weights["fc1.weight"], weights["fc1.bias"]))
    return digit, F.linear(hidden, weights["fc2.weight"], weights["fc2.bias"])


def test_network_equals_the_original(model: TwoHeadCNN) -> None:
    x, numbers = prepare_images(images(8)), torch.arange(8)
    with torch.no_grad():
        for ours, theirs in zip(model(x, numbers), reference(model, x, numbers), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_scores_of_all_numbers_equal_those_of_each(model: TwoHeadCNN) -> None:
    x = prepare_images(images(4))
    with torch.no_grad():
        together = model.scores_of_all_numbers(model.digit_scores(x))[1]
        for number in range(10):
            _, alone = model(x, torch.full((4,), number))
            torch.testing.assert_close(together[:, number], alone, rtol=1e-5, atol=1e-5)


def test_images_are_normalized_as_the_card_says() -> None:
    x = prepare_images(torch.tensor([0, 255], dtype=torch.uint8).repeat(1, 392).view(1, 28, 28))
    assert x.dtype == torch.float32
    assert x.shape == (1, 1, 28, 28)
    torch.testing.assert_close(x.min().item(), (0 - 0.1307) / 0.3081, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x.max().item(), (1 - 0.1307) / 0.3081, rtol=1e-5, atol=1e-6)


def test_smoothing_applies_to_the_targets_of_both_heads(model: TwoHeadCNN) -> None:
    digits, numbers = torch.tensor([3, 9]), torch.tensor([9, 0])
    digit_scores, sum_scores = model(prepare_images(images(2)), numbers)
    digit_targets, sum_targets = 0.9 * F.one_hot(digits, 10) + 0.1 / 10, 0.9 * F.one_hot(digits + numbers, 19) + 0.1 / 19
    expected = -(digit_targets * digit_scores.log_softmax(1)).sum() - (sum_targets * sum_scores.log_softmax(1)).sum()
    smoothed = joint_loss((digit_scores, sum_scores), digits, numbers, label_smoothing=0.1)[0]
    torch.testing.assert_close(smoothed, expected / 2)


def test_loss_is_the_mean_of_the_two_cross_entropies(model: TwoHeadCNN) -> None:
    digits, numbers = torch.tensor([3, 9]), torch.tensor([9, 0])
    digit_scores, sum_scores = model(prepare_images(images(2)), numbers)
    ours = joint_loss((digit_scores, sum_scores), digits, numbers)[0] / 2
    theirs = (F.cross_entropy(digit_scores, digits) + F.cross_entropy(sum_scores, digits + numbers)) / 2
    torch.testing.assert_close(ours, theirs)
