"""Images and numbers in Arrow columns: which column types can hold them, and their values as NumPy arrays.

Images: 784 integers in a list or a fixed-size list, 28x28 nested lists, an Arrow or Ray tensor, 784 raw bytes, PNG or JPEG bytes,
or a struct around any of these bytes. Numbers: any integer type. Both may be dictionary-encoded. A value that cannot be used gets
a reason.
"""

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image, ImageOps

from mnistsum_ray.data.order import NUMBERS

SIDE: Final = 28
PIXELS: Final = SIDE * SIDE
DIGITS: Final = 10
IMAGE_TYPE: Final = pa.binary(PIXELS)
"""Arrow type of stored images: 784 bytes, row by row, 0 is background, 255 is ink."""

_MAX_REASONS: Final = 20
"""Reasons that are counted separately, so that the counts of many different bad rows stay small."""

_OTHERS: Final = "other reasons"

_EXAMPLES: Final = 5
"""Rows that are named for each reason, and in a message."""

_SHAPE_ERROR: Final = "the image has {} values, not 784 or 28 x 28; resize it"

_PNG_START: Final = np.frombuffer(b"\x89PNG\r\n\x1a\n", np.uint8)
_JPEG_START: Final = np.frombuffer(b"\xff\xd8\xff", np.uint8)
"""Followed by the next marker, a byte of 0xC0 or more."""

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
    """A table's column as one array, without a copy where it has one chunk: `combine_chunks` would copy it."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def image_type_error(kind: pa.DataType) -> str | None:
    """Why a column of this type cannot hold images; None where it can."""
    if isinstance(kind, pa.FixedShapeTensorType) and list(kind.permutation or ()) != sorted(kind.permutation or ()):
        return f"is a tensor whose dimensions are permuted ({kind})"
    shape = getattr(kind, "shape", ())  # of a tensor of Arrow or Ray; sides of any length are None
    if shape and None not in shape and not _is_shape_of_image(shape):
        return f"holds tensors of shape {list(shape)}, not [28, 28] or [784]"
    storage = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    if pa.types.is_dictionary(storage):
        storage = storage.value_type
    if pa.types.is_struct(storage):
        field = _image_field(storage)
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


def number_type_error(kind: pa.DataType) -> str | None:
    """Why a column of this type cannot hold numbers; None where it can."""
    values = kind.value_type if pa.types.is_dictionary(kind) else kind
    if pa.types.is_integer(values) or pa.types.is_null(values):
        return None
    return f"has type {kind}, not an integer type"


def _image_field(kind: pa.StructType) -> str | None:
    """Name of the struct's field with the image: in Hugging Face's {bytes, path}, or in Ray's tensor {data, shape}."""
    return next((name for name in ("bytes", "data") if kind.get_field_index(name) >= 0), None)


def _is_shape_of_image(shape: Sequence[int]) -> bool:
    return [side for side in shape if side != 1] in ([PIXELS], [SIDE, SIDE])  # also with a channel, as PyTorch's


