"""Order, number and distortion of training rows: pure functions of seed, epoch and row id.

Ten rows in five blocks of two, windows of two blocks, batches of 4 on two workers, seed 0, epoch 0:

    blocks        0 1 | 2 3 | 4 5 | 6 7 | 8 9
    windows       2 3 6 7 | 4 5 8 9 | 0 1      dealt at random, anew each epoch
    shuffled      6 7 2 3 | 4 8 9 5 | 0 1      each window by itself
    batches       6 7 2 3   4 8 9 5   0 1      a step takes the next rows, over the ends of windows
    worker 0      6 7       4 8       0 1      takes positions 0 and 1 of every batch
    worker 1          2 3       9 5            takes positions 2 and 3

Real blocks have 8,192 rows and windows 128 blocks: up to a million rows are one window, and one
permutation an epoch. The order does not depend on workers, nodes, timing or restarts.

The bits come from SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014), since no library promises that its generator stays the same.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property, lru_cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from mnistsum_ray.errors import RowCountError

RowIds = npt.NDArray[np.int64]
Bits = npt.NDArray[np.uint64]

Window = tuple[int, ...]
"""Blocks whose rows are shuffled together, ascending."""

NUMBERS: Final = 10
"""Numbers are 0..NUMBERS - 1: a training row gets one at random, a row to be scored has its own."""

AFFINE_VALUES: Final = 6
"""Elements of the matrix of a distortion."""

# Largest distortion at strength 1.
_ROTATION_DEGREES: Final = 10.0
_LOG_SCALE: Final = 0.1  # natural logarithm of the factor along each axis
_SHEAR: Final = 0.1  # horizontal shift in pixels for each pixel down
_SHIFT: Final = 3 / 14  # three pixels, as a share of the 14 from the middle to the edge

BLOCK_ROWS: Final = 8192
"""Most rows of a block."""

WINDOW_BLOCKS: Final = 128
"""Most blocks whose rows are shuffled together: a million rows, 0.8 GB."""


class RandomStream(IntEnum):
    """Purpose of a draw, as a part of its key: draws for two purposes are not correlated."""

    NUMBER = 1
    SPLIT = 3
    DISTORTION = 4
    DROPOUT = 5
    SUM_HEAD = 6
    ROW_ORDER = 7
    BLOCK_ORDER = 8


def _mix(z: Bits) -> Bits:
    """SplitMix64's step and finalizer, a bijection on uint64: each bit in affects every bit out."""
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
    """Smallest signed type of 0..count - 1, by its name in NumPy and Arrow: `int8` up to 128."""
    return np.min_scalar_type(-count).name  # a negative number has a signed type


def random_numbers(seed: int, epoch: int, row_ids: RowIds) -> npt.NDArray[np.signedinteger[Any]]:
    """The number that each row is paired with in an epoch, uniform: `integer_type(NUMBERS)` [n]."""
    bits = _bits(seed, epoch, RandomStream.NUMBER, row_ids)
    # Lemire, 2019: multiply and shift; the bias is below NUMBERS / 2**32.
    numbers = ((bits >> np.uint64(32)) * np.uint64(NUMBERS)) >> np.uint64(32)
    return numbers.astype(integer_type(NUMBERS))


def distortions(seed: int, epoch: int, row_ids: RowIds, strength: float) -> npt.NDArray[np.float32]:
    """The random distortion of each training image in an epoch, as of `affine_matrices`."""
    bits = _bits(seed, epoch, RandomStream.DISTORTION, row_ids)
    draws = np.empty((len(row_ids), 6), np.float32)
    for column in draws.T:
        column[:] = (bits >> np.uint64(40)) * (2 / 2**24) - 1
        bits = _mix(bits)
    return affine_matrices(draws, strength)


def affine_matrices(draws: npt.NDArray[np.float32], strength: float) -> npt.NDArray[np.float32]:
    """Matrices float32[n, AFFINE_VALUES] of small rotations, scalings, shears and shifts.

    Each is two rows that take a place (x, y, 1) in the distorted image to one in the image, where
    x and y run from -1 to 1: `distort` in `model/network.py` applies them. `draws`, float32[n, 6]
    in -1..1, are multiplied by `strength`. As in Simard et al., "Best Practices for Convolutional
    Neural Networks Applied to Visual Document Analysis" (2003).
    """
    # On a GPU they would be twenty kernels of each step. In float64, so that the rounded values
    # hardly depend on how a machine computes sines.
    rotation, log_width, log_height, shear, x, y = (strength * draws.astype(np.float64)).T
    angle = np.radians(rotation * _ROTATION_DEGREES)
    cos, sin = np.cos(angle), np.sin(angle)
    width, height = np.exp(log_width * _LOG_SCALE), np.exp(log_height * _LOG_SCALE)
    x_row = [cos * width, shear * _SHEAR - sin * height, x * _SHIFT]
    y_row = [sin * width, cos * height, y * _SHIFT]
    return np.stack(x_row + y_row, axis=1, dtype=np.float32)


def step_seed(seed: int, epoch: int, step: int, purpose: RandomStream) -> int:
    """Seed of a generator that is used for the whole global batch of a step: 0..2**63-1."""
    return int(_bits(seed, epoch, purpose, np.array([step], np.int64))[0] >> np.uint64(1))


