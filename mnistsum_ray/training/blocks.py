"""Blocks of rows in the object store, as Arrow tables, and the batches of tensors that a worker computes with."""

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mnistsum_ray.data.pixels import PIXELS, Pixels, one_chunk, pixels_view

ROW_BYTES = PIXELS + 40
"""Memory of a row in a block: pixels, digit, number, row id and draws."""


def images_of(table: pa.Table) -> Pixels:
    """The column `image` of n rows as uint8[n, 28, 28], without a copy where it is one chunk."""
    return pixels_view(one_chunk(table["image"]))


def digits_of(table: pa.Table) -> npt.NDArray[np.int8]:
    """The column `digit` as int8[n]."""
    return table["digit"].to_numpy()  # type: ignore[no-any-return]
