"""Collective operations of the training workers; each does nothing in a process without a process group."""

from collections.abc import Iterable

import torch.distributed as dist
from torch import Tensor


def all_reduce_sum(values: Tensor) -> Tensor:
    """Element-wise sum of a tensor over all workers, on every worker."""
    if dist.is_initialized():
        values = values.clone()
        dist.all_reduce(values)
    return values


def broadcast_parameters(parameters: Iterable[Tensor]) -> None:
    """Copy the parameters of rank 0 to all workers, in place.

    Different CPUs or GPUs round differently, so copies of the network may differ in the last bits after an epoch. Without this
    they would drift apart.
    """
    if dist.is_initialized():
        for parameter in parameters:
            sent = parameter.detach().contiguous()
            dist.broadcast(sent, src=0)
            parameter.detach().copy_(sent)
