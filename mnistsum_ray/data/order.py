"""Order of training rows and the random draws of each: pure functions of seed, epoch and row id.

Ten rows in two row groups, batches of 2 on two workers, windows of 6 rows, seed 0, epoch 0:

    row groups    0 1 2 3 4 | 5 6 7 8 9          cut into slices of at most an eighth of a window: here of single rows
    slices        6 4 0 8 7 9 | 2 3 1 5          permuted anew each epoch; window 0 holds steps 0 to 2, window 1 steps 3 and 4
    stretches     6 4 0, 8 7 9 | 2 3, 1 5        of each window one for each position of a batch
    permuted      0 4 6, 9 8 7 | 2 3, 1 5        each stretch by itself
    worker 0      0 4 6 | 2 3                    trains on position 0 of every batch
    worker 1      9 8 7 | 1 5                    trains on position 1
    batches       0 9, 4 8, 6 7 | 2 1, 3 5

A worker trains on consecutive positions, so it reads some stretches of each window. The order does not depend on workers, nodes,
blocks, timing or restarts; MosaicML Streaming calls that elastic determinism. Rows in memory are slices of one row, and a window
of them is one step, which makes an epoch one permutation.

The bits come from SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014), a dozen
lines here, because no library promises that its generator stays the same.
"""

from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property, lru_cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from mnistsum_ray.errors import RowCountError

RowIds = npt.NDArray[np.int64]
Bits = npt.NDArray[np.uint64]

NUMBERS: Final = 10
"""Numbers are 0..NUMBERS - 1: a training row gets one at random, and a row that is scored has its own."""

DISTORTION_DRAWS: Final = 6
"""Draws for an image: one for rotation, two for scale, one for shear, two for translation."""

_SAMPLED_GROUPS: Final = 100
"""Row groups that a few rows are taken from: each has to be read, from its beginning."""

_CHUNK: Final = 2**20
"""Ids that are computed at once."""


class RandomStream(IntEnum):
    """Purpose of a draw. It is part of the key, so that draws for different purposes are not correlated."""

    ORDER = 0
    NUMBER = 1
    SPLIT = 3  # 2 was an augmentation that is gone. The value is part of the key: renumbering would change all runs.
    DISTORTION = 4
    DROPOUT = 5
    SUM_HEAD = 6
    GROUP_ORDER = 7


def _mix(z: Bits) -> Bits:
    """SplitMix64's step and finalizer: a bijection on uint64 in which each input bit affects every output bit."""
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _bits(seed: int, epoch: int, purpose: RandomStream, row_ids: RowIds) -> Bits:
    """64 random bits for each row: uint64 of the shape of `row_ids`."""
    key = np.zeros(1, np.uint64)
    for part in (seed, epoch, purpose):
        key = _mix(key ^ np.uint64(part))
    return _mix(key ^ _mix(row_ids.astype(np.uint64)))


def integer_type(count: int) -> str:
    """Smallest signed integer type that holds 0..count - 1, by its name in NumPy and Arrow: `int8` up to 128."""
    return np.min_scalar_type(-count).name


def random_numbers(seed: int, epoch: int, row_ids: RowIds) -> npt.NDArray[np.signedinteger[Any]]:
    """The number that each row is paired with in an epoch, uniform: `integer_type(NUMBERS)` [n]."""
    bits = _bits(seed, epoch, RandomStream.NUMBER, row_ids)
    # Lemire, 2019: multiply and shift; the bias is below NUMBERS / 2**32.
    return (((bits >> np.uint64(32)) * np.uint64(NUMBERS)) >> np.uint64(32)).astype(integer_type(NUMBERS))


def distortion_draws(seed: int, epoch: int, row_ids: RowIds) -> npt.NDArray[np.float32]:
    """Draws that distort each training image in an epoch: float32[n, DISTORTION_DRAWS], uniform in -1..1."""
    bits = _bits(seed, epoch, RandomStream.DISTORTION, row_ids)
    draws = np.empty((len(row_ids), DISTORTION_DRAWS), np.float32)
    for column in range(DISTORTION_DRAWS):
        draws[:, column] = (bits >> np.uint64(40)) * (2 / 2**24) - 1
        bits = _mix(bits)
    return draws


def step_seed(seed: int, epoch: int, step: int, purpose: RandomStream) -> int:
    """Seed of a generator that is used for the whole global batch of a step: 0..2**63-1."""
    return int(_bits(seed, epoch, purpose, np.array([step], np.int64))[0] >> np.uint64(1))


