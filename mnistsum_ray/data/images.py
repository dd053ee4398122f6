"""Images and numbers in Arrow columns: which column types can hold them, and their values as NumPy arrays.

Images: 784 integers in a list or a fixed-size list, 28x28 nested lists, an Arrow or Ray tensor,
784 raw bytes, PNG or JPEG bytes, or Hugging Face's struct {bytes, path}. A value that cannot be
used gets a reason.
"""

import io
from collections import Counter
from collections.abc import Mapping
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

_PICTURE_STARTS: Final = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")
"""First bytes of a PNG and of a JPEG."""

_LISTS: Final = (pa.ListType, pa.LargeListType, pa.FixedSizeListType)

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
    buffers = [None, pa.py_buffer(np.ascontiguousarray(images))]
    return pa.FixedSizeBinaryArray.from_buffers(IMAGE_TYPE, len(images), buffers)


def one_chunk(column: pa.ChunkedArray) -> pa.Array:
    """A table's column as one array, without a copy where it has one chunk: `combine_chunks` would copy it."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def image_type_error(kind: pa.DataType) -> str | None:
    """Why a column of this type cannot hold images; None where it can."""
    if list(getattr(kind, "permutation", None) or ()) not in ([], [0, 1], [0, 1, 2]):
        return f"is a tensor whose dimensions are permuted ({kind})"
    values = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    if pa.types.is_struct(values):
        values = _image_type_of_struct(values)
    if _is_bytes(values) or pa.types.is_null(values):
        return None
    levels = 0
    while isinstance(values, _LISTS):
        values = values.value_type
        levels += 1
    if levels in (1, 2) and pa.types.is_integer(values):
        return None
    return f"has type {kind}, which holds no images (lists of 784 integers, 784 bytes, PNG or JPEG bytes, {{bytes, path}})"


def _image_type_of_struct(kind: pa.StructType) -> pa.DataType:
    """Type of the images in Hugging Face's {bytes, path} or Ray's tensor {data, shape}; of any
    other struct its own, which holds none."""
    types = {child.name: child.type for child in kind}
    if "bytes" in types:
        return types["bytes"]
    if "data" in types and isinstance(types.get("shape"), _LISTS):
        return types["data"]
    return kind


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind))


def number_type_error(kind: pa.DataType) -> str | None:
    """Why a column of this type cannot hold numbers; None where it can."""
    values = kind.value_type if pa.types.is_dictionary(kind) else kind
    if pa.types.is_integer(values) or pa.types.is_null(values):
        return None
    return f"has type {kind}, not an integer type"


def decode_numbers(column: pa.Array, count: int = NUMBERS) -> tuple[npt.NDArray[np.int64], dict[int, str]]:
    """Decode one Arrow array of numbers below `count` or, with DIGITS, of digits; floats may be whole.

    They are int64[n]; and row -> reason for each value that is none of 0..count - 1, in whose place
    is a zero: of a type without numbers, that is every value.
    """
    if isinstance(column, pa.DictionaryArray):
        column = column.dictionary_decode()
    kind = column.type
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    numbers = np.full(len(column), np.nan)
    if is_number:  # of a null NaN, and of a large integer one that is as wrong
        numbers = column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    right = (numbers >= 0) & (numbers < count) & (numbers == np.floor(numbers))
    bad: dict[int, str] = {}
    for row in np.flatnonzero(~right).tolist():
        value = column[row] if is_number else f"of type {kind}"
        bad[row] = f"is {value}, not one of 0..{count - 1}; correct it or drop the row"
        if not column[row].is_valid:
            bad[row] = "is null; fill it in or drop the row"
    return np.where(right, numbers, 0).astype(np.int64), bad


def decode_images(column: pa.Array) -> tuple[Pixels, dict[int, str]]:
    """Decode one Arrow array of images, whose type must pass `image_type_error`.

    They are uint8[n, 28, 28]; and row -> reason for each value that is no image, in whose place are zeros.
    """
    null = "the image is null; fill it in or drop the row"
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    if pa.types.is_struct(column.type):
        name = "bytes" if column.type.get_field_index("bytes") >= 0 else "data"
        null = f"the image, or its field {name!r}, is null; put the picture itself into it, or drop the row"
        column = pc.struct_field(column, name)
    whole = _whole_column(column)
    if whole is not None:
        return whole, {}
    images, bad = np.zeros((len(column), SIDE, SIDE), np.uint8), dict[int, str]()
    for row, value in enumerate(column):
        image: Pixels | str = null
        if value.is_valid and isinstance(column.type, _LISTS):
            image = _decode_list(column.take(pa.array([row])))  # a cast of a slice looks at all rows
        elif value.is_valid:
            image = _decode_bytes(value.as_py())
        if isinstance(image, str):
            bad[row] = image
        else:
            images[row] = image
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


def _whole_column(column: pa.Array) -> Pixels | None:
    """The pixels of a column whose values are all 784 pixels; None where one is null, a picture or no image."""
    if column.null_count or not len(column):
        return None
    try:
        if not isinstance(column.type, _LISTS):
            images = pixels_view(column.cast(IMAGE_TYPE))
            return None if _begin_as_pictures(images).any() else images
        nested = isinstance(column.type.value_type, _LISTS)
        flat = column.cast(pa.list_(pa.list_(pa.uint8(), SIDE), SIDE) if nested else pa.list_(pa.uint8(), PIXELS))
    except pa.ArrowException:
        return None
    while isinstance(flat.type, _LISTS):
        flat = flat.flatten()  # leaves nulls out
    if flat.null_count or len(flat) != len(column) * PIXELS:
        return None
    pixels: Pixels = flat.to_numpy(zero_copy_only=False)
    return pixels.reshape(len(column), SIDE, SIDE)


def _begin_as_pictures(images: Pixels) -> npt.NDArray[np.bool_]:
    """Which images begin as a PNG or JPEG does: bool[n].

    A JPEG of exactly 784 bytes is not rare: at quality 95 about one in 200 MNIST images gives one.
    """
    found = np.zeros(len(images), bool)
    for start in _PICTURE_STARTS:
        found |= (images[:, 0, : len(start)] == np.frombuffer(start, np.uint8)).all(1)
    return found


def _decode_list(value: pa.Array) -> Pixels | str:
    """The image of an array of one list, or why it is none."""
    whole = _whole_column(value)
    if whole is not None:
        return whole.reshape(SIDE, SIDE)
    try:
        pixels = np.array(value[0].as_py(), np.int64)
    except (TypeError, ValueError, OverflowError):
        return "the image has nulls, lines of unequal length, or values outside 0..255; correct it or drop the row"
    if pixels.shape not in ((PIXELS,), (SIDE, SIDE)):
        shape = " x ".join(map(str, pixels.shape))
        return f"the image has {shape} values, not 784 or 28 x 28; resize it"
    return f"the image has values {pixels.min()}..{pixels.max()}, outside 0..255; scale them"


def _decode_bytes(data: bytes) -> Pixels | str:
    """The image of 784 pixels or of a PNG or JPEG, turned upright as its EXIF says, or why it is none."""
    if len(data) == PIXELS and not data.startswith(_PICTURE_STARTS):
        return np.frombuffer(data, np.uint8).reshape(SIDE, SIDE)
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
        return f"{len(data)} bytes are neither 784 pixels nor a readable PNG or JPEG ({type(error).__name__}); save it again"
