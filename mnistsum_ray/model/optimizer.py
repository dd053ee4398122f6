"""Optimizer and learning-rate schedule: Muon for the hidden layers, AdamW for the rest."""

import math
from typing import Final

import torch
from torch import Tensor, nn

from mnistsum_ray.model.network import TwoHeadCNN

_MOMENTUM: Final = 0.6
"""Share of the old momentum that Muon keeps."""


def one_cycle(step: int, total_steps: int, peak: float) -> float:
    """Learning rate at a step: up from peak / 25 in the first fifth, then down to peak / 10,000.

    Both along a cosine: the one-cycle schedule (Smith and Topin, "Super-Convergence", 2018).
    """
    rise_steps = max(1.0, 0.2 * total_steps)
    if step < rise_steps:
        low, progress = peak / 25, step / rise_steps
    else:
        low, progress = peak / 1e4, 1 - (step - rise_steps) / max(1.0, total_steps - 1 - rise_steps)
    return low + (peak - low) * (1 - math.cos(math.pi * progress)) / 2


class MuonAdamW:
    """Muon for the hidden weights of a network, AdamW for all other parameters.

    Muon (Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024) with
    Nesterov momentum, a convolution as a matrix [out, height * width * in]. `torch.optim.Muon`
    always orthogonalizes in bfloat16, and not only with `bf16`: on two cores without bfloat16
    instructions that is 67 ms a step for this network, in place of 4.
    """

    def __init__(self, model: TwoHeadCNN, weight_decay: float, *, bf16: bool) -> None:
        self._hidden = [model.get_parameter(f"{layer}.weight") for layer in model.muon_layers]
        self._weight_decay = weight_decay
        self._dtype = torch.bfloat16 if bf16 else torch.float32
        hidden = set(self._hidden)
        body: list[nn.Parameter] = []
        sums: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            if parameter not in hidden:
                is_of_sum = name.partition(".")[0] in model.sum_layers
                (sums if is_of_sum else body).append(parameter)
        # Shares of Muon's learning rate: the sum head, which reads the digit logits, lags behind.
        groups = [{"params": body, "factor": 0.15}, {"params": sums, "factor": 0.75}]
        self._adamw = torch.optim.AdamW(groups, weight_decay=weight_decay, fused=True)
        self.state: dict[Tensor, dict[str, Tensor]] = self._adamw.state
        """Momenta by parameter, which a checkpoint holds; empty for AdamW before the first step."""
        for weight in self._hidden:
            self.state[weight] = {"momentum_buffer": torch.zeros_like(weight)}
        self.set_learning_rate(0.0)

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set Muon's learning rate; those of AdamW are shares of it."""
        self._learning_rate = learning_rate
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate * group["factor"]

    def zero_grad(self) -> None:
        self._adamw.zero_grad()
        for weight in self._hidden:
            weight.grad = None

    @torch.no_grad()
    def step(self) -> None:
        for weight in self._hidden:
            assert weight.grad is not None
            momentum = self.state[weight]["momentum_buffer"]
            momentum.lerp_(weight.grad, 1 - _MOMENTUM)
            update = weight.grad.lerp(momentum, _MOMENTUM).movedim(1, -1)
            matrix = orthogonalize(update.flatten(1).to(self._dtype))
            # A tall matrix takes larger steps: its elements move as far as those of a wide one.
            rate = self._learning_rate * math.sqrt(max(1.0, len(matrix) / matrix.shape[1]))
            weight.mul_(1 - self._learning_rate * self._weight_decay)
            weight.sub_((rate * matrix.float()).reshape(update.shape).movedim(-1, 1))
        self._adamw.step()

    def load_state(self, parameter: nn.Parameter, state: dict[str, Tensor]) -> None:
        """Take over the state of a parameter, from any device and in any memory format."""
        for name, value in state.items():
            value = value.to(parameter.device)
            if value.shape == parameter.shape:  # AdamW needs momenta in the parameter's format
                value = torch.empty_like(parameter.detach()).copy_(value)
            self.state[parameter][name] = value


def orthogonalize(matrix: Tensor) -> Tensor:
    """Five Newton-Schulz iterations: all singular values but 0 come near 1 (0.7 to 1.2).

    With the coefficients of Jordan's implementation, as `torch.optim.Muon`.
    """
    if len(matrix) > matrix.shape[1]:
        return orthogonalize(matrix.T.contiguous()).T
    matrix = matrix / matrix.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = matrix @ matrix.T
        polynomial = torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        matrix = torch.addmm(matrix, polynomial, matrix, beta=3.4445)
    return matrix
