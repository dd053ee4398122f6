"""Dropout, and the loss with and without label smoothing."""

import pytest
import torch

from mnistsum_ray.model.loss import Objective, dropout_factors, joint_loss
from mnistsum_ray.model.network import TwoHeadCNN, prepare_images

ROWS = 50


@pytest.fixture
def model() -> TwoHeadCNN:
    torch.manual_seed(0)
    return TwoHeadCNN()


def test_dropout_zeroes_its_share_and_keeps_the_mean() -> None:
    def factors(seed: int) -> torch.Tensor:
        return dropout_factors(200, 0.25, torch.Generator().manual_seed(seed))

    drawn = factors(0)
    assert drawn.shape == (200, 128, 3, 3)
    assert drawn.is_contiguous(memory_format=torch.channels_last)
    zero = drawn == 0
    assert zero.float().mean().item() == pytest.approx(0.25, abs=0.005)
    torch.testing.assert_close(drawn[~zero].amin(), drawn[~zero].amax(), rtol=0, atol=0)
    assert drawn.mean().item() == pytest.approx(1, abs=0.01)
    torch.testing.assert_close(factors(0), drawn, rtol=0, atol=0)
    assert (factors(1) != drawn).float().mean() > 0.3


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_reported_loss_is_unsmoothed(model: TwoHeadCNN, smoothing: float) -> None:
    images, numbers = torch.randn(ROWS, 1, 28, 28), torch.arange(ROWS) % 10
    digits = torch.arange(ROWS) // 5
    loss, reported = Objective(model, smoothing, torch.float32)(images, numbers, digits, None)
    digit_scores, sum_scores = model(images, numbers)
    assert reported.item() == pytest.approx(joint_loss((digit_scores, sum_scores), digits, numbers)[0].item(), rel=1e-5)
    assert not reported.requires_grad
    smoothed = joint_loss((digit_scores, sum_scores), digits, numbers, smoothing)[0]
    assert loss.item() == pytest.approx(smoothed.item(), rel=1e-5)


def test_bf16_is_autocast_and_gradients_are_float32(model: TwoHeadCNN) -> None:
    images, numbers = prepare_images(torch.randint(0, 256, (ROWS, 28, 28), dtype=torch.uint8)), torch.arange(ROWS) % 10
    loss, _ = Objective(model, 0.0, torch.bfloat16)(images, numbers, numbers, None)
    exact, _ = Objective(model, 0.0, torch.float32)(images, numbers, numbers, None)
    assert loss.item() != exact.item()
    assert loss.item() == pytest.approx(exact.item(), rel=0.01)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad.dtype, parameter.grad.stride()) == (torch.float32, parameter.stride()), name


def test_the_compiler_can_follow(model: TwoHeadCNN) -> None:
    """Not compiled to machine code, which takes a minute; the bits are those of the same operations one by one."""
    objective = Objective(model, 0.05, torch.bfloat16)
    images, numbers = torch.randn(8, 1, 28, 28), torch.arange(8)
    gradients = []
    for function in (objective, torch.compile(objective, backend="aot_eager", dynamic=False, fullgraph=True)):
        loss, _ = function(images, numbers, numbers, None)
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for ours, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, ours)


def test_dropout_multiplies_the_input_of_the_last_convolution(model: TwoHeadCNN) -> None:
    images, numbers = torch.randn(ROWS, 1, 28, 28), torch.arange(ROWS) % 10
    all_dropped = torch.zeros(ROWS, 128, 3, 3)
    _, reported = Objective(model, 0.0, torch.float32)(images, numbers, numbers, all_dropped)
    assert model.conv7.bias is not None
    scores = model.conv7.bias.expand(ROWS, 10)
    expected = joint_loss(model.scores(scores, numbers), numbers, numbers)[0]
    assert reported.item() == pytest.approx(expected.item(), rel=1e-5)
