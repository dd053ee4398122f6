"""Windowed shuffle: the order of an epoch that does not fit in memory, as a pure function of seed, epoch, data and batch size.

    row groups of the files, permuted anew each epoch
    ├── lane 0 ──┼── lane 1 ──┼── … ──┤        cut into lanes, each as long as its positions of the batches need
    [win][window][window][win]…               each lane is cut into windows, and the rows of a window are permuted

Position p of each global batch is filled by lane p % lanes (`sampling.positions_of_rank`), so a worker reads the windows of its
lanes and nothing else. The order does not depend on workers, nodes, blocks, timing or restarts. MosaicML Streaming calls this
elastic determinism, and its lanes canonical nodes.
"""

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
import numpy.typing as npt

from mnistsum_ray.data.parquet_files import RowGroups
from mnistsum_ray.data.row_ranges import RowRanges, cut_evenly
from mnistsum_ray.data.sampling import group_order, steps_per_epoch

_LANES: Final = (64, 32, 16, 8)
"""Most lanes first: with many, a batch is mixed from many row groups, and its lanes can be dealt out evenly to many workers."""


Slice = tuple[int, int, int]
"""Row group, training rows of the group before the slice, and training rows of the slice."""


@dataclass(frozen=True)
class Window:
    """Rows of a lane that are permuted together."""

    lane: int
    first: int
    """Index of its first row in the lane."""
    slices: tuple[Slice, ...]

    @property
    def rows(self) -> int:
        """Number of rows."""
        return sum(rows for _, _, rows in self.slices)

    def needed_at(self, rows_per_step: int) -> int:
        """The first step that takes a row of the window, where each step takes this many rows of the lane."""
        return self.first // rows_per_step


@dataclass(frozen=True)
class WindowedShuffle:
    """The windows of each epoch."""

    rows: RowRanges
    """Training rows."""
    groups: RowGroups
    batch_size: int
    """Rows of a global batch."""
    shuffle_rows: int
    """Rows of the windows of all lanes together."""
    seed: int

    @cached_property
    def lanes(self) -> int:
        """Number of lanes: so many that a window still holds the largest row group, which otherwise is read several times."""
        largest = int(self.groups.counts(self.rows).max(initial=0))
        fitting = (lanes for lanes in _LANES if self.shuffle_rows // lanes >= largest)
        return min(self.batch_size, next(fitting, _LANES[-1]))

    @property
    def window_rows(self) -> int:
        """Most rows of a window."""
        return max(1, self.shuffle_rows // self.lanes)

    @property
    def steps(self) -> int:
        """Steps an epoch."""
        return steps_per_epoch(len(self.rows), self.batch_size)

    @property
    def rows_read_per_row(self) -> float:
        """How many rows are read for each training row, on average: a slice of a row group is read from the group's beginning."""
        _, skips, counts, _ = self._slices
        return float((skips + counts).sum() / counts.sum())

    def rows_per_step(self, lane: int) -> int:
        """Rows of the lane in a full batch."""
        return len(range(lane, self.batch_size, self.lanes))

    def lane_rows(self) -> npt.NDArray[np.int64]:
        """Rows of each lane in an epoch: int64[lanes]."""
        full, rest = divmod(len(self.rows), self.batch_size)
        return np.array([full * self.rows_per_step(lane) + len(range(lane, rest, self.lanes)) for lane in range(self.lanes)])

    def windows(self, epoch: int, lanes: Iterable[int], first_step: int = 0) -> Iterator[Window]:
        """The windows of some lanes that are needed from a step of an epoch on, in the order in which the steps need them."""
        sequence = self._permuted(epoch)
        lane_ends = np.cumsum(self.lane_rows()).tolist()
        of_lanes = (
            self._of_lane(sequence, lane, lane_ends[lane - 1] if lane else 0, lane_ends[lane], first_step) for lane in lanes
        )
        return heapq.merge(*of_lanes, key=lambda window: (window.needed_at(self.rows_per_step(window.lane)), window.lane))

    @cached_property
    def _slices(self) -> npt.NDArray[np.int64]:
        """The row groups, those that are larger than a window cut into equal slices: int64[4, n].

        The lines are the group, its training rows before the slice, the training rows of the slice, and the id of the first one.
        """
        group, first, end = cut_evenly(self.groups.counts(self.rows), self.window_rows)
        first_ids = self.rows.at(self.rows.count_below(self.groups.bounds[:-1])[group] + first)
        return np.stack([group, first, end - first, first_ids])

    def _permuted(self, epoch: int) -> "_Sequence":
        slices = self._slices[:, group_order(self.seed, epoch, self._slices[3])]
        return _Sequence(slices[0], slices[1], np.concatenate([np.zeros(1, np.int64), np.cumsum(slices[2])]))

    def _of_lane(self, sequence: "_Sequence", lane: int, start: int, end: int, first_step: int) -> Iterator[Window]:
        # The first window is shorter, so that the lanes reach the ends of their windows one after the other: memory and reading
        # stay even.
        first_end = min(end, start + max(1, self.window_rows * (lane + 1) // self.lanes))
        done, first_row = 0, first_step * self.rows_per_step(lane)
        for slices in (*self._packed(sequence.between(start, first_end)), *self._packed(sequence.between(first_end, end))):
            window = Window(lane, done, slices)
            done += window.rows
            if done > first_row:
                yield window

    def _packed(self, slices: Iterator[Slice]) -> Iterator[tuple[Slice, ...]]:
        """Consecutive slices, as many together as a window may hold."""
        packed, rows = list[Slice](), 0
        for piece in slices:
            if packed and rows + piece[2] > self.window_rows:
                yield tuple(packed)
                packed, rows = [], 0
            packed.append(piece)
            rows += piece[2]
        if packed:
            yield tuple(packed)


@dataclass(frozen=True)
class _Sequence:
    """The slices in the order of an epoch."""

    group: npt.NDArray[np.int64]
    skip: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    """int64[n + 1]: slice i has the rows starts[i]..starts[i + 1]-1 of the sequence."""

    def between(self, start: int, end: int) -> Iterator[Slice]:
        """The slices of the rows start..end-1 of the sequence, cut off at both ends."""
        index = int(np.searchsorted(self.starts, start, side="right")) - 1
        while start < end:
            last = min(end, int(self.starts[index + 1]))
            yield int(self.group[index]), int(self.skip[index]) + start - int(self.starts[index]), last - start
            start, index = last, index + 1
