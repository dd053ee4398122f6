"""TODO model.distributed"""

from collections.abc import Iterable

import torch.distributed as dist
from torch import Tensor


def all_reduce_sum(values: Tensor) -> Tensor:
    """The element-wise sum over all workers, on every worker (itself where there is no process group)."""
    if dist.is_initialized():
        values = values.clone()
        dist.all_reduce(values)
    return values


def broadcast_parameters(values: Iterable[Tensor]) -> None:
    """Have every worker go on with the values of rank 0: on unlike CPUs or GPUs they differ by roundings, which would grow."""
    if dist.is_initialized():
        for value in values:
            sent = value.detach().contiguous()
            dist.broadcast(sent, src=0)
            value.detach().copy_(sent)
