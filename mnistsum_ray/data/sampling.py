"""What a training row is shown with: its place in the epoch, its random number and its small shift.

Each is a pure function of (seed, epoch, row_id), so it is the same for any number of workers, any block
layout, any retry and any restart, and nothing has to be stored to bring it back. The bits come from
SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014): a dozen
lines that will draw the same in ten years, which no library's default generator promises.
"""

from enum import IntEnum
from typing import Final

import numpy as np
import numpy.typing as npt

from mnistsum_ray.errors import RowCountError

RowIds = npt.NDArray[np.int64]
Bits = npt.NDArray[np.uint64]

NUMBERS: Final = 10
"""The random number is one of 0..9."""


class RandomStream(IntEnum):
    """What a draw is for. Draws for different purposes must not be correlated, so the purpose is part of the key."""

    ORDER = 0
    NUMBER = 1
    SHIFT = 2
    SPLIT = 3
    DISTORTION = 4
    DROPOUT = 5
    SUM_HEAD = 6


DRAWS: Final = 6
"""What a distortion of an image takes: one to turn it, two to stretch, one to slant and two to move it."""


def _mix(z: Bits) -> Bits:
    """SplitMix64's step and finalizer: uint64 to uint64, a bijection in which every input bit moves every output bit."""
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _bits(seed: int, epoch: int, purpose: RandomStream, row_ids: RowIds) -> Bits:
    """64 random bits a row: uint64[n]."""
    key = np.zeros(1, np.uint64)
    for part in (seed, epoch, purpose):
        key = _mix(key ^ np.uint64(part))
    return _mix(key ^ _mix(row_ids.astype(np.uint64)))


def _below(bits: Bits, bound: int) -> npt.NDArray[np.int64]:
    """Uniform integers in 0..bound-1 (Lemire, 2019: multiply and shift; the bias is below bound / 2**32)."""
    return (((bits >> np.uint64(32)) * np.uint64(bound)) >> np.uint64(32)).astype(np.int64)


def random_numbers(seed: int, epoch: int, row_ids: RowIds) -> npt.NDArray[np.int64]:
    """The number 0..9 that each row is paired with in this epoch: int64[n], uniform."""
    return _below(_bits(seed, epoch, RandomStream.NUMBER, row_ids), NUMBERS)


def shifts(seed: int, epoch: int, row_ids: RowIds, limit: int) -> npt.NDArray[np.int64]:
    """How many pixels (down, right) each training image is moved in this epoch: int64[n, 2] in -limit..limit."""
    bits = _bits(seed, epoch, RandomStream.SHIFT, row_ids)
    return np.stack([_below(bits, 2 * limit + 1), _below(_mix(bits), 2 * limit + 1)], axis=1) - limit


def distortions(seed: int, epoch: int, row_ids: RowIds) -> npt.NDArray[np.float32]:
    """How each training image is distorted in this epoch: float32[n, DRAWS], uniform in -1..1, for `augment.distort`."""
    bits = _bits(seed, epoch, RandomStream.DISTORTION, row_ids)
    draws = np.empty((len(row_ids), DRAWS), np.float32)
    for column in range(DRAWS):
        draws[:, column] = (bits >> np.uint64(40)) * (2 / 2**24) - 1
        bits = _mix(bits)
    return draws


def step_seed(seed: int, epoch: int, step: int, purpose: RandomStream) -> int:
    """What seeds a generator for the whole global batch of a step: 0..2**63-1."""
    return int(_bits(seed, epoch, purpose, np.array([step], np.int64))[0] >> np.uint64(1))


def epoch_order(seed: int, epoch: int, row_ids: RowIds) -> RowIds:
    """The rows in the order in which this epoch visits them: a permutation of int64[n]."""
    return row_ids[np.argsort(_bits(seed, epoch, RandomStream.ORDER, row_ids), kind="stable")]


def held_out(row_ids: RowIds, count: int) -> tuple[RowIds, RowIds]:
    """Split rows into (kept, held out), both in ascending order, `count` of them held out.

    Which rows are held out depends on nothing but their ids: the same for every seed, so that two runs can be compared.
    """
    order = row_ids[np.argsort(_bits(0, 0, RandomStream.SPLIT, row_ids), kind="stable")]
    return np.sort(order[count:]), np.sort(order[:count])


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """Steps that visit every row once; the last batch may be smaller, no row is dropped."""
    return -(-rows // batch_size)


def shard_for_rank(batch: RowIds, rank: int, world_size: int) -> RowIds:
    """The rows of one global batch that one worker takes: int64[n], sizes over the workers differ by one at most."""
    return batch[rank::world_size]


def check_row_counts(rows: int, id_sum: int, expected_rows: int, expected_id_sum: int, where: str) -> None:
    """Refuse a count that is not the plan's; the sum of the row ids catches one row lost and another seen twice."""
    if (rows, id_sum) != (expected_rows, expected_id_sum):
        raise RowCountError(
            f"{where} saw {rows:,} rows (ids add up to {id_sum:,}), the plan has {expected_rows:,} "
            f"({expected_id_sum:,}): rows were lost or repeated, so this run cannot be trusted"
        )
