"""Blocks of rows in the object store: Arrow tables, whose columns are arrays without a copy."""

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mnistsum_ray.data.distortion import AFFINE_VALUES
from mnistsum_ray.data.pixels import PIXELS, Pixels, one_chunk, pixels_array, pixels_view

ROW_BYTES = PIXELS + 40
"""Memory of a row in a block: pixels, digit, number, row id and distortion."""


def images_of(table: pa.Table) -> Pixels:
    """The column `image` of n rows as uint8[n, 28, 28], without a copy where it is one chunk."""
    return pixels_view(one_chunk(table["image"]))


def digits_of(table: pa.Table) -> npt.NDArray[np.int8]:
    """The column `digit` as int8[n]."""
    return table["digit"].to_numpy()  # type: ignore[no-any-return]


def block_of(columns: dict[str, np.ndarray]) -> pa.Table:
    """A block of rows: `image` uint8[n, 28, 28], `affine` float32[n, AFFINE_VALUES] if there is one, and columns of integers [n].

    Images and matrices are not copied. Ray Data would make its own Arrow type of them, and copy them twice.
    """
    return pa.table({name: _column(name, values) for name, values in columns.items()})


def _column(name: str, values: np.ndarray) -> pa.Array:
    if name == "affine":
        return affine_column(values)
    if name != "image":
        return pa.array(values)
    return pixels_array(values)


def affine_column(matrices: npt.NDArray[np.float32]) -> pa.Array:
    """Matrices float32[n, AFFINE_VALUES] as a column `affine`."""
    return pa.FixedSizeListArray.from_arrays(pa.array(matrices.ravel()), AFFINE_VALUES)


def columns_of(table: pa.Table) -> dict[str, np.ndarray]:
    """The columns of a block as arrays, most of them without a copy; integers as int64."""
    columns: dict[str, np.ndarray] = {"image": images_of(table), "digit": digits_of(table).astype(np.int64)}
    for name in ("row_id", "number"):
        if name in table.column_names:
            columns[name] = table[name].to_numpy().astype(np.int64)
    if "affine" in table.column_names:
        flat = table["affine"].combine_chunks().flatten().to_numpy()
        columns["affine"] = flat.reshape(-1, AFFINE_VALUES)
    return columns
