"""Optimizer and learning-rate schedule: Muon for the hidden layers, AdamW for all other parameters."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Final

import torch
from torch import Tensor

from mnistsum_ray.model.network import TwoHeadCNN

_WARM_UP: Final = 0.2
"""Share of the steps in which the learning rate rises."""

_MOMENTUM: Final = 0.6
"""Momentum of Muon."""

_ADAMW_FACTOR: Final = 0.15
"""Learning rate of AdamW as a share of Muon's."""

_SUM_HEAD_FACTOR: Final = 0.75
"""Learning rate of the sum head's AdamW parameters as a share of Muon's: the head lags behind the convolutions that it reads."""

# Muon's, as in Jordan's implementation, and in `torch.optim.Muon`.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS: Final = 5
_EPSILON: Final = 1e-7


def one_cycle(step: int, total_steps: int, peak: float) -> float:
    """Learning rate at a step: up from peak / 25 in the first fifth, then down to peak / 10,000, both along a cosine.

    This is the one-cycle schedule (Smith and Topin, "Super-Convergence", 2018) as a pure function, so a checkpoint needs
    no scheduler state.
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
    of them, filled up with zeros, which changes no result; on CPUs, where multiplications count, those of one shape.

    Args:
        matrices: the parameters, of two dimensions; they are updated in place.
        momentum: share of the old momentum that is kept.
        weight_decay: decoupled; in each step a parameter loses this share of itself, times the learning rate.
    """

    def __init__(self, matrices: Sequence[Tensor], momentum: float, weight_decay: float) -> None:
        self._matrices, self._share, self._weight_decay = list(matrices), momentum, weight_decay
        # Steps of tall matrices are larger, so that an element moves as far as one of a wide matrix.
        self._rates = [math.sqrt(max(1.0, len(matrix) / matrix.shape[1])) for matrix in matrices]
        wide = [(min(matrix.shape), max(matrix.shape)) for matrix in matrices]
        whole = (max(rows for rows, _ in wide), max(columns for _, columns in wide))
        self._shapes = [whole if matrices[0].is_cuda else shape for shape in wide]
        self._stacked = matrices[0].new_zeros(sum(map(math.prod, self._shapes)))
        # Place of each element in the stacks, where tall matrices are transposed. All elements are copied in one launch.
        rest = {shape: iter(places) for shape, places in self._stacks(torch.arange(len(self._stacked))).items()}
        places = [next(rest[shape])[:rows, :columns] for shape, (rows, columns) in zip(self._shapes, wide, strict=True)]
        lying = zip(places, matrices, strict=True)
        order = [(place if len(matrix) <= matrix.shape[1] else place.T).reshape(-1) for place, matrix in lying]
        self._places = torch.cat(order).to(self._stacked.device)
        self._momentum = self._stacked.new_zeros(len(self._places))
        self.momenta = self._parts(self._momentum)
        """Momentum of each matrix, in its shape; it may be filled in place."""

    def step(self, gradients: Sequence[Tensor], learning_rate: float, dtype: torch.dtype) -> None:
        """Update the matrices from their gradients; `dtype` is that of the orthogonalization."""
        gradient = torch.cat([gradient.reshape(-1) for gradient in gradients])
        self._momentum.lerp_(gradient, 1 - self._share)
        self._stacked.index_copy_(0, self._places, gradient.lerp_(self._momentum, self._share))
        steps = [orthogonalize(stack).view(-1) for stack in self._stacks(self._stacked.to(dtype)).values()]
        updates = self._parts(torch.cat(steps).float().index_select(0, self._places))
        torch._foreach_mul_(self._matrices, 1 - learning_rate * self._weight_decay)
        torch._foreach_add_(self._matrices, torch._foreach_mul(updates, [-learning_rate * rate for rate in self._rates]))

    def _stacks(self, flat: Tensor) -> dict[tuple[int, int], Tensor]:
        """The stacks, [n, rows, columns] each by (rows, columns), that lie one after the other."""
        counts = Counter(self._shapes)
        parts = torch.split(flat, [count * math.prod(shape) for shape, count in counts.items()])
        return {shape: part.view(-1, *shape) for shape, part in zip(counts, parts, strict=True)}

    def _parts(self, flat: Tensor) -> list[Tensor]:
        """The matrices that lie one after the other."""
        parts = torch.split(flat, [matrix.numel() for matrix in self._matrices])
        return [part.view_as(matrix) for part, matrix in zip(parts, self._matrices, strict=True)]


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


class MuonAdamW:
    """Muon for the weights of the hidden layers (conv2 to conv6 and fc1); AdamW for the first and last layers and all biases.

    Muon takes matrices, so a convolution's weights are passed as a matrix view, output channels by inputs.

    Args:
        model: on the device where it will be trained; its parameters must not move in memory afterwards.
        weight_decay: decoupled weight decay of both optimizers.
    """

    def __init__(self, model: TwoHeadCNN, weight_decay: float) -> None:
        self._hidden = [*(convolution.weight for convolution in model.convolutions[1:]), model.fc1.weight]
        self._matrices = [_matrix(parameter.detach()) for parameter in self._hidden]
        self._muon = Muon(self._matrices, _MOMENTUM, weight_decay)
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        rest = {parameter: name for parameter, name in self._names.items() if parameter not in set(self._hidden)}
        groups = [
            {"params": [parameter for parameter, name in rest.items() if name.startswith("conv")], "factor": _ADAMW_FACTOR},
            {"params": [parameter for parameter, name in rest.items() if name.startswith("fc")], "factor": _SUM_HEAD_FACTOR},
        ]
        self._adamw = torch.optim.AdamW(groups, weight_decay=weight_decay, fused=True)

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for parameter in self._names:
            parameter.grad = None

    def step(self, learning_rate: float, dtype: torch.dtype) -> None:
        """Update the parameters from their gradients; `learning_rate` is Muon's, `dtype` that of its orthogonalization."""
        gradients = [parameter.grad for parameter in self._hidden]
        self._muon.step([_matrix(gradient) for gradient in gradients if gradient is not None], learning_rate, dtype)
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate * group["factor"]
        self._adamw.step()

    def states(self) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        """Name of each parameter, the tensor that is updated, and its state, whose tensors may be read or filled in place."""
        for parameter, matrix, momentum in zip(self._hidden, self._matrices, self._muon.momenta, strict=True):
            yield self._names[parameter], matrix, {"momentum_buffer": momentum}
        for group in self._adamw.param_groups:
            for parameter in group["params"]:
                yield self._names[parameter], parameter, self._adamw.state[parameter]


def _matrix(weight: Tensor) -> Tensor:
    """View of channels-last weights [out, in, height, width] as [out, height * width * in]; a matrix is returned as it is."""
    return weight if weight.dim() == 2 else weight.permute(0, 2, 3, 1).flatten(1)
