"""What is random about a row: pure functions of seed, epoch and row id.

So a row gets the same number and the same distortion on whatever worker it is trained, and again
after a restart. NumPy's generators give streams, in which a row's draw would depend on the rows
before it: here the bits of a row come from its id alone, by SplitMix64 (Steele, Lea and Flood,
"Fast splittable pseudorandom number generators", OOPSLA 2014).
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from mnistsum_ray.errors import RowCountError

RowIds = npt.NDArray[np.int64]
Bits = npt.NDArray[np.uint64]

NUMBERS: Final = 10
"""Numbers are 0..NUMBERS - 1: a training row gets one at random, a row to be scored has its own."""


class Purpose(IntEnum):
    """What a draw is for: draws for two purposes are not correlated.

    The values are part of each run's numbers: never renumber them.
    """

    NUMBER = 1
    SPLIT = 3
    DISTORTION = 4
    DROPOUT = 5
    ROW_ORDER = 7


def _mix(z: Bits) -> Bits:
    """SplitMix64's step and finalizer: each bit in affects every bit out."""
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _bits(seed: int, epoch: int, purpose: Purpose, row_ids: RowIds) -> Bits:
    """64 random bits for each row: uint64 of the shape of `row_ids`."""
    key = np.zeros(1, np.uint64)
    for part in (seed, epoch, purpose):
        key = _mix(key ^ np.uint64(part))
    return _mix(key ^ _mix(row_ids.astype(np.uint64)))


def random_numbers(seed: int, epoch: int, row_ids: RowIds) -> npt.NDArray[np.int8]:
    """The number that each row is paired with in an epoch, uniform: int8[n]."""
    bits = _bits(seed, epoch, Purpose.NUMBER, row_ids)
    # Lemire, 2019: multiply and shift; the bias is below NUMBERS / 2**32.
    numbers = ((bits >> np.uint64(32)) * np.uint64(NUMBERS)) >> np.uint64(32)
    return numbers.astype(np.int8)


def split_keys(row_ids: RowIds) -> Bits:
    """Keys, uint64[n], the smallest of which are held out.

    The keys depend on no seed, so that runs with different seeds can be compared.
    """
    return _bits(0, 0, Purpose.SPLIT, row_ids)


def distortions(seed: int, epoch: int, row_ids: RowIds, strength: float) -> npt.NDArray[np.float32]:
    """The random distortion of each training image in an epoch, as of `affine_matrices`."""
    bits = _bits(seed, epoch, Purpose.DISTORTION, row_ids)
    draws = np.empty((len(row_ids), 6), np.float32)
    for column in draws.T:
        column[:] = (bits >> np.uint64(40)) * (2 / 2**24) - 1  # the upper 24 bits as -1..1
        bits = _mix(bits)
    return affine_matrices(draws, strength)


def affine_matrices(draws: npt.NDArray[np.float32], strength: float) -> npt.NDArray[np.float32]:
    """Matrices float32[n, 6] of small rotations, scalings, shears and shifts.

    Each is two rows that take a place (x, y, 1) in the distorted image to one in the image, where
    x and y run from -1 to 1: `distort` in `model/network.py` applies them. `draws`, float32[n, 6]
    in -1..1, are multiplied by `strength`. As in Simard et al., "Best Practices for Convolutional
    Neural Networks Applied to Visual Document Analysis" (2003).
    """
    # By NumPy: on a GPU these lines would be twenty kernels of each step. In float64, so that the
    # rounded values hardly depend on how a machine computes sines.
    rotation, log_width, log_height, shear, x, y = (strength * draws.astype(np.float64)).T
    angle = np.radians(rotation * 10)
    cos, sin = np.cos(angle), np.sin(angle)
    width, height = np.exp(log_width * 0.1), np.exp(log_height * 0.1)
    shear = shear * 0.1  # pixels to the right for each pixel down
    most = 3 / 14  # three pixels, as a share of the 14 from the middle to the edge
    x_row = [cos * width, shear - sin * height, x * most]
    y_row = [sin * width, cos * height, y * most]
    return np.stack(x_row + y_row, axis=1, dtype=np.float32)


def step_seed(seed: int, epoch: int, index: int, purpose: Purpose) -> int:
    """Seed of a generator for a step, or for the order of a rank's rows: 0..2**63 - 1."""
    return int(_bits(seed, epoch, purpose, np.array([index], np.int64))[0] >> np.uint64(1))


def mix_ids(row_ids: Any) -> Any:
    """Scramble row ids, int64[n], an array of NumPy or a tensor of PyTorch alike.

    Their sum modulo 2**64 tells sets of rows apart. Plain ids 3 and 5 would add up as 4 and 4.
    """
    # Constants of `_mix` as int64: PyTorch does not multiply uint64.
    mixed = (row_ids + 1) * -0x61C8864680B583EB
    mixed = (mixed ^ (mixed >> 32)) * -0x40A7B892E31B1A47
    return mixed ^ (mixed >> 29)


@dataclass(frozen=True)
class RowTotals:
    """What all workers together must see of a split: the number of its rows, and which they are."""

    rows: int
    id_sum: int  # sum of their scrambled ids (`mix_ids`)

    @classmethod
    def of(cls, ids: RowIds) -> "RowTotals":
        return cls(len(ids), int(mix_ids(ids).sum()))

    def check(self, rows: int, id_sum: int, where: str) -> None:
        """Raise RowCountError unless so many rows with this sum, which were seen, are these."""
        if rows == self.rows and (id_sum - self.id_sum) % 2**64 == 0:
            return
        seen = "other rows than planned"
        if rows != self.rows:
            seen = f"{rows:,} rows, where the plan has {self.rows:,}"
        lost = "rows were lost or repeated, so this run cannot be trusted"
        raise RowCountError(f"{where} saw {seen}: {lost}")
