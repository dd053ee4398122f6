"""Optimizer and learning-rate schedule: Muon for the hidden layers, AdamW for all other parameters."""

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any, Final

import torch
from torch import Tensor

from mnistsum_ray.model.network import Network, split_views
from mnistsum_ray.model.parts import find_parts

_WARM_UP: Final = 0.2
"""Share of the steps in which the learning rate rises."""

_MOMENTUM: Final = 0.6
"""Share of the old momentum that Muon keeps."""

_ADAMW_FACTOR: Final = 0.15
"""Learning rate of AdamW as a share of Muon's."""

_SUM_HEAD_FACTOR: Final = 0.75
"""Likewise of the parameters of heads that read the digit scores: they lag behind the convolutions that they read."""

# Muon's, as in Jordan's implementation, and in `torch.optim.Muon`.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS: Final = 5
_EPSILON: Final = 1e-7


def one_cycle(step: int, total_steps: int, peak: float) -> float:
    """Learning rate at a step: up from peak / 25 in the first fifth, then down to peak / 10,000, both along a cosine.

    This is the one-cycle schedule (Smith and Topin, "Super-Convergence", 2018) as a pure function: a checkpoint needs no state.
    """
    rise_steps = max(1.0, _WARM_UP * total_steps)
    if step < rise_steps:
        low, progress = peak / 25, step / rise_steps
    else:
        low, progress = peak / 1e4, 1 - (step - rise_steps) / max(1.0, total_steps - 1 - rise_steps)
    return low + (peak - low) * (1 - math.cos(math.pi * progress)) / 2


class Muon:
    """Muon (Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024) with Nesterov momentum.

    `torch.optim.Muon` takes one matrix after the other and always computes in bfloat16: on a CPU without bfloat16 instructions
    that is 110 ms a step for this network, in place of 9. This class takes matrices together: on GPUs, where launches count, all
    of them, filled up with zeros, which changes no result; on CPUs, where multiplications count, those of one shape that follow
    each other.

    The parameters, `matrices`, are updated in place. `dtype` is that of the orthogonalization. In each step a parameter loses the
    share `weight_decay` of itself, times the learning rate.
    """

    def __init__(self, matrices: Sequence[Tensor], weight_decay: float, dtype: torch.dtype) -> None:
        self._matrices = list(matrices)
        self._weight_decay = weight_decay
        self._dtype = dtype
        # Steps of tall matrices are larger, so that an element moves as far as one of a wide matrix.
        self._rates = [math.sqrt(max(1.0, len(matrix) / matrix.shape[1])) for matrix in matrices]
        shapes = [(min(matrix.shape), max(matrix.shape)) for matrix in matrices]
        if matrices[0].is_cuda:
            largest = (max(rows for rows, _ in shapes), max(columns for _, columns in shapes))
            shapes = [largest] * len(shapes)
        self._stacks = [(len(list(alike)), *shape) for shape, alike in groupby(shapes)]
        self._stacked = matrices[0].new_zeros(sum(map(math.prod, shapes)))
        # Place of each element in the stacks, where tall matrices are transposed. All elements are copied in one launch.
        places = []
        for matrix, place in zip(matrices, split_views(torch.arange(len(self._stacked)), shapes), strict=True):
            rows, columns = matrix.shape
            places.append((place if rows <= columns else place.T)[:rows, :columns].reshape(-1))
        self._places = torch.cat(places).to(self._stacked.device)
        self._momentum = self._stacked.new_zeros(len(self._places))
        self.momenta = self._of_matrices(self._momentum)
        """Momentum of each matrix, in its shape; it may be filled in place."""

    def step(self, gradients: Sequence[Tensor], learning_rate: float) -> None:
        """Update the matrices from their gradients, whose elements are in the order of the matrices'."""
        gradient = torch.cat([gradient.reshape(-1) for gradient in gradients])
        self._momentum.lerp_(gradient, 1 - _MOMENTUM)
        self._stacked.index_copy_(0, self._places, gradient.lerp_(self._momentum, _MOMENTUM))
        stacks = split_views(self._stacked.to(self._dtype), self._stacks)
        steps = torch.cat([orthogonalize(stack).view(-1) for stack in stacks]).float()
        updates = self._of_matrices(steps.index_select(0, self._places))
        torch._foreach_mul_(self._matrices, 1 - learning_rate * self._weight_decay)
        torch._foreach_add_(self._matrices, torch._foreach_mul(updates, [-learning_rate * rate for rate in self._rates]))

    def _of_matrices(self, flat: Tensor) -> list[Tensor]:
        return split_views(flat, [matrix.shape for matrix in self._matrices])


