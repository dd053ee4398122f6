"""Schedule of one worker: which rows it trains on at which step."""

from dataclasses import dataclass
from typing import Final

import numpy as np

from mnistsum_ray.data.sampling import RowIds, epoch_order, shard_for_rank, steps_per_epoch

_TASK_ROWS: Final = 4096
"""Rows that one gather task yields: 3 MB, some tens of milliseconds."""


@dataclass(frozen=True)
class Schedule:
    """The rows of each step, by arithmetic from the seed: every process that computes them gets the same."""

    row_ids: RowIds
    """Training rows in ascending order, int64[n]."""
    batch_size: int
    """Rows of a step over all workers."""
    seed: int
    distortion: float
    first_epoch: int
    first_step: int
    """First step of the first epoch; later epochs start at step 0."""
    epochs: int
    rank: int
    world_size: int

    @property
    def steps(self) -> int:
        """Steps an epoch, the same on every worker."""
        return steps_per_epoch(len(self.row_ids), self.batch_size)

    def batch_rows(self, step: int) -> int:
        """Number of rows of the global batch at a step of an epoch."""
        return min(self.batch_size, len(self.row_ids) - step * self.batch_size)

    def share_rows(self, step: int) -> int:
        """Number of rows of this worker's share of that batch; the share of the last batch may be empty."""
        return len(range(self.rank, self.batch_rows(step), self.world_size))

    def tasks(self) -> list[dict[str, int]]:
        """Gather tasks: consecutive steps `first`..`last`-1 of one `epoch`, enough of them to be worth a task."""
        stride = max(1, _TASK_ROWS * self.world_size // self.batch_size)
        return [
            {"epoch": epoch, "first": first, "last": min(first + stride, self.steps)}
            for epoch in range(self.first_epoch, self.epochs)
            for first in range(self.first_step if epoch == self.first_epoch else 0, self.steps, stride)
        ]

    def task_rows(self, task: dict[str, int]) -> int:
        """Number of rows of this worker's shares of all steps of a task."""
        return sum(self.share_rows(step) for step in range(task["first"], task["last"]))

    def rows(self, epoch: int, first: int, last: int) -> RowIds:
        """Rows of this worker's shares of the steps first..last-1, in the order of the steps."""
        order = epoch_order(self.seed, epoch, self.row_ids)
        batches = (order[step * self.batch_size : (step + 1) * self.batch_size] for step in range(first, last))
        return np.concatenate([shard_for_rank(batch, self.rank, self.world_size) for batch in batches])
