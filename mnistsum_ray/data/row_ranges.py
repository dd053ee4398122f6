"""Sets of row ids as ranges: what they take in memory does not grow with the number of rows."""

from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
import numpy.typing as npt

from mnistsum_ray.data.sampling import RowIds, mix_ids

_CHUNK: Final = 2**20
"""Ids that are computed at once."""


def cut_evenly(
    counts: npt.NDArray[np.int64], limit: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Cut each of some counts of rows into slices of at most `limit` rows and about equal size; a count of 0 has no slice.

    Returns:
        Of each slice the index of its count, its first row and its end row among the rows of that count: int64[n] each.
    """
    slices = -(-counts // limit)
    index = np.repeat(np.arange(len(counts)), slices)
    number = np.arange(len(index)) - np.repeat(np.cumsum(slices) - slices, slices)
    first, end = (counts[index] * edge // slices[index] for edge in (number, number + 1))
    return index, first, end


@dataclass(frozen=True, eq=False)
class RowRanges:
    """A set of row ids in ascending order, as ranges `starts[i] <= id < ends[i]`."""

    starts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]
    """int64[k] both: ascending, not empty, and not touching each other."""

    @classmethod
    def of(cls, starts: npt.ArrayLike, ends: npt.ArrayLike) -> "RowRanges":
        """Ranges in ascending order that do not overlap; empty ones are dropped, and those that touch become one."""
        first, last = np.asarray(starts, np.int64), np.asarray(ends, np.int64)
        kept = first < last
        first, last = first[kept], last[kept]
        gaps = first[1:] != last[:-1]
        return cls(first[np.concatenate([np.ones(min(1, len(first)), bool), gaps])], last[np.append(gaps, True)[: len(last)]])

    @classmethod
    def from_ids(cls, ids: RowIds) -> "RowRanges":
        """The set of ids int64[n], which are in ascending order and distinct."""
        return cls.of(ids, ids + 1)

    def __len__(self) -> int:
        return int((self.ends - self.starts).sum())

    @cached_property
    def id_sum(self) -> int:
        """Sum of all scrambled ids (`sampling.mix_ids`) modulo 2**64."""
        count = len(self)
        chunks = (np.arange(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK))
        return sum(int(mix_ids(self.at(chunk)).sum()) for chunk in chunks)

    def ids(self) -> RowIds:
        """All ids: int64[n]."""
        return self.at(np.arange(len(self)))

    def at(self, indices: npt.NDArray[np.int64]) -> RowIds:
        """The ids with these indices in 0..n-1, int64[m] each."""
        first_indices = self._first_indices()
        ranges = np.searchsorted(first_indices, indices, side="right") - 1
        return self.starts[ranges] + (indices - first_indices[ranges])

    def count_below(self, bounds: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Number of ids below each bound: int64[m] each."""
        if not len(self.starts):
            return np.zeros(len(bounds), np.int64)
        ranges = np.searchsorted(self.starts, bounds, side="right") - 1
        inside = np.minimum(bounds, self.ends[ranges]) - self.starts[ranges]
        return np.where(ranges < 0, 0, self._first_indices()[ranges] + inside)

    def within(self, first: int, end: int) -> "RowRanges":
        """The ids in first..end-1."""
        low, high = np.searchsorted(self.ends, first, side="right"), np.searchsorted(self.starts, end, side="left")
        return RowRanges.of(np.maximum(self.starts[low:high], first), np.minimum(self.ends[low:high], end))

    def minus(self, others: "RowRanges") -> "RowRanges":
        """The ids that are not in `others`, all of which are in this set."""
        return RowRanges.of(
            np.sort(np.concatenate([self.starts, others.ends])), np.sort(np.concatenate([self.ends, others.starts]))
        )

    def _first_indices(self) -> npt.NDArray[np.int64]:
        """Index of the first id of each range: int64[k]."""
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.ends - self.starts)])[:-1]
