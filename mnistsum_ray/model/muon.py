"""Muon (Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024) for several matrices at once.

`torch.optim.Muon` treats one matrix after the other and always computes in bfloat16. For this network these are 140 kernels a
step, more than half of all, and on a CPU without bfloat16 instructions 110 ms a step instead of 9.
"""

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# As in Jordan's implementation, and in `torch.optim.Muon`.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS: Final = 5
_EPSILON: Final = 1e-7

_ROW_STEP: Final = 64
_ROW_STEP_CUDA: Final = 128
"""Matrices are padded to a multiple of this many rows: fewer sizes are fewer kernels, which a GPU's time goes into, but more
arithmetic, which a CPU's time goes into. For this network there are two sizes on CPUs, and one on GPUs."""


class Muon:
    """Muon with Nesterov momentum and decoupled weight decay.

    Args:
        matrices: the parameters, of two dimensions, contiguous; they are updated in place.
        momentum: share of the old momentum that is kept.
        weight_decay: in each step a parameter loses this share of itself, times the learning rate.
    """

    def __init__(self, matrices: Sequence[Tensor], momentum: float, weight_decay: float) -> None:
        self._matrices, self._share, self._weight_decay = list(matrices), momentum, weight_decay
        self._sizes = [matrix.numel() for matrix in matrices]
        device = matrices[0].device
        self._zero = torch.zeros(1, device=device)
        self._momentum = torch.zeros(sum(self._sizes) + 1, device=device)
        # Steps of tall matrices are larger, so that an element moves as far as one of a wide matrix.
        factors = [math.sqrt(max(1.0, matrix.size(0) / matrix.size(1))) for matrix in matrices]
        self._factors = torch.repeat_interleave(torch.tensor(factors), torch.tensor(self._sizes)).to(device)
        row_step = _ROW_STEP_CUDA if device.type == "cuda" else _ROW_STEP
        batches, places = _batches_and_places([tuple(matrix.shape) for matrix in matrices], row_step)
        self._batches = [torch.from_numpy(batch).to(device) for batch in batches]
        self._places = torch.from_numpy(places).to(device)

    @property
    def momenta(self) -> list[Tensor]:
        """Momentum of each matrix, in its shape; a view, which may be filled."""
        return self._split(self._momentum[:-1])

    def step(self, gradients: Sequence[Tensor], learning_rate: float | Tensor, dtype: torch.dtype) -> None:
        """Update the matrices from their gradients; `dtype` is that of the orthogonalization."""
        flat = torch.cat([*(gradient.reshape(-1) for gradient in gradients), self._zero])
        self._momentum.lerp_(flat, 1 - self._share)
        update = flat.lerp(self._momentum, self._share).to(dtype)
        orthogonal = torch.cat([orthogonalize(update[batch]).view(-1) for batch in self._batches])
        steps = orthogonal[self._places] * self._factors
        torch._foreach_mul_(self._matrices, 1 - learning_rate * self._weight_decay)
        if isinstance(learning_rate, Tensor):
            torch._foreach_sub_(self._matrices, self._split(steps * learning_rate))
        else:
            torch._foreach_add_(self._matrices, self._split(steps), alpha=-learning_rate)

    def _split(self, flat: Tensor) -> list[Tensor]:
        return [part.view_as(matrix) for part, matrix in zip(torch.split(flat, self._sizes), self._matrices, strict=True)]


def orthogonalize(matrices: Tensor) -> Tensor:
    """Five Newton-Schulz iterations on each of some matrices [n, rows, columns], rows <= columns.

    All singular values but 0 come near 1 (0.7 to 1.2). So rows and columns of zeros stay zeros, and change nothing.
    """
    norms = torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True)
    matrices = matrices / norms.clamp_(min=_EPSILON)
    for _ in range(_ITERATIONS):
        gram = torch.bmm(matrices, matrices.mT)
        matrices = torch.baddbmm(matrices, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), matrices, beta=_A)
    return matrices


def _batches_and_places(
    shapes: Sequence[tuple[int, ...]], row_step: int
) -> tuple[list[npt.NDArray[np.int64]], npt.NDArray[np.int64]]:
    """Where elements of the matrices, laid end to end, go in batches of padded matrices, and where they are found there.

    Returns:
        For each batch int64[n, rows, columns]: the index of each element; the last index, of a 0, where there is padding. Tall
        matrices are transposed. And int64[elements]: the place of each element in the batches, laid end to end.
    """
    sizes = [rows * columns for rows, columns in shapes]
    padding = sum(sizes)
    by_rows: dict[int, list[npt.NDArray[np.int64]]] = {}
    for (rows, columns), start in zip(shapes, np.cumsum([0, *sizes[:-1]]), strict=True):
        indices = np.arange(start, start + rows * columns).reshape(rows, columns)
        wide = indices.T if rows > columns else indices
        by_rows.setdefault(math.ceil(len(wide) / row_step) * row_step, []).append(wide)
    batches = []
    for rows, group in sorted(by_rows.items()):
        batch = np.full((len(group), rows, max(indices.shape[1] for indices in group)), padding)
        for padded, indices in zip(batch, group, strict=True):
            padded[: indices.shape[0], : indices.shape[1]] = indices
        batches.append(batch)
    laid_out = np.concatenate([batch.ravel() for batch in batches])
    (taken,) = np.nonzero(laid_out != padding)
    places = np.empty(padding, np.int64)
    places[laid_out[taken]] = taken
    return batches, places
