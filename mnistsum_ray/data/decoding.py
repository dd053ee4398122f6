"""The forms that an image and a number take in a Parquet column, and how each is decoded. Nothing of Ray's runtime.

Accepted images: 784 integers in a list or a fixed-size list, 28x28 nested lists, an Arrow or Ray tensor, 784 raw bytes,
an encoded picture (PNG or JPEG; 28x28, grayscale), and the Hugging Face struct {bytes, path} around any bytes.
Accepted numbers: any integer type, dictionary-encoded or not.
"""

import io
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image, ImageOps

SIDE: Final = 28
PIXELS: Final = SIDE * SIDE
IMAGE_TYPE: Final = pa.binary(PIXELS)
"""How the project itself stores an image: 784 bytes, row by row, 0 background, 255 ink."""

Pixels = npt.NDArray[np.uint8]

_PICTURE_FORMATS: Final = ("PNG", "JPEG")

_PNG: Final = np.frombuffer(b"\x89PNG\r\n\x1a\n", np.uint8)
_JPEG: Final = np.frombuffer(b"\xff\xd8\xff", np.uint8)
"""Of a JPEG the fourth byte is the next marker's, 0xC0 or more."""

_ORIENTATION: Final = 0x0112
"""EXIF tag: how a camera was held; 1 is upright."""


class ImageError(ValueError):
    """A row's image is not a 28x28 grayscale picture; the message says what it is instead and what to do."""


def image_form_error(kind: pa.DataType) -> str | None:
    """Why a column of this Arrow type cannot hold images, or None where it can."""
    if isinstance(kind, pa.FixedShapeTensorType) and list(kind.permutation or ()) != sorted(kind.permutation or ()):
        return f"is a tensor whose dimensions are permuted ({kind})"
    storage = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    if pa.types.is_dictionary(storage):
        storage = storage.value_type
    if pa.types.is_struct(storage):
        field = _picture_field(storage)
        if field is None:
            return f"is a struct without the field 'bytes' ({kind})"
        storage = storage.field(field).type
    if _is_bytes(storage) or pa.types.is_null(storage):
        return None
    levels = 0
    while _is_list(storage):
        storage, levels = storage.value_type, levels + 1
    if levels in (1, 2) and pa.types.is_integer(storage):
        return None
    return f"has type {kind}, which holds no images (lists of 784 integers, 784 bytes, PNG or JPEG bytes, {{bytes, path}})"


def number_form_error(kind: pa.DataType) -> str | None:
    """Why a column of this Arrow type cannot hold numbers, or None where it can."""
    values = kind.value_type if pa.types.is_dictionary(kind) else kind
    if pa.types.is_integer(values) or pa.types.is_null(values):
        return None
    return f"has type {kind}, not an integer type"


def _picture_field(kind: pa.StructType) -> str | None:
    """Where a struct has its image: Hugging Face's {bytes, path}, or {data, shape}, Ray's tensor of variable shape."""
    return next((name for name in ("bytes", "data") if kind.get_field_index(name) >= 0), None)


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


def one_chunk(column: pa.ChunkedArray) -> pa.Array:
    """A column of a table as one array, without a copy where it is one."""
    if column.num_chunks == 1:
        return column.chunk(0)  # `combine_chunks` would copy it
    combined = column.combine_chunks()
    return combined.chunk(0) if isinstance(combined, pa.ChunkedArray) else combined


