"""Decode Arrow columns of images and numbers to NumPy arrays; a value that cannot be used gets a reason."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mnistsum_ray.data.column_types import image_field, is_list
from mnistsum_ray.data.pixels import IMAGE_TYPE, PIXELS, SIDE, Pixels, pixels_view
from mnistsum_ray.data.png_jpeg import ImageError, decode_png_or_jpeg, starts_as_png_or_jpeg


def decode_numbers(column: pa.Array) -> tuple[npt.NDArray[np.int64], dict[int, str]]:
    """Decode one Arrow array of integers.

    Returns:
        int64[n], and row -> reason for each value outside 0..9; these rows are zeros.
    """
    if isinstance(column, pa.DictionaryArray):
        column = column.dictionary_decode()
    if pa.types.is_null(column.type):
        column = column.cast(pa.int64())
    missing = column.is_null().to_numpy(zero_copy_only=False)
    values = column.fill_null(0).to_numpy(zero_copy_only=False)
    wrong = (values < 0) | (values > 9)
    bad = {int(row): "is null; fill it in or drop the row" for row in np.flatnonzero(missing)}
    bad |= {int(row): f"is {values[row]}, not one of 0..9; correct it or drop the row" for row in np.flatnonzero(wrong)}
    return np.where(wrong, 0, values).astype(np.int64), bad


def decode_images(column: pa.Array) -> tuple[Pixels, dict[int, str]]:
    """Decode one Arrow array of images; its type must pass `image_type_error`.

    Returns:
        uint8[n, 28, 28], and row -> reason for each value that is not an image; these rows are zeros.
    """
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    if isinstance(column, pa.DictionaryArray):
        column = column.dictionary_decode()
    whole = _decode_whole_lists(column) if is_list(column.type) else _view_whole_bytes(column)
    if whole is not None:
        return whole, {}
    images = np.zeros((len(column), SIDE, SIDE), np.uint8)
    bad: dict[int, str] = {}
    for row, value in enumerate(column):
        try:
            images[row] = _decode_value(value)
        except ImageError as error:
            bad[row] = str(error)
    return images, bad


def join_reasons(bad_images: dict[int, str], bad_numbers: dict[int, str]) -> dict[int, str]:
    """Why each bad row cannot be scored, in the order of the rows, of what `decode_images` and `decode_numbers` returned."""
    numbers = {row: f"the number {reason}" for row, reason in bad_numbers.items()}
    rows = sorted(bad_images | numbers)
    return {row: "; ".join(reasons[row] for reasons in (bad_images, numbers) if row in reasons) for row in rows}


def _view_whole_bytes(column: pa.Array) -> Pixels | None:
    """The buffer of a column whose values are all 784 pixels, without a copy; None where a value is anything else."""
    images = _view_784_bytes(column)
    return None if images is None or starts_as_png_or_jpeg(images).any() else images


def _view_784_bytes(column: pa.Array) -> Pixels | None:
    if column.type == IMAGE_TYPE and column.null_count == 0:
        return pixels_view(column)
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)) or column.null_count or not len(column):
        return None
    offsets = np.frombuffer(column.buffers()[1], np.int32 if pa.types.is_binary(column.type) else np.int64)
    offsets = offsets[column.offset : column.offset + len(column) + 1]
    if (np.diff(offsets) != PIXELS).any():
        return None
    return np.frombuffer(column.buffers()[2], np.uint8)[offsets[0] : offsets[-1]].reshape(len(column), SIDE, SIDE)


def _decode_whole_lists(column: pa.Array) -> Pixels | None:
    """A column of lists decoded at once; None where a list has another length, a null or a value outside 0..255."""
    flat: Any = column
    while is_list(flat.type):
        if flat.null_count:
            return None
        length = flat.type.list_size if pa.types.is_fixed_size_list(flat.type) else flat.value_lengths()
        if not isinstance(length, int):
            distinct = length.unique()
            if len(distinct) != 1:
                return None
            length = distinct[0].as_py()
        if length not in (PIXELS, SIDE):
            return None
        flat = flat.flatten()
    if flat.null_count or len(flat) != len(column) * PIXELS:
        return None
    values = flat.to_numpy(zero_copy_only=False)
    if values.dtype != np.uint8:
        if values.min(initial=0) < 0 or values.max(initial=0) > 255:
            return None
        values = values.astype(np.uint8)
    return values.reshape(len(column), SIDE, SIDE)  # type: ignore[no-any-return]


def _decode_value(value: pa.Scalar) -> Pixels:
    if isinstance(value, pa.StructScalar) and value.is_valid:
        field = image_field(value.type)
        assert field is not None, "checked by image_type_error"
        if not value[field].is_valid:
            raise ImageError(f"the image's field {field!r} is null; put the picture itself into it, or drop the row")
        value = value[field]
    if not value.is_valid:
        raise ImageError("the image is null; fill it in or drop the row")
    if is_list(value.type):
        return _decode_list(value.values)
    data: bytes = value.as_py()
    if len(data) == PIXELS:
        pixels = np.frombuffer(data, np.uint8).reshape(SIDE, SIDE)
        if not starts_as_png_or_jpeg(pixels[None]).any():
            return pixels
    return decode_png_or_jpeg(data)


def _decode_list(values: pa.Array) -> Pixels:
    shape = str(len(values))
    if is_list(values.type):
        if values.null_count:
            raise ImageError("the image has a null in place of a line; fill it in or drop the row")
        widths = {len(line.values) for line in values}
        shape += f" x {widths.pop()}" if len(widths) == 1 else " lines of unequal length"
        values = values.flatten()
    if shape not in (f"{PIXELS}", f"{SIDE} x {SIDE}"):
        raise ImageError(f"the image has {shape} values, not 784 or 28 x 28; resize it")
    if values.null_count:
        raise ImageError("the image has nulls among its values; fill them in or drop the row")
    pixels = values.to_numpy(zero_copy_only=False)
    if pixels.min() < 0 or pixels.max() > 255:
        raise ImageError(f"the image has values {pixels.min()}..{pixels.max()}, outside 0..255; scale them")
    return pixels.astype(np.uint8).reshape(SIDE, SIDE)  # type: ignore[no-any-return]
