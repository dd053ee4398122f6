"""The steps of Muon and AdamW."""

import copy

import torch
from torch import nn

from mnistsum_ray.mnist.optimizer import _MUON_LAYERS, MuonAdamW
from tests.mnist import new_model, random_rows, task


def test_muon_is_that_of_pytorch_and_adamw_moves_all_else() -> None:
    model, batch = new_model(), random_rows(16)
    before = copy.deepcopy(model.state_dict())
    optimizer = MuonAdamW(model, 0.3, bf16=True)
    for group in optimizer.param_groups:
        group["lr"] = 0.1 * group["lr_factor"]
    weights = [getattr(model, layer).weight for layer in _MUON_LAYERS]
    matrices = [nn.Parameter(weight.detach().flatten(1).clone()) for weight in weights]
    other = torch.optim.Muon(matrices, lr=0.1, momentum=0.6, weight_decay=0.3)
    for _ in range(3):
        optimizer.zero_grad()
        torch.autograd.backward(task().loss(model(batch), batch).mean())
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
    for name, value in model.state_dict().items():
        assert (value - before[name]).any(), name
