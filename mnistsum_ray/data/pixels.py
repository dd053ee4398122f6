"""Images as uint8 arrays, and as the Arrow column type in which this program stores them."""

from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

SIDE: Final = 28
PIXELS: Final = SIDE * SIDE
IMAGE_TYPE: Final = pa.binary(PIXELS)
"""Arrow type of stored images: 784 bytes, row by row, 0 is background, 255 is ink."""

Pixels = npt.NDArray[np.uint8]
"""uint8[n, 28, 28] or, for one image, uint8[28, 28]."""


def pixels_view(column: pa.FixedSizeBinaryArray) -> Pixels:
    """An array of IMAGE_TYPE without nulls as uint8[n, 28, 28], without a copy."""
    buffer = column.buffers()[1]
    if buffer is None:
        return np.empty((0, SIDE, SIDE), np.uint8)
    flat = np.frombuffer(buffer, np.uint8)
    start = column.offset * PIXELS
    return flat[start : start + len(column) * PIXELS].reshape(len(column), SIDE, SIDE)


def pixels_array(images: Pixels) -> pa.FixedSizeBinaryArray:
    """uint8[n, 28, 28] as an array of IMAGE_TYPE, without a copy where the memory is contiguous."""
    return pa.FixedSizeBinaryArray.from_buffers(IMAGE_TYPE, len(images), [None, pa.py_buffer(np.ascontiguousarray(images))])


def one_chunk(column: pa.ChunkedArray) -> pa.Array:
    """A table's column as one array, without a copy where it has one chunk."""
    if column.num_chunks == 1:
        return column.chunk(0)  # `combine_chunks` would copy it
    combined = column.combine_chunks()
    return combined.chunk(0) if isinstance(combined, pa.ChunkedArray) else combined
