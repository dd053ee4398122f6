"""Copies of all parameters in another dtype, made at once: autocast makes one after the other, which are 40 kernels a step."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def cast_parameters(parameters: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Copy parameters in a dtype; gradients of the copies become the parameters' gradients, in the parameters' dtype.

    Parameters that have the dtype are returned as they are.
    """
    if all(parameter.dtype == dtype for parameter in parameters.values()):
        return dict(parameters)
    if torch.compiler.is_compiling():  # the compiler joins the copies by itself, and cannot follow ours
        return {name: parameter.to(dtype) for name, parameter in parameters.items()}
    copies = _Cast.apply(dtype, *parameters.values())  # type: ignore[no-untyped-call]
    return dict(zip(parameters, copies, strict=True))


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.dtypes = {parameter.dtype for parameter in parameters}
        return _copies(parameters, dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dtype,) = ctx.dtypes
        return None, *_copies(gradients, dtype)


def _copies(tensors: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Copies in each tensor's own memory format, which lie in one block of memory; the tensors must be dense."""
    sizes = [tensor.numel() for tensor in tensors]
    flat = torch.empty(sum(sizes), dtype=dtype, device=tensors[0].device)
    copies = [
        part.as_strided(tensor.shape, tensor.stride()) for part, tensor in zip(torch.split(flat, sizes), tensors, strict=True)
    ]
    torch._foreach_copy_(copies, tensors)
    return tuple(copies)