def _is_list(kind: pa.DataType) -> bool:
    """True for lists of any kind, also of a fixed size."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind))


def decode_numbers(column: pa.Array, count: int = NUMBERS) -> tuple[npt.NDArray[np.int64], dict[int, str]]:
    """Decode one Arrow array of integers, which must be below `count`: numbers or, with DIGITS, digits.

    They are int64[n]; and row -> reason for each value outside 0..count - 1, in whose place is a zero.
    """
    if isinstance(column, pa.DictionaryArray):
        column = column.dictionary_decode()
    if pa.types.is_null(column.type):
        column = column.cast(pa.int64())
    missing = column.is_null().to_numpy(zero_copy_only=False)
    values = column.fill_null(0).to_numpy(zero_copy_only=False)
    wrong = (values < 0) | (values >= count)
    bad = {int(row): "is null; fill it in or drop the row" for row in np.flatnonzero(missing)}
    bad |= {int(row): f"is {values[row]}, not one of 0..{count - 1}; correct it or drop the row" for row in np.flatnonzero(wrong)}
    return np.where(wrong, 0, values).astype(np.int64), bad


def decode_images(column: pa.Array) -> tuple[Pixels, dict[int, str]]:
    """Decode one Arrow array of images, whose type must pass `image_type_error`.

    They are uint8[n, 28, 28]; and row -> reason for each value that is no image, in whose place are zeros.
    """
    null, bad = "the image is null; fill it in or drop the row", dict[int, str]()
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    if isinstance(column, pa.DictionaryArray):
        column = column.dictionary_decode()
    if pa.types.is_struct(column.type):
        field = _image_field(column.type)
        null = f"the image, or its field {field!r}, is null; put the picture itself into it, or drop the row"
        if field == "data" and column.type.get_field_index("shape") >= 0:
            shapes = enumerate(pc.struct_field(column, "shape").to_pylist())
            bad = {row: _SHAPE_ERROR.format(" x ".join(map(str, s))) for row, s in shapes if s and not _is_shape_of_image(s)}
        column = pc.struct_field(column, field)
    whole = _whole_lists(column) if _is_list(column.type) else _whole_bytes(column)
    if whole is not None and not bad:
        return whole, {}
    images = np.zeros((len(column), SIDE, SIDE), np.uint8)
    for row, value in enumerate(column):
        if row in bad:
            continue
        decoded: Pixels | str = null
        if value.is_valid:
            decoded = _decode_list(value.values) if _is_list(column.type) else _decode_bytes(value.as_py())
        if isinstance(decoded, str):
            bad[row] = decoded
        else:
            images[row] = decoded
    return images, bad


def join_reasons(bad_images: dict[int, str], bad_numbers: dict[int, str], what: str = "number") -> dict[int, str]:
    """Why each bad row cannot be used, in the order of the rows, of what `decode_images` and `decode_numbers` returned."""
    numbers = {row: f"the {what} {reason}" for row, reason in bad_numbers.items()}
    rows = sorted(bad_images | numbers)
    return {row: "; ".join(reasons[row] for reasons in (bad_images, numbers) if row in reasons) for row in rows}


def decode_labelled(images: pa.Array, digits: pa.Array) -> tuple[Pixels, npt.NDArray[np.int8], dict[int, str]]:
    """Decode images and their digits, int8[n]; and row -> reason of each row of which either cannot be used, in their order."""
    pixels, bad_images = decode_images(images)
    values, bad_digits = decode_numbers(digits, DIGITS)
    return pixels, values.astype(np.int8), join_reasons(bad_images, bad_digits, "digit")


@dataclass
class ReasonCounts:
    """Counts of bad rows by reason."""

    reasons: dict[str, int] = field(default_factory=dict)
    """Bad rows by reason."""
    examples: dict[str, list[list[Any]]] = field(default_factory=dict)
    """Some bad rows by reason: file, and index of the row in it."""

    @classmethod
    def of(cls, bad: Mapping[tuple[str, int], str]) -> "ReasonCounts":
        """Count bad rows: (file, row) -> reason, in the order of the rows."""
        commonest = dict(Counter(bad.values()).most_common(_MAX_REASONS))
        places: dict[str, list[list[Any]]] = {}
        for place, reason in bad.items():
            places.setdefault(reason if reason in commonest else _OTHERS, []).append([*place])
        examples = {name: rows[:_EXAMPLES] for name, rows in places.items() if name != _OTHERS}
        return cls({name: len(rows) for name, rows in places.items()}, examples)

    @property
    def total(self) -> int:
        """Number of bad rows."""
        return sum(self.reasons.values())

    def add_reasons(self, other: "ReasonCounts") -> None:
        """Add the counts of other rows, in place."""
        counts = Counter(self.reasons) + Counter(other.reasons)
        others = counts.pop(_OTHERS, 0) + sum(count for _, count in counts.most_common()[_MAX_REASONS:])
        self.reasons = dict(counts.most_common(_MAX_REASONS)) | ({_OTHERS: others} if others else {})
        for reason, rows in other.examples.items():
            self.examples[reason] = (self.examples.get(reason, []) + rows)[:_EXAMPLES]
        self.examples = {reason: rows for reason, rows in self.examples.items() if reason in self.reasons}

    def describe(self) -> str:
        """The first rows with their reasons; if there are more, also the commonest reasons with their numbers of rows."""
        rows = sorted((*place, reason) for reason, places in self.examples.items() for place in places)[:_EXAMPLES]
        first = " | ".join(f"{file}: row {row}: {reason}" for file, row, reason in rows)
        named = Counter({reason: count for reason, count in self.reasons.items() if reason != _OTHERS})
        commonest = " | ".join(f"{count:,} x {reason}" for reason, count in named.most_common(_EXAMPLES))
        return f"{first} | …; most often: {commonest}" if self.total > len(rows) else first


def _whole_bytes(column: pa.Array) -> Pixels | None:
    """The pixels of a column whose values all have 784 bytes of them; None where one is null or anything else."""
    if column.null_count or not len(column):
        return None
    try:
        images = pixels_view(column.cast(IMAGE_TYPE))
    except pa.ArrowException:
        return None
    return images if _are_pixels(images) else None


def _whole_lists(column: pa.Array) -> Pixels | None:
    """The pixels of a column of lists; None where a list has another length, a null or a value outside 0..255."""
    nested = _is_list(column.type.value_type)
    try:
        flat = column.cast(pa.list_(pa.list_(pa.uint8(), SIDE), SIDE) if nested else pa.list_(pa.uint8(), PIXELS))
    except pa.ArrowException:
        return None
    while _is_list(flat.type):
        if flat.null_count:
            return None
        flat = flat.flatten()
    if flat.null_count:
        return None
    pixels: Pixels = flat.to_numpy(zero_copy_only=False)
    return pixels.reshape(len(column), SIDE, SIDE)


def _decode_bytes(data: bytes) -> Pixels | str:
    """One image, or why it is none."""
    if len(data) == PIXELS:
        pixels = np.frombuffer(data, np.uint8).reshape(SIDE, SIDE)
        if _are_pixels(pixels[None]):
            return pixels
    return _decode_png_or_jpeg(data)


def _decode_list(values: pa.Array) -> Pixels | str:
    """One image, or why it is none."""
    shape = str(len(values))
    if _is_list(values.type):
        if values.null_count:
            return "the image has a null in place of a line; fill it in or drop the row"
        widths = {len(line.values) for line in values}
        shape += f" x {widths.pop()}" if len(widths) == 1 else " lines of unequal length"
        values = values.flatten()
    if shape not in (f"{PIXELS}", f"{SIDE} x {SIDE}"):
        return _SHAPE_ERROR.format(shape)
    if values.null_count:
        return "the image has nulls among its values; fill them in or drop the row"
    pixels = values.to_numpy(zero_copy_only=False)
    if pixels.min() < 0 or pixels.max() > 255:
        return f"the image has values {pixels.min()}..{pixels.max()}, outside 0..255; scale them"
    return pixels.astype(np.uint8).reshape(SIDE, SIDE)  # type: ignore[no-any-return]


def _are_pixels(images: Pixels) -> bool:
    """False if one of n rows of 784 bytes begins as a PNG or JPEG does.

    A JPEG of exactly 784 bytes is not rare: at quality 95 about one in 200 MNIST images gives one.
    """
    start = images.reshape(len(images), PIXELS)[:, : len(_PNG_START)]
    jpeg = (start[:, : len(_JPEG_START)] == _JPEG_START).all(1) & (start[:, len(_JPEG_START)] >= 0xC0)
    return not (jpeg | (start == _PNG_START).all(1)).any()


def _decode_png_or_jpeg(data: bytes) -> Pixels | str:
    """One image, turned upright as its EXIF says, or why it is none."""
    try:
        # Pillow reads only the header until the size is known, so a decompression bomb is never unpacked.
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as picture:
            if picture.size != (SIDE, SIDE):
                return f"the picture is {picture.width} x {picture.height} pixels, not 28 x 28; resize it"
            if picture.mode != "L":
                return f"the picture has mode {picture.mode}, not L (8-bit grayscale); convert it"
            ImageOps.exif_transpose(picture, in_place=True)
            return np.asarray(picture)
    except Image.DecompressionBombError:
        return "the picture claims to unpack to far more than 28 x 28 pixels; resize it"
    except Exception as error:  # on damaged bytes Pillow's decoders raise many types
        reason, advice = "are neither 784 pixels nor a readable PNG or JPEG", "save it again"
        if len(data) == PIXELS:
            reason = "begin as a PNG or JPEG does, and cannot be read as one"
            advice += ", or store the pixels as a list of 784 integers"
        return f"{len(data)} bytes {reason} ({type(error).__name__}); {advice}"
