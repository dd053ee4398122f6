"""The steps of Muon and AdamW."""

import copy

import pytest
import torch
from torch import nn

from mnistsum_ray.mnist.network import TwoHeadCNN
from mnistsum_ray.mnist.optimizer import _MUON_LAYERS, MuonAdamW
from tests.mnist import new_model, random_rows, task


def compute_gradients(model: TwoHeadCNN) -> None:
    batch = random_rows(16)
    torch.autograd.backward(task().loss(model(batch), batch).mean())


def set_rate(optimizer: MuonAdamW, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]


def test_muon_is_that_of_pytorch() -> None:
    model = new_model()
    optimizer = MuonAdamW(model, 0.3, bf16=True)
    set_rate(optimizer, 0.1)
    weights = [getattr(model, layer).weight for layer in _MUON_LAYERS]
    matrices = [nn.Parameter(weight.detach().flatten(1).clone()) for weight in weights]
    other = torch.optim.Muon(matrices, lr=0.1, momentum=0.6, weight_decay=0.3)
    for _ in range(3):
        optimizer.zero_grad()
        compute_gradients(model)
        for matrix, weight in zip(matrices, weights, strict=True):
            assert weight.grad is not None
            matrix.grad = weight.grad.flatten(1).clone()
        optimizer.step()
        other.step()  # type: ignore[no-untyped-call]
    for matrix, weight in zip(matrices, weights, strict=True):
        momentum = optimizer.state[weight]["momentum_buffer"].flatten(1)
        torch.testing.assert_close(momentum, other.state[matrix]["momentum_buffer"])
        # Steps have elements of about 0.1 / sqrt(576); bfloat16 has three digits, and sums in
        # another order.
        torch.testing.assert_close(weight.detach().flatten(1), matrix.detach(), rtol=0, atol=1e-3)


def test_a_step_moves_every_parameter() -> None:
    """Adam's first step moves the median element of a layer of the heads by 0.75 learning rates."""
    model = new_model()
    before = copy.deepcopy(model.state_dict())
    optimizer = MuonAdamW(model, 0.0, bf16=False)
    compute_gradients(model)
    set_rate(optimizer, 0.02)
    optimizer.step()
    moved = {name: (value - before[name]).abs() for name, value in model.state_dict().items()}
    assert all(distance.any() for distance in moved.values())
    assert moved["fc2.weight"].median().item() == pytest.approx(0.015, rel=0.01)
