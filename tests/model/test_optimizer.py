"""The learning-rate schedule, and the steps of Muon and AdamW."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from mnistsum_ray.model.network import Objective, TwoHeadCNN, prepare_images
from mnistsum_ray.model.optimizer import MuonAdamW, one_cycle
from tests.model import new_model, random_rows


def test_the_rate_rises_and_falls_once_and_is_highest_after_a_fifth_of_the_steps() -> None:
    for total in (1, 5, 1000):
        rates = np.array([one_cycle(step, total, 0.5) for step in range(total)])
        assert ((rates > 0) & (rates <= 0.5 + 1e-12)).all()
        top = int(rates.argmax())
        assert (np.diff(rates[: top + 1]) > 0).all()
        assert (np.diff(rates[top:]) < 0).all()
    assert (rates[0], rates[200]) == (0.5 / 25, 0.5)
    assert rates[999] == pytest.approx(0.5 / 1e4)


def compute_gradients(model: TwoHeadCNN) -> None:
    images, digits, numbers = random_rows(16)
    objective = Objective(model, 0.0, bf16=False)
    loss, _ = objective(prepare_images(images), numbers, digits, None)
    torch.autograd.backward(loss / 16)


def test_muon_is_that_of_pytorch() -> None:
    model = new_model()
    optimizer = MuonAdamW(model, 0.3, bf16=True)
    optimizer.set_learning_rate(0.1)
    weights = [getattr(model, layer).weight for layer in model.muon_layers]
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
    optimizer.set_learning_rate(0.02)
    optimizer.step()
    moved = {name: (value - before[name]).abs() for name, value in model.state_dict().items()}
    assert all(distance.any() for distance in moved.values())
    assert moved["fc2.weight"].median().item() == pytest.approx(0.015, rel=0.01)