def _shuffled(ids: RowIds, seed: int, epoch: int, purpose: RandomStream) -> RowIds:
    return ids[np.argsort(_bits(seed, epoch, purpose, ids), kind="stable")]


def hold_out(ids: RowIds, count: int) -> tuple[RowIds, RowIds]:
    """Split ids, which are ascending, into (kept, held out), with `count` ids held out.

    The choice depends on the ids alone, not on a seed, so that runs with different seeds can be
    compared.
    """
    shuffled = _shuffled(ids, 0, 0, RandomStream.SPLIT)
    return np.sort(shuffled[count:]), np.sort(shuffled[:count])


def sample(ids: RowIds, limit: int) -> RowIds:
    """At most `limit` of the ids, evenly spaced: the first of sorted files all show one digit."""
    if len(ids) <= limit:
        return ids
    return ids[np.arange(limit) * len(ids) // limit]


@dataclass(frozen=True, eq=False)
class TrainingOrder:
    """Which training rows each step of an epoch takes."""

    ids: RowIds
    """Training rows, ascending: int64[n]."""
    bounds: RowIds
    """Block i holds the row ids bounds[i]..bounds[i + 1] - 1."""
    batch_size: int
    """Rows of a step over all workers."""
    seed: int
    window_blocks: int = WINDOW_BLOCKS

    @property
    def steps(self) -> int:
        """Steps of an epoch, whose last batch may be smaller."""
        return -(-len(self.ids) // self.batch_size)

    def batch_rows(self, step: int) -> int:
        """Number of rows of the global batch at a step of an epoch."""
        return min(self.batch_size, len(self.ids) - step * self.batch_size)

    @cached_property
    def id_sum(self) -> int:
        """Sum of all scrambled ids (`mix_ids`) modulo 2**64."""
        return int(mix_ids(self.ids).sum())

    def row_ids_of_steps(
        self, epoch: int, steps: range, positions: range
    ) -> Iterator[tuple[Window, RowIds]]:
        """Ids of the rows at some positions of the batches of some steps, in their order.

        They come window by window: pairs of a window and the ids of rows in it.
        """
        # Of the sequence of all rows of an epoch, the steps take the rows first..end - 1.
        first, end = steps.start * self.batch_size, steps.stop * self.batch_size
        window_first = 0
        for blocks in self._windows(epoch):
            rows = sum(int(self._edges[block + 1] - self._edges[block]) for block in blocks)
            window_end = window_first + rows
            indexes = np.arange(max(first, window_first), min(end, window_end))
            if len(indexes):
                ids = _shuffled_window(self, epoch, blocks)[indexes - window_first]
                position = indexes % self.batch_size
                yield blocks, ids[(positions.start <= position) & (position < positions.stop)]
            window_first = window_end

    def row_ids_of_window(self, blocks: Window) -> RowIds:
        """Ids of the training rows in a window, ascending."""
        edges = self._edges
        return np.concatenate([self.ids[edges[block] : edges[block + 1]] for block in blocks])

    def _windows(self, epoch: int) -> list[Window]:
        blocks = np.arange(len(self.bounds) - 1)
        if len(blocks) > self.window_blocks:
            blocks = _shuffled(blocks, self.seed, epoch, RandomStream.BLOCK_ORDER)
        windows = []
        for start in range(0, len(blocks), self.window_blocks):
            window = np.sort(blocks[start : start + self.window_blocks])
            windows.append(tuple(window.tolist()))
        return windows

    @cached_property
    def _edges(self) -> npt.NDArray[np.int64]:
        """Index in `ids` of the first training row of each block, and their number."""
        return np.searchsorted(self.ids, self.bounds)


@lru_cache(maxsize=1)  # a window serves many tasks, and sorting a million keys takes 0.1 s
def _shuffled_window(order: TrainingOrder, epoch: int, blocks: Window) -> RowIds:
    """Ids of the training rows in a window, in their order of an epoch."""
    return _shuffled(order.row_ids_of_window(blocks), order.seed, epoch, RandomStream.ROW_ORDER)


def positions_of_rank(batch_size: int, rank: int, world_size: int) -> range:
    """The positions of every batch that one worker trains on; shares differ by one row."""
    return range(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)


def mix_ids(row_ids: Any) -> Any:
    """Scramble row ids, int64[n], an array of NumPy or a tensor of PyTorch alike.

    The sum of scrambled ids modulo 2**64 tells sets of rows apart: plain 3 and 5 are twice 4.
    """
    # Constants of `_mix` as int64: PyTorch does not multiply uint64.
    mixed = (row_ids + 1) * -0x61C8864680B583EB
    mixed = (mixed ^ (mixed >> 32)) * -0x40A7B892E31B1A47
    return mixed ^ (mixed >> 29)


def check_row_counts(rows: int, id_sum: int, planned: int, planned_sum: int, where: str) -> None:
    """Raise RowCountError unless the planned rows were seen, by number and sum of scrambled ids."""
    if rows == planned and (id_sum - planned_sum) % 2**64 == 0:
        return
    seen = "other rows than planned"
    if rows != planned:
        seen = f"{rows:,} rows, where the plan has {planned:,}"
    lost = "rows were lost or repeated, so this run cannot be trusted"
    raise RowCountError(f"{where} saw {seen}: {lost}")
