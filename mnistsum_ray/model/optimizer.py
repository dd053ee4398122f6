"""Optimizer and learning-rate schedule: Muon for the hidden layers, AdamW for all other parameters."""

import math
from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

from mnistsum_ray.model.muon import Muon
from mnistsum_ray.model.network import TwoHeadCNN

_WARM_UP: Final = 0.2
"""Share of the steps in which the learning rate rises."""

_MOMENTUM: Final = 0.6
"""Momentum of Muon."""

_ADAMW_FACTOR: Final = 0.15
"""Learning rate of AdamW as a share of Muon's."""

_SUM_HEAD_FACTOR: Final = 0.75
"""Learning rate of the sum head's AdamW parameters as a share of Muon's: the head lags behind the convolutions that it reads."""


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


class MuonAdamW:
    """Muon for the weights of the hidden layers (conv2 to conv6 and fc1); AdamW for the first and last layers and all biases.

    Muon takes matrices, so a convolution's weights are passed as a matrix view, output channels by inputs.

    Args:
        model: on the device where it will be trained; its parameters must not move in memory afterwards.
        weight_decay: decoupled weight decay of both optimizers.
    """

    def __init__(self, model: TwoHeadCNN, weight_decay: float) -> None:
        layers = (model.conv2, model.conv3, model.conv4, model.conv5, model.conv6, model.fc1)
        self._hidden = [layer.weight for layer in layers]
        taken = {id(parameter) for parameter in self._hidden}
        head = [parameter for layer in (model.fc1, model.fc2) for parameter in layer.parameters() if id(parameter) not in taken]
        taken |= {id(parameter) for parameter in head}
        rest = [parameter for parameter in model.parameters() if id(parameter) not in taken]
        self._matrices = [_matrix(parameter.detach()) for parameter in self._hidden]
        self._muon = Muon(self._matrices, _MOMENTUM, weight_decay)
        groups = [{"params": rest, "factor": _ADAMW_FACTOR}, {"params": head, "factor": _SUM_HEAD_FACTOR}]
        self._adamw = torch.optim.AdamW(groups, weight_decay=weight_decay, fused=True)
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for parameter in self._hidden:
            parameter.grad = None
        self._adamw.zero_grad(set_to_none=True)

    def step(self, learning_rate: float | Tensor, dtype: torch.dtype) -> None:
        """Update the parameters from their gradients.

        Args:
            learning_rate: Muon's; for a CUDA graph a scalar on the GPU, so that it can change from replay to replay.
            dtype: of Muon's orthogonalization.
        """
        gradients = [parameter.grad for parameter in self._hidden]
        self._muon.step([_matrix(gradient) for gradient in gradients if gradient is not None], learning_rate, dtype)
        recording = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate * group["factor"]
            # AdamW warns if this is set outside a recording, and refuses a recording without it.
            group["capturable"] = recording
        self._adamw.step()

    def states(self) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        """Name of each parameter, the tensor that is updated, and its state, whose tensors may be read or filled in place."""
        for parameter, matrix, momentum in zip(self._hidden, self._matrices, self._muon.momenta, strict=True):
            yield self._names[id(parameter)], matrix, {"momentum_buffer": momentum}
        for group in self._adamw.param_groups:
            for parameter in group["params"]:
                yield self._names[id(parameter)], parameter, self._adamw.state[parameter]


def _matrix(weight: Tensor) -> Tensor:
    """View of channels-last weights [out, in, height, width] as [out, height * width * in]; a matrix is returned as it is."""
    return weight if weight.dim() == 2 else weight.permute(0, 2, 3, 1).flatten(1)