def orthogonalize(matrices: Tensor) -> Tensor:
    """Five Newton-Schulz iterations on each of some matrices [n, rows, columns], rows <= columns.

    All singular values but 0 come near 1 (0.7 to 1.2).
    """
    norms = torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True)
    matrices = matrices / norms.clamp_(min=_EPSILON)
    for _ in range(_ITERATIONS):
        gram = torch.bmm(matrices, matrices.mT)
        matrices = torch.baddbmm(matrices, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), matrices, beta=_A)
    return matrices


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the hidden weights of a network; AdamW for all other parameters.

    The model is on the device where it will be trained: its parameters must not move in memory afterwards. `weight_decay` and
    `dtype` are as of `Muon`.
    """

    def __init__(self, model: Network, weight_decay: float, dtype: torch.dtype) -> None:
        parts = find_parts(model)
        hidden = parts.hidden_weights
        rest = [parameter for parameter in model.parameters() if parameter not in set(hidden)]
        of_heads = set(parts.head_parameters)
        groups = [
            {"params": hidden, "factor": 1.0},
            {"params": [parameter for parameter in rest if parameter not in of_heads], "factor": _ADAMW_FACTOR},
            {"params": [parameter for parameter in rest if parameter in of_heads], "factor": _SUM_HEAD_FACTOR},
        ]
        super().__init__(groups, {"lr": 0.0, "weight_decay": weight_decay})
        # Views: where the weights of a convolution are not channels last, this fails.
        matrices = [_channels_last(parameter.detach()).view(len(parameter), -1) for parameter in hidden]
        self._muon = Muon(matrices, weight_decay, dtype)
        self._adamw = torch.optim.AdamW(self.param_groups[1:], fused=True)
        self._share_state()

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set Muon's learning rate; those of AdamW are shares of it."""
        for group in self.param_groups:
            group["lr"] = learning_rate * group["factor"]

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the parameters from their gradients."""
        hidden = self.param_groups[0]
        self._muon.step([_channels_last(parameter.grad) for parameter in hidden["params"]], hidden["lr"])
        self._adamw.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of another optimizer of the same network, from any device and in any memory format."""
        super().load_state_dict(state_dict)
        for parameter, moments in self.state.items():
            for name, value in moments.items():
                if value.shape == parameter.shape:  # AdamW's kernel takes moments that lie in memory as their parameter
                    moments[name] = torch.empty_like(parameter.detach()).copy_(value)
        self._share_state()

    def _share_state(self) -> None:
        """Have AdamW use the state and the groups of this optimizer, and Muon's momenta be in the state."""
        self._adamw.state, self._adamw.param_groups = self.state, self.param_groups[1:]
        for parameter, matrix in zip(self.param_groups[0]["params"], self._muon.momenta, strict=True):
            momentum = matrix.view(_channels_last(parameter).shape).movedim(-1, 1)
            if loaded := self.state[parameter]:
                momentum.copy_(loaded["momentum_buffer"])
            self.state[parameter]["momentum_buffer"] = momentum


def _channels_last(weight: Tensor) -> Tensor:
    """View of weights [out, in, height, width] as [out, height, width, in]; a matrix is returned as it is."""
    return weight.movedim(1, -1)