def decode_numbers(column: pa.Array) -> tuple[npt.NDArray[np.int64], dict[int, str]]:
    """Decode one Arrow array of integers.

    Returns:
        int64[n], and for each row that is not in 0..9 its index with the reason; such rows are zeros.
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
    """Decode one Arrow array of any accepted form.

    Returns:
        uint8[n, 28, 28], and for each row that is not an image its index with the reason; such rows are zeros.
    """
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    if isinstance(column, pa.DictionaryArray):
        column = column.dictionary_decode()
    fast = _uniform_lists(column) if _is_list(column.type) else _uniform_bytes(column)
    if fast is not None:
        return fast, {}
    images = np.zeros((len(column), SIDE, SIDE), np.uint8)
    bad: dict[int, str] = {}
    for row, value in enumerate(column):
        try:
            images[row] = _decode_one(value)
        except ImageError as error:
            bad[row] = str(error)
    return images, bad


def _uniform_bytes(column: pa.Array) -> Pixels | None:
    """Values that are all 784 bytes of pixels, as a view of their buffer; None where some row needs a look of its own."""
    pixels = _all_of_784_bytes(column)
    return None if pixels is None or _pictures(pixels).any() else pixels


def _pictures(pixels: Pixels) -> npt.NDArray[np.bool_]:
    """Which of n rows are no pixels but a PNG or JPEG of 784 bytes, by its first bytes: bool[n]."""
    first = pixels.reshape(len(pixels), PIXELS)[:, : len(_PNG)]
    jpeg = (first[:, : len(_JPEG)] == _JPEG).all(1) & (first[:, len(_JPEG)] >= 0xC0)
    found: npt.NDArray[np.bool_] = jpeg | (first == _PNG).all(1)
    return found


def _all_of_784_bytes(column: pa.Array) -> Pixels | None:
    if column.type == IMAGE_TYPE and column.null_count == 0:
        return pixels_view(column)
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)) or column.null_count or not len(column):
        return None
    offsets = np.frombuffer(column.buffers()[1], np.int32 if pa.types.is_binary(column.type) else np.int64)
    offsets = offsets[column.offset : column.offset + len(column) + 1]
    if (np.diff(offsets) != PIXELS).any():
        return None
    return np.frombuffer(column.buffers()[2], np.uint8)[offsets[0] : offsets[-1]].reshape(len(column), SIDE, SIDE)


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


def _decode_one(value: pa.Scalar) -> Pixels:
    if isinstance(value, pa.StructScalar) and value.is_valid:
        field = _picture_field(value.type)
        assert field is not None, "checked by image_form_error"
        if not value[field].is_valid:
            raise ImageError(f"the image's field {field!r} is null; put the picture itself into it, or drop the row")
        value = value[field]
    if not value.is_valid:
        raise ImageError("the image is null; fill it in or drop the row")
    if _is_list(value.type):
        return _decode_list(value.values)
    data: bytes = value.as_py()
    if len(data) == PIXELS:
        pixels = np.frombuffer(data, np.uint8).reshape(SIDE, SIDE)
        if not _pictures(pixels[None]).any():
            return pixels
    return _decode_picture(data)


def _decode_list(values: pa.Array) -> Pixels:
    shape = str(len(values))
    if _is_list(values.type):
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


def _decode_picture(data: bytes) -> Pixels:
    try:
        # Only the header is read until the size is known, so a picture bomb is never unpacked.
        with Image.open(io.BytesIO(data), formats=_PICTURE_FORMATS) as picture:
            if picture.size != (SIDE, SIDE):
                raise ImageError(f"the picture is {picture.width} x {picture.height} pixels, not 28 x 28; resize it")
            if picture.mode != "L":
                raise ImageError(f"the picture has mode {picture.mode}, not L (8-bit grayscale); convert it")
            if picture.getexif().get(_ORIENTATION, 1) == 1:
                return np.asarray(picture)
            upright: Pixels = np.asarray(ImageOps.exif_transpose(picture))
            return upright
    except ImageError:
        raise
    except Image.DecompressionBombError:
        raise ImageError("the picture claims to unpack to far more than 28 x 28 pixels; resize it") from None
    except Exception as error:  # Pillow's decoders raise whatever damaged bytes lead them to
        if len(data) == PIXELS:
            raise ImageError(
                f"784 bytes begin as a PNG or JPEG does, and cannot be read as one ({type(error).__name__}); save it anew, or "
                "store the pixels as a list of 784 integers"
            ) from None
        raise ImageError(
            f"{len(data)} bytes are neither 784 pixels nor a readable PNG or JPEG ({type(error).__name__}); save it anew"
        ) from None
