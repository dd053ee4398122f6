"""Random draws for training rows: the order of an epoch, the number of each row, its augmentation; and the shards of the workers.

The draws of a row are a pure function of (seed, epoch, row id), with epochs counted from 0. So they are equal for any number of
workers, any block layout, retry and restart, and no random state is stored. The bits come from SplitMix64 (Steele, Lea and
Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014), a dozen lines here, because no library promises that its
generator stays the same.
"""

from enum import IntEnum
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt

from mnistsum_ray.errors import RowCountError

RowIds = npt.NDArray[np.int64]
Ids = TypeVar("Ids", bound=Any)
"""RowIds, or the same as a tensor."""
Bits = npt.NDArray[np.uint64]

NUMBERS: Final = 10
"""Size of the range 0..9 of the random number."""


class RandomStream(IntEnum):
    """Purpose of a draw. It is part of the key, so that draws for different purposes are not correlated."""

    ORDER = 0
    NUMBER = 1
    SPLIT = 3  # 2 was an augmentation that is gone. The value is part of the key: renumbering would change all runs.
    DISTORTION = 4
    DROPOUT = 5
    SUM_HEAD = 6
    GROUP_ORDER = 7


DISTORTION_DRAWS: Final = 6
"""Draws per distorted image: one for rotation, two for scale, one for shear, two for translation."""


def _mix(z: Bits) -> Bits:
    """SplitMix64's step and finalizer: a bijection on uint64 in which each input bit affects every output bit."""
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _bits(seed: int, epoch: int, purpose: RandomStream, row_ids: RowIds) -> Bits:
    """64 random bits for each row: uint64[n]."""
    key = np.zeros(1, np.uint64)
    for part in (seed, epoch, purpose):
        key = _mix(key ^ np.uint64(part))
    return _mix(key ^ _mix(row_ids.astype(np.uint64)))


def _below(bits: Bits, bound: int) -> npt.NDArray[np.int64]:
    """Uniform integers in 0..bound-1 (Lemire, 2019: multiply and shift; the bias is below bound / 2**32)."""
    return (((bits >> np.uint64(32)) * np.uint64(bound)) >> np.uint64(32)).astype(np.int64)


def random_numbers(seed: int, epoch: int, row_ids: RowIds) -> npt.NDArray[np.int64]:
    """The number that each row is paired with in an epoch: int64[n], uniform in 0..9."""
    return _below(_bits(seed, epoch, RandomStream.NUMBER, row_ids), NUMBERS)


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


def row_order(seed: int, epoch: int, row_ids: RowIds) -> npt.NDArray[np.int64]:
    """Indices of rows in the order of an epoch: a permutation of 0..n-1."""
    return np.argsort(_bits(seed, epoch, RandomStream.ORDER, row_ids), kind="stable")


def epoch_order(seed: int, epoch: int, row_ids: RowIds) -> RowIds:
    """The rows in the order of an epoch: a permutation of `row_ids`, int64[n]."""
    return row_ids[row_order(seed, epoch, row_ids)]


def group_order(seed: int, epoch: int, first_ids: RowIds) -> npt.NDArray[np.int64]:
    """Indices of row groups in the order of an epoch: a permutation of 0..n-1, by the id of the first row of each group."""
    return np.argsort(_bits(seed, epoch, RandomStream.GROUP_ORDER, first_ids), kind="stable")


def split_order(first_ids: RowIds) -> npt.NDArray[np.int64]:
    """Indices of row groups in a random order that does not depend on a seed: a permutation of 0..n-1."""
    return np.argsort(_bits(0, 0, RandomStream.SPLIT, first_ids), kind="stable")


def held_out(row_ids: RowIds, count: int) -> tuple[RowIds, RowIds]:
    """Split rows into (kept, held out), both in ascending order, with `count` rows held out.

    The choice depends only on the row ids, not on a seed, so that runs with different seeds can be compared.
    """
    order = row_ids[np.argsort(_bits(0, 0, RandomStream.SPLIT, row_ids), kind="stable")]
    return np.sort(order[count:]), np.sort(order[:count])


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """Steps that visit each row once. The last batch may be smaller; no row is dropped."""
    return -(-rows // batch_size)


def positions_of_rank(rows: int, lanes: int, rank: int, world_size: int) -> npt.NDArray[np.int64]:
    """Positions in a global batch of `rows` rows that one worker trains on, in ascending order: int64[n].

    Position p belongs to lane p % `lanes`. Lanes are dealt out to the workers; where there are more workers than lanes, the
    workers of a lane take turns. With as many lanes as rows, the shares of the workers differ by one row at most.
    """
    positions = np.arange(rows)
    mine = np.isin(positions % lanes, lanes_of_rank(lanes, rank, world_size))
    turns, turn = turns_of_rank(lanes, rank, world_size)
    return np.flatnonzero(mine & (positions // lanes % turns == turn))


def lanes_of_rank(lanes: int, rank: int, world_size: int) -> range:
    """The lanes that one worker takes rows of."""
    return range(rank, lanes, world_size) if world_size <= lanes else range(rank % lanes, rank % lanes + 1)


def turns_of_rank(lanes: int, rank: int, world_size: int) -> tuple[int, int]:
    """Number of workers that take turns at this worker's lanes, and its turn, from 0."""
    return (1, 0) if world_size <= lanes else (len(range(rank % lanes, world_size, lanes)), rank // lanes)


def shard_for_rank(row_ids: RowIds, rank: int, world_size: int) -> RowIds:
    """The held-out rows that one worker evaluates: int64[n]. The shares of the workers differ by one row at most."""
    return row_ids[rank::world_size]


def mix_ids(row_ids: Ids) -> Ids:
    """Scramble row ids, int64[n], an array of NumPy or a tensor of PyTorch alike.

    The sum of the scrambled ids modulo 2**64 tells a set of rows from another: of plain ids, rows 3 and 5 add up to twice row 4.
    """
    mixed = (row_ids + 1) * -0x61C8864680B583EB
    mixed = (mixed ^ (mixed >> 32)) * -0x40A7B892E31B1A47
    return mixed ^ (mixed >> 29)  # type: ignore[no-any-return]


def check_row_counts(rows: int, id_sum: int, expected_rows: int, expected_id_sum: int, where: str) -> None:
    """Check that exactly the planned rows were seen, each once: their number, and the sum of their scrambled ids.

    Raises:
        RowCountError: rows were lost or repeated.
    """
    if rows != expected_rows or (id_sum - expected_id_sum) % 2**64:
        counted = f"{rows:,} rows, where the plan has {expected_rows:,}" if rows != expected_rows else "other rows than planned"
        raise RowCountError(f"{where} saw {counted}: rows were lost or repeated, so this run cannot be trusted")
