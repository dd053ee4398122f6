"""Blocks: decoded rows for training, from memory or from Parquet files."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mnistsum_ray.data.images import (
    DIGITS,
    BadRow,
    Pixels,
    decode_images,
    decode_numbers,
    join_reasons,
)
from mnistsum_ray.data.order import BLOCK_ROWS
from mnistsum_ray.data.parquet import open_parquet, read_rows
from mnistsum_ray.errors import RequestError, UnusableFileError
from mnistsum_ray.storage.store import Entry, Location

Digits = npt.NDArray[np.int8]

BadRows = dict[int, BadRow]
"""Rows that cannot be used, by their index."""


@dataclass(frozen=True)
class Block:
    """Decoded rows: images uint8[n, 28, 28] and digits int8[n], zeros in bad rows."""

    images: Pixels
    digits: Digits
    bad: BadRows

    @classmethod
    def decode(cls, images: pa.Array, digits: pa.Array, file: str, first: int = 0) -> "Block":
        """Decode the rows of a file from its row `first` on."""
        pixels, bad_images = decode_images(images)
        values, bad_digits = decode_numbers(digits, DIGITS)
        bad = {}
        for row, reason in join_reasons(bad_images, bad_digits, "digit").items():
            bad[row] = (file, first + row, reason)
        return cls(pixels, values.astype(np.int8), bad)

    @property
    def rows(self) -> int:
        return len(self.digits)

    def slice(self, start: int, stop: int) -> "Block":
        """Some consecutive rows."""
        bad = {row - start: why for row, why in self.bad.items() if start <= row < stop}
        return Block(self.images[start:stop], self.digits[start:stop], bad)

    def blocks(self) -> Iterator["Block"]:
        """The rows in blocks of BLOCK_ROWS, the last of fewer."""
        return _in_blocks([self])


@dataclass(frozen=True)
class LabelledFile:
    """A Parquet file with images and digits, as its footer describes it."""

    name: str
    """Relative to the folder that was listed."""
    entry: Entry
    rows: int
    digit_column: str


@dataclass(frozen=True)
class FileGroup:
    """One Parquet file, or several that together have the rows of one block at most."""

    root: Location
    files: tuple[LabelledFile, ...]

    @property
    def rows(self) -> int:
        return sum(file.rows for file in self.files)

    def blocks(self) -> Iterator[Block]:
        """Read and decode the rows, in their order, in blocks of BLOCK_ROWS, the last of fewer.

        Raises:
            RequestError: a file has changed, or cannot be read.
            StorageError: the storage does not give a file.
        """
        return _in_blocks(self._decoded())

    def _decoded(self) -> Iterator[Block]:
        """The rows as they are read: row groups may have any number."""
        for file in self.files:
            place = self.root / file.name
            first = 0
            try:
                with open_parquet(place, file.entry) as parquet:
                    for rows in read_rows(parquet, range(file.rows), ["image", file.digit_column]):
                        yield Block.decode(rows["image"], rows[file.digit_column], file.name, first)
                        first += rows.num_rows
            except UnusableFileError as error:
                raise RequestError(f"{place.display}: {error}") from None


Groups = list[Block | FileGroup]
"""What a source consists of: rows in memory, or in files."""


def _in_blocks(decoded: Iterable[Block]) -> Iterator[Block]:
    """The same rows in blocks of BLOCK_ROWS, the last of fewer."""
    waiting: list[Block] = []
    for some in decoded:
        waiting.append(some)
        while sum(block.rows for block in waiting) >= BLOCK_ROWS:
            whole = joined(waiting)
            yield whole.slice(0, BLOCK_ROWS)
            waiting = [whole.slice(BLOCK_ROWS, whole.rows)] if whole.rows > BLOCK_ROWS else []
    if waiting:
        yield joined(waiting)


def joined(blocks: list[Block]) -> Block:
    """The rows of blocks that follow each other."""
    if len(blocks) == 1:
        return blocks[0]
    images = [block.images for block in blocks]
    digits = [block.digits for block in blocks]
    bad: BadRows = {}
    first = 0
    for block in blocks:
        bad |= {first + row: why for row, why in block.bad.items()}
        first += block.rows
    return Block(np.concatenate(images), np.concatenate(digits), bad)
