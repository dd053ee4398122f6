"""Collective operations of training workers; each does nothing with one worker."""

import torch.distributed as dist
from torch import Tensor, nn


def _several_workers() -> bool:
    # NCCL makes its communicator in the first collective: with one worker, which needs none, it would take 1 to 2 s and memory.
    return dist.is_initialized() and dist.get_world_size() > 1


def all_reduce_sum(values: Tensor) -> Tensor:
    """Element-wise sum of a tensor over all workers, on every worker, as a new tensor."""
    values = values.clone()
    if _several_workers():
        dist.all_reduce(values)
    return values


def broadcast_state(module: nn.Module) -> None:
    """Copy the parameters and buffers of rank 0 to all workers, in place.

    Different CPUs or GPUs round differently, so copies of the network may differ in the last bits after an epoch. Without this
    they would drift apart. Buffers that training changes differ anyway: each worker has seen other rows.
    """
    if _several_workers():
        for value in module.state_dict().values():
            sent = value.contiguous()
            dist.broadcast(sent, src=0)
            value.copy_(sent)
