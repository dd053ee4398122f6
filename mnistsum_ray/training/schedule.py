"""Schedule of one worker: how many rows it trains on at which step, and at which places of the global batch."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt

from mnistsum_ray.data.row_ranges import RowRanges
from mnistsum_ray.data.sampling import RowIds, epoch_order, lanes_of_rank, positions_of_rank, steps_per_epoch, turns_of_rank

CPU_CHUNK_ROWS: Final = 4_096
"""Rows that are gathered, or put together, at once: 3 MB, a second of training on two cores."""

GPU_CHUNK_ROWS: Final = 16_384
"""12 MB, copied to the device at once. A loop that launches ten thousand kernels a second has no time for smaller ones."""


@dataclass(frozen=True)
class Chunk:
    """Consecutive steps `first`..`last`-1 of one epoch, enough of them to be worth a task."""

    epoch: int
    first: int
    last: int

    @property
    def steps(self) -> range:
        return range(self.first, self.last)


@dataclass(frozen=True)
class Schedule:
    """The places of each step, by arithmetic: every process that computes them gets the same."""

    rows: RowRanges
    """Training rows."""
    batch_size: int
    """Rows of a step over all workers."""
    lanes: int
    """Position p of a batch belongs to lane p % lanes, see `sampling.positions_of_rank`; the batch size for rows in memory."""
    seed: int
    distortion: float
    epochs: int
    rank: int
    world_size: int
    first_epoch: int = 0
    first_step: int = 0
    """First step of the first epoch; later epochs start at step 0."""
    rows_per_chunk: int = CPU_CHUNK_ROWS
    """Rows that are gathered, or put together, at once."""

    @property
    def steps(self) -> int:
        """Steps an epoch, the same on every worker."""
        return steps_per_epoch(len(self.rows), self.batch_size)

    def batch_rows(self, step: int) -> int:
        """Number of rows of the global batch at a step of an epoch."""
        return min(self.batch_size, len(self.rows) - step * self.batch_size)

    def positions(self, step: int) -> npt.NDArray[np.int64]:
        """Positions of this worker's rows in that batch, in ascending order, int64[n]; none in a last batch that is too small."""
        return self._full_positions if step < self.steps - 1 else self._last_positions

    def share_rows(self, step: int) -> int:
        """Number of rows of this worker's share of that batch."""
        return len(self.positions(step))

    @cached_property
    def _full_positions(self) -> npt.NDArray[np.int64]:
        return positions_of_rank(self.batch_size, self.lanes, self.rank, self.world_size)

    @cached_property
    def _last_positions(self) -> npt.NDArray[np.int64]:
        return positions_of_rank(self.batch_rows(self.steps - 1), self.lanes, self.rank, self.world_size)

    def first_step_of(self, epoch: int) -> int:
        """The first step of an epoch that is still to be trained."""
        return self.first_step if epoch == self.first_epoch else 0

    def chunks(self) -> Iterator[Chunk]:
        """All remaining steps of all remaining epochs, in order."""
        stride = max(1, self.rows_per_chunk * self.world_size // self.batch_size)
        for epoch in range(self.first_epoch, self.epochs):
            for first in range(self.first_step_of(epoch), self.steps, stride):
                yield Chunk(epoch, first, min(first + stride, self.steps))

    def chunk_rows(self, chunk: Chunk) -> int:
        """Number of rows of this worker's shares of all steps of a chunk."""
        return sum(map(self.share_rows, chunk.steps))

    def permuted_ids(self, chunk: Chunk) -> RowIds:
        """Rows of this worker's shares of a chunk where the whole epoch is one permutation, in the order of the steps."""
        order = _epoch_order(self.seed, chunk.epoch, self.rows.starts.tobytes(), self.rows.ends.tobytes())
        return np.concatenate([order[step * self.batch_size + self.positions(step)] for step in chunk.steps])

    def lane_rows_taken(self, lane: int, indices: npt.NDArray[np.int64], epoch: int) -> npt.NDArray[np.bool_]:
        """Whether this worker is still to train on the rows of one of its lanes that have these indices in the lane.

        It is not where a checkpoint has the row already, or where another worker of the same lane has the turn.
        """
        rows_per_step = len(range(lane, self.batch_size, self.lanes))
        turns, turn = turns_of_rank(self.lanes, self.rank, self.world_size)
        untrained: npt.NDArray[np.bool_] = indices >= self.first_step_of(epoch) * rows_per_step
        my_turn: npt.NDArray[np.bool_] = indices % rows_per_step % turns == turn
        return untrained & my_turn

    @property
    def my_lanes(self) -> range:
        """The lanes that this worker takes rows of."""
        return lanes_of_rank(self.lanes, self.rank, self.world_size)


@lru_cache(maxsize=2)  # a process gathers many chunks of an epoch, and sorting a million keys takes 0.1 s
def _epoch_order(seed: int, epoch: int, starts: bytes, ends: bytes) -> RowIds:
    rows = RowRanges(np.frombuffer(starts, np.int64), np.frombuffer(ends, np.int64))
    return epoch_order(seed, epoch, rows.ids())