@dataclass(frozen=True, eq=False)
class RowRanges:
    """A set of row ids in ascending order, as ranges `starts[i] <= id < ends[i]`: its size does not grow with the rows."""

    starts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]
    """int64[k] both: ascending, not empty, and not touching each other."""

    @classmethod
    def of(cls, starts: npt.ArrayLike, ends: npt.ArrayLike) -> "RowRanges":
        """Ranges in ascending order that do not overlap; empty ones are dropped, and those that touch become one."""
        first, last = np.asarray(starts, np.int64), np.asarray(ends, np.int64)
        first, last = first[first < last], last[first < last]
        touching = np.flatnonzero(first[1:] == last[:-1])  # the next one
        return cls(np.delete(first, touching + 1), np.delete(last, touching))

    @classmethod
    def from_ids(cls, ids: RowIds) -> "RowRanges":
        """The set of ids int64[n], which are in ascending order and distinct."""
        return cls.of(ids, ids + 1)

    def __len__(self) -> int:
        return int((self.ends - self.starts).sum())

    @cached_property
    def id_sum(self) -> int:
        """Sum of all scrambled ids (`mix_ids`) modulo 2**64."""
        count = len(self)
        chunks = (np.arange(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK))
        return sum(int(mix_ids(self.at(chunk)).sum()) for chunk in chunks)

    def ids(self) -> RowIds:
        """All ids: int64[n]."""
        return self.at(np.arange(len(self)))

    def at(self, indices: npt.NDArray[np.int64]) -> RowIds:
        """The ids with these indices in 0..n-1, int64 of the same shape."""
        ranges = np.searchsorted(self._first_indices, indices, side="right") - 1
        return self.starts[ranges] + (indices - self._first_indices[ranges])

    def count_below(self, bounds: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Number of ids below each bound, int64[m], in a set that is not empty: int64[m]."""
        ranges = np.searchsorted(self.starts, bounds, side="right") - 1
        inside = np.minimum(bounds, self.ends[ranges]) - self.starts[ranges]
        return np.where(ranges < 0, 0, self._first_indices[ranges] + inside)

    def minus(self, others: "RowRanges") -> "RowRanges":
        """The ids that are not in `others`, all of which are in this set."""
        return RowRanges.of(
            np.sort(np.concatenate([self.starts, others.ends])), np.sort(np.concatenate([self.ends, others.starts]))
        )

    def without(self, ids: RowIds) -> "RowRanges":
        """The ids, of a set that is not empty, that are not among these, int64[m], distinct and in ascending order."""
        inside = self.count_below(ids + 1) > self.count_below(ids)
        return self.minus(RowRanges.from_ids(ids[inside]))

    def sample(self, limit: int) -> "RowRanges":
        """At most `limit` of the ids, from evenly spaced places: the first rows of sorted files all show one digit."""
        if len(self) <= limit:
            return self
        places = min(_SAMPLED_GROUPS, limit)
        starts = np.arange(places) * len(self) // places
        return RowRanges.from_ids(self.at((starts[:, None] + np.arange(limit // places)).ravel()))

    def hold_out(self, count: int, bounds: npt.NDArray[np.int64]) -> tuple["RowRanges", "RowRanges"]:
        """Split into (kept, held out), with `count` ids held out: random ones of random row groups, few of which must be read.

        The choice depends on the ids alone, not on a seed, so that runs with different seeds can be compared. Row group i holds
        the ids bounds[i]..bounds[i + 1]-1.
        """
        counts = np.diff(self.count_below(bounds))
        groups = np.argsort(_bits(0, 0, RandomStream.SPLIT, bounds[:-1]), kind="stable")
        groups = groups[counts[groups] > 0]
        enough = int(np.searchsorted(np.cumsum(counts[groups]), count)) + 1
        chosen = np.sort(groups[: max(_SAMPLED_GROUPS, enough)])
        first = self.count_below(bounds[chosen])
        ids = self.at(np.concatenate([np.arange(start, start + n) for start, n in zip(first, counts[chosen], strict=True)]))
        out = ids[np.argsort(_bits(0, 0, RandomStream.SPLIT, ids), kind="stable")[:count]]
        held = RowRanges.from_ids(np.sort(out))
        return self.minus(held), held

    @cached_property
    def _first_indices(self) -> npt.NDArray[np.int64]:
        """Index of the first id of each range: int64[k]."""
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.ends - self.starts)])[:-1]


@dataclass(frozen=True, eq=False)
class Shuffle:
    """Which row each position of a batch takes at each step of an epoch."""

    rows: RowRanges
    """Training rows."""
    bounds: npt.NDArray[np.int64] | None
    """Bounds of the row groups, as in `RowRanges.hold_out`; None where rows are permuted one by one."""
    batch_size: int
    """Rows of a step over all workers."""
    shuffle_rows: int
    """Most rows of a window; not used where rows are permuted one by one."""
    seed: int

    @property
    def steps(self) -> int:
        """Steps of an epoch, whose last batch may be smaller."""
        return -(-len(self.rows) // self.batch_size)

    @property
    def streamed(self) -> bool:
        """Whether rows are read window by window."""
        return self.bounds is not None

    @property
    def window_rows(self) -> int:
        """Rows of a window."""
        return min(self.window_steps * self.batch_size, len(self.rows))

    @property
    def window_steps(self) -> int:
        """Steps of a window; the last one of an epoch may have fewer."""
        return 1 if self.bounds is None else min(self.steps, max(1, self.shuffle_rows // self.batch_size))

    def batch_rows(self, step: int) -> int:
        """Number of rows of the global batch at a step of an epoch."""
        return min(self.batch_size, len(self.rows) - step * self.batch_size)

    def count(self, steps: range, positions: range) -> int:
        """Number of rows of consecutive positions at some steps."""
        last = max(0, min(positions.stop, self.batch_rows(steps.stop - 1)) - positions.start)
        return len(positions) * (len(steps) - 1) + last

    def ids(self, epoch: int, steps: range, positions: range) -> RowIds:
        """The rows of consecutive positions at some steps: int64[n], step by step, each in the order of positions.

        The steps must be those of whole windows; the last window of the epoch may have fewer.
        """
        windows = range(steps.start // self.window_steps, -(-steps.stop // self.window_steps))
        return np.concatenate([self._window_ids(epoch, window, positions) for window in windows])

    def _window_ids(self, epoch: int, window: int, positions: range) -> RowIds:
        first_step = window * self.window_steps
        steps = min(self.window_steps, self.steps - first_step)
        start, full = first_step * self.batch_size, self.batch_rows(first_step + steps - 1)
        # Positions from `full` on have no row at the last step.
        with_last = self._stretches(epoch, start, range(positions.start, min(positions.stop, full)), steps)
        without = self._stretches(epoch, start + full, range(max(positions.start, full), positions.stop), steps - 1)
        return np.concatenate([np.concatenate([with_last[:-1], without], axis=1).ravel(), with_last[-1]])

    def _stretches(self, epoch: int, start: int, positions: range, steps: int) -> RowIds:
        """int64[steps, positions]: of each position the permuted rows of its stretch."""
        low = start + positions.start * steps
        ids = self.rows.at(self._indices(epoch, low, low + len(positions) * steps)).reshape(len(positions), steps)
        if steps <= 1:
            return ids.T
        order = _bits(self.seed, epoch, RandomStream.ORDER, ids).argsort(axis=1, kind="stable")
        return np.take_along_axis(ids, order, axis=1).T

    def _indices(self, epoch: int, low: int, high: int) -> npt.NDArray[np.int64]:
        """Indices, among the training rows, of the rows low..high-1 of an epoch's sequence of slices: int64[high - low]."""
        if low == high:
            return np.empty(0, np.int64)
        first, bounds = _sequence(self, epoch)
        slices = np.arange(np.searchsorted(bounds, low, side="right") - 1, np.searchsorted(bounds, high, side="left"))
        rows = np.minimum(bounds[slices + 1], high) - np.maximum(bounds[slices], low)
        return np.arange(low, high) + np.repeat(first[slices] - bounds[slices], rows)

    @cached_property
    def slices(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Index of the first training row of each slice, and its number of rows: int64[n] both.

        Row groups larger than an eighth of a window are cut into equal slices. Rows in memory are slices of one row.
        """
        if self.bounds is None:
            return np.arange(len(self.rows)), np.ones(len(self.rows), np.int64)
        below = self.rows.count_below(self.bounds)
        counts = np.diff(below)
        pieces = -(-counts // max(1, self.shuffle_rows // 8))
        group = np.repeat(np.arange(len(counts)), pieces)
        number = np.arange(len(group)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        first, end = (counts[group] * edge // pieces[group] for edge in (number, number + 1))
        return below[group] + first, end - first


@lru_cache(maxsize=2)  # a process computes many windows of an epoch, and sorting a million keys takes 0.1 s
def _sequence(shuffle: Shuffle, epoch: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The slices in the order of an epoch: first rows as of `Shuffle.slices`, int64[n], and bounds in the order, int64[n + 1]."""
    first, rows = shuffle.slices
    order = np.argsort(_bits(shuffle.seed, epoch, RandomStream.GROUP_ORDER, shuffle.rows.at(first)), kind="stable")
    return first[order], np.concatenate([np.zeros(1, np.int64), np.cumsum(rows[order])])


def positions_of_rank(batch_size: int, rank: int, world_size: int) -> range:
    """The positions of every batch that one worker trains on. Those of two workers differ by one row at most."""
    return range(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)


def mix_ids(row_ids: Any) -> Any:
    """Scramble row ids, int64[n], an array of NumPy or a tensor of PyTorch alike.

    The sum of the scrambled ids modulo 2**64 tells a set of rows from another: of plain ids, rows 3 and 5 add up to twice row 4.
    """
    mixed = (row_ids + 1) * -0x61C8864680B583EB
    mixed = (mixed ^ (mixed >> 32)) * -0x40A7B892E31B1A47
    return mixed ^ (mixed >> 29)


def check_row_counts(rows: int, id_sum: int, expected_rows: int, expected_id_sum: int, where: str) -> None:
    """Raise RowCountError unless the planned rows were seen, each once: by their number, and the sum of their scrambled ids."""
    if rows != expected_rows or (id_sum - expected_id_sum) % 2**64:
        counted = f"{rows:,} rows, where the plan has {expected_rows:,}" if rows != expected_rows else "other rows than planned"
        raise RowCountError(f"{where} saw {counted}: rows were lost or repeated, so this run cannot be trusted")
