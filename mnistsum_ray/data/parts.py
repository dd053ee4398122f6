"""Parts of a data source: row groups of a Parquet file, or a table in memory, with columns `image` and `digit`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mnistsum_ray.data.decoding import decode_images
from mnistsum_ray.data.parquet import UnusableFileError, open_parquet
from mnistsum_ray.data.parquet_types import plain_table
from mnistsum_ray.data.pixels import Pixels, one_chunk, pixels_array
from mnistsum_ray.errors import RequestError
from mnistsum_ray.storage.location import Location

PART_ROWS: Final = 8192
"""Rows of a part, except where a Parquet row group has more or the rows end."""


@dataclass(frozen=True)
class ParquetPart:
    """Consecutive row groups of one Parquet file, read when they are needed."""

    location: Location
    row_groups: tuple[int, ...]
    first_row: int
    """Index in the file of the part's first row, for messages."""
    rows: int
    digit_column: str
    first_id: int
    """Row id of the part's first row."""

    def read(self) -> pa.Table:
        """Read and decode: columns `image` (784 bytes) and `digit` (int8).

        Raises:
            RequestError: a row is not a 28x28 image with a digit 0..9; names the file and the row.
        """
        where = self.location.display
        try:
            with open_parquet(self.location) as file:
                table = plain_table(file.read_row_groups(list(self.row_groups), columns=["image", self.digit_column]))
        except UnusableFileError as error:
            raise RequestError(f"{where}: {error}") from None
        if table.num_rows != self.rows:
            raise RequestError(f"{where}: has {table.num_rows} rows where its footer says {self.rows}")
        images, bad = decode_images(one_chunk(table["image"]))
        for row, reason in sorted(bad.items()):
            raise RequestError(f"{where}: row {self.first_row + row}: {reason}")
        digits = one_chunk(table[self.digit_column])
        return image_table(images, check_digits(digits, where, range(self.first_row, self.first_row + self.rows)))


def read_part(part: pa.Table | ParquetPart) -> pa.Table:
    """A part as a table; see `ParquetPart.read`."""
    return part.read() if isinstance(part, ParquetPart) else part


def image_table(images: Pixels, digits: np.ndarray) -> pa.Table:
    """uint8[n, 28, 28] and their digits as a table with columns `image` (784 bytes) and `digit` (int8)."""
    return pa.table({"image": pixels_array(images), "digit": pa.array(digits, pa.int8())})


def check_digits(digits: pa.Array, where: str, rows: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.int8]:
    """The digits as int8[n].

    Args:
        where: file or folder of the digits, for messages.
        rows: index of each digit there, for messages.

    Raises:
        RequestError: a digit is null or outside 0..9; names the row.
    """
    values = digits.fill_null(10).to_numpy(zero_copy_only=False)
    for index in np.flatnonzero((values < 0) | (values > 9)).tolist():
        digit = digits[index].as_py()
        raise RequestError(f"{where}: row {rows[index]}: the digit is {'null' if digit is None else digit}, not 0..9")
    return values.astype(np.int8)  # type: ignore[no-any-return]
