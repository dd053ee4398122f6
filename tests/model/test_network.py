"""The network equals the original, and its optimized paths equal the plain ones."""

import pytest
import torch
import torch.nn.functional as F

from mnistsum_ray.model.network import TwoHeadCNN, prepare_images
from tests.model import new_model, random_rows


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


@torch.no_grad()
def test_the_network_is_the_original_with_one_number_and_with_all() -> None:
    model, (images, _, numbers) = new_model(), random_rows(8)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 220_125
    x = prepare_images(images)
    for ours, theirs in zip(model(x, numbers), reference(model, x, numbers), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    digit, total = model.scores_of_all_numbers(model.digit_scores(x))
    for number in range(10):
        alone = model(x, torch.full((8,), number))
        torch.testing.assert_close(digit[:, 0], alone[0])
        torch.testing.assert_close(total[:, number], alone[1], rtol=1e-5, atol=1e-5)


def test_images_are_normalized_as_model_json_says() -> None:
    x = prepare_images(torch.tensor([0, 255], dtype=torch.uint8).repeat(1, 392).view(1, 28, 28))
    assert (x.dtype, x.shape) == (torch.float32, (1, 1, 28, 28))
    expected = torch.tensor([(0 - 0.1307) / 0.3081, (1 - 0.1307) / 0.3081])
    torch.testing.assert_close(torch.stack([x.min(), x.max()]), expected, rtol=1e-5, atol=1e-6)


def test_pixels_of_another_type_are_refused_and_not_changed() -> None:
    images = random_rows(2)[0].float()
    before = images.clone()
    with pytest.raises(TypeError, match=r"^images: must be uint8, 0 background, 255 ink; are float32$"):
        prepare_images(images)
    assert torch.equal(images, before)
