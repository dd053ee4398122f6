"""The learning-rate schedule, and the steps of Muon and AdamW."""

import copy

import numpy as np
import pytest
import torch

from mnistsum_ray.model.loss import joint_loss
from mnistsum_ray.model.network import TwoHeadCNN, prepare_images
from mnistsum_ray.model.optimizer import Muon, MuonAdamW, one_cycle, orthogonalize


@pytest.mark.parametrize("total", [1, 2, 5, 100, 1075])
def test_learning_rate_rises_and_falls_once(total: int) -> None:
    rates = np.array([one_cycle(step, total, 0.01) for step in range(total)])
    assert ((rates > 0) & (rates <= 0.01 + 1e-12)).all()
    top = int(rates.argmax())
    assert (np.diff(rates[: top + 1]) > 0).all()
    assert (np.diff(rates[top:]) < 0).all()
    if total >= 100:
        assert rates[-1] == pytest.approx(1e-6)
        assert rates.max() == pytest.approx(0.01, rel=1e-3)


def random_rows(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images uint8[n, 28, 28], digits and numbers."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (rows, 28, 28), dtype=torch.uint8, generator=generator)
    digits, numbers = (torch.randint(0, 10, (rows,), generator=generator) for _ in range(2))
    return images, digits, numbers


def compute_gradients(model: TwoHeadCNN) -> None:
    images, digits, numbers = random_rows(16)
    digit_scores, sum_scores = model(prepare_images(images), numbers)
    torch.autograd.backward(joint_loss((digit_scores, sum_scores), digits, numbers)[0] / 16)


def after_a_step(weight_decay: float) -> tuple[TwoHeadCNN, dict[str, torch.Tensor]]:
    """A network after its first step at a learning rate of 0.02, and its weights before."""
    torch.manual_seed(0)
    model = TwoHeadCNN()
    before = copy.deepcopy(model.state_dict())
    optimizer = MuonAdamW(model, weight_decay)
    compute_gradients(model)
    optimizer.step(0.02, torch.float32)
    return model, before


def test_the_first_step_moves_each_hidden_layer_by_an_orthogonal_matrix() -> None:
    """Muon by definition: the step is the gradient with all singular values near one."""
    model, before = after_a_step(weight_decay=0.0)
    for name, value in model.state_dict().items():
        assert not torch.equal(value, before[name]), f"{name} has not moved"
        if name in {"fc1.weight", *(f"conv{index}.weight" for index in range(2, 7))}:
            # PyTorch's Muon multiplies the steps of tall matrices by the square root of height / width.
            tall = max(1.0, len(value) / value[0].numel()) ** 0.5
            moved = (before[name] - value).flatten(1) / (0.02 * tall)
            spectrum = torch.linalg.svdvals(moved)
            assert spectrum.max() < 1.4
            assert spectrum.median() > 0.5
            gradient = model.get_parameter(name).grad
            assert gradient is not None
            assert (moved * gradient.flatten(1)).sum() > 0, "downhill"


def test_muon_is_that_of_pytorch() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(64, 288), (64, 576), (64, 576), (128, 576), (128, 20)]
    ours = [torch.randn(shape, generator=generator) for shape in shapes]
    theirs = [torch.nn.Parameter(matrix.clone()) for matrix in ours]
    optimizer = Muon(ours, momentum=0.6, weight_decay=0.3)
    other = torch.optim.Muon(theirs, lr=0.1, momentum=0.6, weight_decay=0.3)
    for _ in range(3):
        gradients = [torch.randn(shape, generator=generator) for shape in shapes]
        for parameter, gradient in zip(theirs, gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step(gradients, 0.1, torch.bfloat16)
        other.step()  # type: ignore[no-untyped-call]
    for matrix, momentum, parameter in zip(ours, optimizer.momenta, theirs, strict=True):
        torch.testing.assert_close(momentum, other.state[parameter]["momentum_buffer"])
        # Steps have elements of about 0.1 / sqrt(576); bfloat16 has three digits, and sums in another order.
        torch.testing.assert_close(matrix, parameter.detach(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_orthogonalization_brings_singular_values_near_one(dtype: torch.dtype) -> None:
    matrices = torch.randn(2, 20, 128, generator=torch.Generator().manual_seed(0))
    both, alone = (orthogonalize(values.to(dtype)).float() for values in (matrices, matrices[:1]))
    torch.testing.assert_close(both[:1], alone, rtol=0, atol=5e-3 if dtype == torch.bfloat16 else 1e-5)
    spectrum = torch.linalg.svdvals(both)
    assert 0.6 < spectrum.min() <= spectrum.max() < 1.25


def test_first_step_of_adamw_is_scaled_by_each_groups_factor() -> None:
    """Adam's first step moves each element by the learning rate, whatever its gradient; here by 0.15 and 0.75 times that."""
    model, before = after_a_step(weight_decay=0.0)
    for name, share in {
        "conv1.weight": 0.15,
        "conv7.weight": 0.15,
        "conv3.bias": 0.15,
        "fc2.weight": 0.75,
        "fc1.bias": 0.75,
    }.items():
        moved = (model.state_dict()[name] - before[name]).abs()
        assert moved.median().item() == pytest.approx(0.02 * share, rel=0.01), name


def test_weight_decay_is_decoupled_from_the_gradient() -> None:
    (plain, before), (decayed, _) = after_a_step(weight_decay=0.0), after_a_step(weight_decay=0.5)
    for name, share in {"conv4.weight": 1.0, "conv7.weight": 0.15, "fc2.weight": 0.75}.items():
        difference = plain.get_parameter(name) - decayed.get_parameter(name)
        torch.testing.assert_close(difference, 0.02 * share * 0.5 * before[name], rtol=1e-3, atol=1e-6)


def test_every_parameter_has_one_optimizer() -> None:
    model = TwoHeadCNN()
    names = [name for name, _, _ in MuonAdamW(model, weight_decay=0.0).states()]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
