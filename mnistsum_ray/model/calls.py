"""Calls of a task's methods: the network in its precision, and an error in one line that names
the task and the method."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mnistsum_ray.errors import RunError, TaskError, one_line, shortened
from mnistsum_ray.task import Batch, Task


@contextmanager
def calling(task: Task, method: str) -> Iterator[None]:
    """Raise what a method of a task raises in the block as a TaskError that names both.

    Errors of a device, such as too little memory, stay: another attempt may be better off.
    """
    try:
        yield
    except (RunError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:  # of anybody's code
        problem = f"{type(error).__name__}: {shortened(one_line(error))}"
        raise TaskError(f"task {task.name}: {method} raised {problem}") from error


def forward(task: Task, network: nn.Module, batch: Batch, *, bf16: bool) -> Any:
    """Return the network's outputs for a batch, as float32; `bf16` computes them by autocast."""
    device = next(iter(batch.values())).device
    with (
        calling(task, "network"),
        torch.autocast(device.type, torch.bfloat16, enabled=bf16 and task.bf16),
    ):
        outputs = network(batch)
    return map_tensors(
        lambda tensor: tensor.float() if tensor.is_floating_point() else tensor, outputs
    )


def map_tensors(change: Callable[[Tensor], Tensor], outputs: Any) -> Any:
    """Outputs with each tensor changed: a tensor, or tuples, lists and dicts of them."""
    if isinstance(outputs, Tensor):
        return change(outputs)
    if isinstance(outputs, dict):
        return {key: map_tensors(change, value) for key, value in outputs.items()}
    if isinstance(outputs, tuple | list):
        changed = [map_tensors(change, value) for value in outputs]
        is_named = hasattr(outputs, "_fields")
        return type(outputs)(*changed) if is_named else type(outputs)(changed)
    return outputs
