"""TODO training.schedule"""

from dataclasses import dataclass
from typing import Final

import numpy as np

from mnistsum_ray.data.sampling import RowIds, epoch_order, shard_for_rank, steps_per_epoch

_TASK_ROWS: Final = 4096
"""Rows that one gather task yields: 3 MB, some tens of milliseconds."""


@dataclass(frozen=True)
class Schedule:
    """What one worker is to see, and in which order: pure arithmetic, the same wherever it is worked out."""

    row_ids: RowIds
    """The training rows, ascending."""
    batch_size: int
    seed: int
    max_shift: int
    distortion: float
    first_epoch: int
    first_step: int
    """Of the first epoch; the later ones begin at 0."""
    epochs: int
    rank: int
    world_size: int

    @property
    def steps(self) -> int:
        """Steps an epoch, the same on every worker."""
        return steps_per_epoch(len(self.row_ids), self.batch_size)

    def batch_rows(self, step: int) -> int:
        """Rows of the global batch at this step of an epoch."""
        return min(self.batch_size, len(self.row_ids) - step * self.batch_size)

    def share_rows(self, step: int) -> int:
        """Rows of this worker's share of that batch; the last one may be empty."""
        return len(range(self.rank, self.batch_rows(step), self.world_size))

    def tasks(self) -> list[dict[str, int]]:
        """Consecutive steps, put together so that a task is worth its overhead and never spans two epochs."""
        stride = max(1, _TASK_ROWS * self.world_size // self.batch_size)
        return [
            {"epoch": epoch, "first": first, "last": min(first + stride, self.steps)}
            for epoch in range(self.first_epoch, self.epochs)
            for first in range(self.first_step if epoch == self.first_epoch else 0, self.steps, stride)
        ]

    def task_rows(self, task: dict[str, int]) -> int:
        """Rows of this worker's shares of all steps of a task."""
        return sum(self.share_rows(step) for step in range(task["first"], task["last"]))

    def rows(self, epoch: int, first: int, last: int) -> RowIds:
        """The rows of this worker's shares of steps first..last-1, one after the other."""
        order = epoch_order(self.seed, epoch, self.row_ids)
        batches = (order[step * self.batch_size : (step + 1) * self.batch_size] for step in range(first, last))
        return np.concatenate([shard_for_rank(batch, self.rank, self.world_size) for batch in batches])
