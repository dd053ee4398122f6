"""The forms an image takes in a Parquet column, and how each becomes uint8[28, 28]. Nothing of Ray's runtime.

Accepted: 784 integers in a list or a fixed-size list, 28x28 nested lists, an Arrow or Ray tensor, 784 raw bytes,
an encoded picture (PNG or JPEG; 28x28, grayscale), and the Hugging Face struct {bytes, path} around any bytes.
"""

import io
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

SIDE: Final = 28
PIXELS: Final = SIDE * SIDE
IMAGE_TYPE: Final = pa.binary(PIXELS)
"""How the project itself stores an image: 784 bytes, row by row, 0 background, 255 ink."""

Pixels = npt.NDArray[np.uint8]

_PICTURE_FORMATS: Final = ("PNG", "JPEG")


class BadImage(ValueError):
    """A row's image is not a 28x28 grayscale picture; the message says what it is instead and what to do."""


def image_form_error(kind: pa.DataType) -> str | None:
    """Why a column of this Arrow type cannot hold images, or None where it can."""
    storage = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    if pa.types.is_dictionary(storage):
        storage = storage.value_type
    if pa.types.is_struct(storage):
        index = storage.get_field_index("bytes")
        if index < 0:
            return f"is a struct without the field 'bytes' ({kind})"
        storage = storage.field(index).type
    if _is_bytes(storage):
        return None
    for _ in range(2):
        if _is_list(storage):
            storage = storage.value_type
    if pa.types.is_integer(storage):
        return None
    return f"has type {kind}, which holds no images (lists of 784 integers, 784 bytes, PNG or JPEG bytes, {{bytes, path}})"


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind))


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


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


def decode_images(column: pa.Array) -> tuple[Pixels, dict[int, str]]:
    """Decode one Arrow array of any accepted form.

    Returns:
        uint8[n, 28, 28], and for each row that is not an image its index with the reason; such rows are zeros.
    """
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    if isinstance(column, pa.DictionaryArray):
        column = column.dictionary_decode()
    if column.type == IMAGE_TYPE and column.null_count == 0:
        return pixels_view(column), {}
    if _is_list(column.type):
        fast = _uniform_lists(column)
        if fast is not None:
            return fast, {}
    images = np.zeros((len(column), SIDE, SIDE), np.uint8)
    bad: dict[int, str] = {}
    for row, value in enumerate(column):
        try:
            images[row] = _decode_one(value.as_py())
        except BadImage as error:
            bad[row] = str(error)
    return images, bad


def _uniform_lists(column: pa.Array) -> Pixels | None:
    """Lists that are all whole, as one buffer; None where some row needs a look of its own."""
    flat: Any = column
    while _is_list(flat.type):
        if flat.null_count:
            return None
        lengths = flat.type.list_size if pa.types.is_fixed_size_list(flat.type) else flat.value_lengths()
        if not isinstance(lengths, int):
            distinct = lengths.unique()
            if len(distinct) != 1:
                return None
            lengths = distinct[0].as_py()
        if lengths not in (PIXELS, SIDE):
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


def _decode_one(value: Any) -> Pixels:
    if isinstance(value, dict):
        value = value.get("bytes")
    if value is None:
        raise BadImage("the image is null")
    if isinstance(value, bytes):
        return np.frombuffer(value, np.uint8).reshape(SIDE, SIDE) if len(value) == PIXELS else _decode_picture(value)
    try:
        values = np.asarray(value)
    except ValueError:
        raise BadImage("the image is a list of lists of unequal length, not 28x28") from None
    if values.shape not in ((PIXELS,), (SIDE, SIDE)):
        raise BadImage(f"the image has {' x '.join(map(str, values.shape))} values, not 784 or 28 x 28")
    if values.dtype.kind not in "iu":
        raise BadImage("the image holds null or fractional values, not integers 0..255")
    if values.min() < 0 or values.max() > 255:
        raise BadImage(f"the image holds values {values.min()}..{values.max()}, outside 0..255")
    return values.astype(np.uint8).reshape(SIDE, SIDE)


def _decode_picture(data: bytes) -> Pixels:
    try:
        # Only the header is read until the size is known, so a picture bomb is never unpacked.
        with Image.open(io.BytesIO(data), formats=_PICTURE_FORMATS) as picture:
            if picture.size != (SIDE, SIDE):
                raise BadImage(f"the picture is {picture.width} x {picture.height} pixels, not 28 x 28")
            if picture.mode != "L":
                raise BadImage(f"the picture has mode {picture.mode}, not L (8-bit grayscale)")
            return np.asarray(picture)
    except BadImage:
        raise
    except Image.DecompressionBombError:
        raise BadImage("the picture claims to unpack to far more than 28 x 28 pixels") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise BadImage(f"{len(data)} bytes are neither 784 pixels nor a readable PNG or JPEG ({type(error).__name__})") from None
