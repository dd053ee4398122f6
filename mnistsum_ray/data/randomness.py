"""What is random about a row: pure functions of seed, epoch and the row's id.

So a row has the same draws on whatever worker it is trained, and again after a restart. NumPy's
generators give streams, in which a row's draw would depend on the rows before it: here the bits of
a row come from its id alone, by SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom
number generators", OOPSLA 2014).
"""

import hashlib
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

RowIds = npt.NDArray[np.int64]
Bits = npt.NDArray[np.uint64]


class Purpose(IntEnum):
    """What a draw is for: draws for two purposes are not correlated.

    The values are part of each run's numbers: never renumber them.
    """

    STEP = 5
    ROW_ORDER = 7
    FILE_ORDER = 8


def _mix(z: Bits) -> Bits:
    """SplitMix64's step and finalizer: each bit in affects every bit out."""
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _bits(seed: int, epoch: int, purpose: str | int, row_ids: RowIds) -> Bits:
    """Return 64 random bits for each row: uint64 of the shape of `row_ids`."""
    if isinstance(purpose, str):
        digest = hashlib.sha256(purpose.encode()).digest()
        purpose = int.from_bytes(digest[:8], "little")
    key = np.zeros(1, np.uint64)
    for part in (seed, epoch, purpose):
        key = _mix(key ^ np.uint64(part))
    return _mix(key ^ _mix(row_ids.astype(np.uint64)))


@dataclass(frozen=True)
class RowRandom:
    """Random draws for rows of an epoch. Those for two purposes, which have names, are independent.

    The names are part of each run's numbers: renaming one changes them.
    """

    seed: int
    epoch: int
    row_ids: RowIds

    def whole(self, purpose: str | int, below: int) -> npt.NDArray[np.int64]:
        """Return whole numbers in 0..below - 1, all equally likely: int64[n]."""
        bits = _bits(self.seed, self.epoch, purpose, self.row_ids)
        # Lemire, 2019: multiply and shift; the bias is below `below` / 2**32.
        return (((bits >> np.uint64(32)) * np.uint64(below)) >> np.uint64(32)).astype(np.int64)

    def uniform(self, purpose: str | int, count: int) -> npt.NDArray[np.float32]:
        """Return this many uniform numbers in 0..1, without 1, for each row: float32[n, count]."""
        bits = _bits(self.seed, self.epoch, purpose, self.row_ids)
        draws = np.empty((len(bits), count), np.float32)
        for column in draws.T:
            column[:] = (bits >> np.uint64(40)) * 2.0**-24  # the upper 24 bits
            bits = _mix(bits)
        return draws


def seeds(seed: int, epoch: int, purpose: Purpose, indexes: range) -> list[int]:
    """Return seeds of generators, one for each index of an epoch: 0..2**63 - 1."""
    bits = _bits(seed, epoch, purpose, np.array(indexes, np.int64))
    return [int(seed) for seed in bits >> np.uint64(1)]
