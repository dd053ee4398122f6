"""Parameters cast at once compute what PyTorch's autocast does."""

import pytest
import torch

from mnistsum_ray.model.loss import Objective, joint_loss
from mnistsum_ray.model.mixed_precision import cast_parameters
from mnistsum_ray.model.network import TwoHeadCNN, prepare_images
from tests.model.test_optimizer import random_rows


def test_loss_and_gradients_are_those_of_autocast() -> None:
    torch.manual_seed(0)
    ours, autocast = TwoHeadCNN(), TwoHeadCNN()
    autocast.load_state_dict(ours.state_dict())
    images, digits, numbers = random_rows(64)
    loss, reported = Objective(ours, 0.05, torch.bfloat16)(prepare_images(images), numbers, digits, None)
    loss.backward()
    with torch.autocast("cpu", torch.bfloat16):
        scores = autocast(prepare_images(images), numbers)
    expected, expected_reported = joint_loss(scores, digits, numbers, 0.05)
    torch.autograd.backward(expected)
    assert (loss.item(), reported.item()) == (expected.item(), expected_reported.item())
    for (name, parameter), other in zip(ours.named_parameters(), autocast.parameters(), strict=True):
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.stride() == parameter.stride(), name
        assert torch.equal(parameter.grad, other.grad), name  # type: ignore[arg-type]


def test_the_compiler_can_follow() -> None:
    """Not compiled to machine code, which takes a minute; the bits are those of the same operations one by one."""
    torch.manual_seed(0)
    objective = Objective(TwoHeadCNN(), 0.05, torch.bfloat16)
    images, digits, numbers = random_rows(8)
    gradients = []
    for function in (objective, torch.compile(objective, backend="aot_eager", dynamic=False, fullgraph=True)):
        loss, _ = function(prepare_images(images), numbers, digits, None)
        loss.backward()
        gradients.append([parameter.grad for parameter in objective.parameters()])
        for parameter in objective.parameters():
            parameter.grad = None
    for ours, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, ours)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_copies_are_channels_last_as_the_parameters(dtype: torch.dtype) -> None:
    parameters = dict(TwoHeadCNN().named_parameters())
    copies = cast_parameters(parameters, dtype)
    assert list(copies) == list(parameters)
    for name, parameter in parameters.items():
        assert (copies[name].dtype, copies[name].stride()) == (dtype, parameter.stride())
        assert torch.equal(copies[name], parameter.to(dtype))
        assert (copies[name] is parameter) == (dtype == torch.float32)
