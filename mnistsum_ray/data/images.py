"""Images and numbers in Arrow columns, as arrays; and pictures that people draw, as MNIST's are.

Images are 784 integers in a list, 28x28 nested lists, an Arrow or Ray tensor, 784 raw bytes, PNG or
JPEG bytes, or Hugging Face's struct {bytes, path}. A value that cannot be used gets a reason.
"""

import io
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image, ImageOps

from mnistsum_ray.data.randomness import NUMBERS
from mnistsum_ray.errors import RequestError, shortened
from mnistsum_ray.storage.uri import as_request_error, locate_existing

SIDE: Final = 28
PIXELS: Final = SIDE * SIDE
DIGITS: Final = 10
IMAGE_TYPE: Final = pa.binary(PIXELS)
"""Arrow type of stored images: 784 bytes, row by row, 0 is background, 255 is ink."""

_PICTURE_STARTS: Final = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")
"""First bytes of a PNG and of a JPEG."""

_LISTS: Final = (pa.ListType, pa.LargeListType, pa.FixedSizeListType)
_BYTES: Final = (pa.binary(), pa.large_binary(), pa.binary_view())
_TEXTS: Final = (pa.string(), pa.large_string(), pa.string_view())

Column: TypeAlias = pa.Array | pa.ChunkedArray
Pixels = npt.NDArray[np.uint8]
"""uint8[n, 28, 28] or, for one image, uint8[28, 28]."""
Numbers = npt.NDArray[np.int64]
Reasons = dict[int, str]
"""Why a row cannot be used, by its index."""
BadRow = tuple[str, int, str]
"""A row that cannot be used: its file, its index there, and the reason."""
Picture: TypeAlias = str | Path | bytes | Image.Image
"""A file, a URI, the bytes of a file, or a picture of Pillow's."""


class BadImageError(ValueError):
    """A value is no image; the message says why and what to do."""


def pixels_view(column: pa.FixedSizeBinaryArray) -> Pixels:
    """An array of IMAGE_TYPE without nulls as uint8[n, 28, 28], without a copy."""
    flat = np.frombuffer(column.buffers()[1] or b"", np.uint8)
    start = column.offset * PIXELS
    return flat[start : start + len(column) * PIXELS].reshape(len(column), SIDE, SIDE)


def one_chunk(column: Column) -> pa.Array:
    """A column as one array; `combine_chunks` alone would copy one chunk too."""
    if isinstance(column, pa.Array):
        return column
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def image_type_error(kind: pa.DataType) -> str | None:
    """Why a column of this type cannot hold images; None where it can."""
    values = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    if pa.types.is_struct(values) and "bytes" in values.names:
        values = values.field("bytes").type
    if values in (pa.null(), *_BYTES) or pa.types.is_fixed_size_binary(values):
        return None
    depth = 0
    while isinstance(values, _LISTS):
        values, depth = values.value_type, depth + 1
    if depth in (1, 2) and pa.types.is_integer(values):
        return None
    known = "lists of 784 integers, 784 bytes, PNG or JPEG bytes, {bytes, path}"
    return f"has type {kind}, which holds no images ({known})"


def number_type_error(kind: pa.DataType) -> str | None:
    """Why a column of this type cannot hold numbers or digits; None where it can.

    pandas writes floats where a number is missing; labels may be text.
    """
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
    is_known = is_number or kind in (pa.null(), *_TEXTS)
    return None if is_known else f"has type {kind}, which holds no whole numbers"


def decode_numbers(column: Column, count: int = NUMBERS) -> tuple[Numbers, Reasons]:
    """Decode an Arrow column, of any type, of whole numbers below `count`.

    A whole number is an integer, a whole float, or the text of one, such as "7" or "7.0".

    Returns int64[n], and a reason for each value that is none of 0..count - 1, in whose place is 0.
    """
    column = one_chunk(column)
    if pa.types.is_dictionary(column.type):  # categories
        column = column.dictionary_decode()
    if column.type == pa.string_view():
        column = column.cast(pa.string())  # Arrow has few functions for views
    is_known = number_type_error(column.type) is None
    values = column if is_known else pa.nulls(len(column))
    if column.type in _TEXTS:
        values = pc.if_else(pc.match_substring_regex(column, r"^\d+(\.0*)?$"), column, None)
    # A null becomes NaN; a huge integer is rounded, but stays out of range.
    numbers = values.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    is_right = (numbers >= 0) & (numbers < count) & (numbers == np.floor(numbers))
    reasons: Reasons = {}
    for row in np.flatnonzero(~is_right).tolist():
        value = column[row]
        if value.is_valid:
            # A value of another type is not looked at: Ray has one of pickles, which would run.
            shown = _shown(value) if is_known else f"of type {column.type}"
            reasons[row] = f"is {shown}, not one of 0..{count - 1}; correct it or drop the row"
        else:
            reasons[row] = "is null; fill it in or drop the row"
    return np.where(is_right, numbers, 0).astype(np.int64), reasons


def _shown(value: pa.Scalar) -> str:
    try:
        return shortened(repr(value.as_py()))
    except UnicodeDecodeError:  # Arrow does not look at the bytes of a text
        return "text that is not UTF-8"


def decode_images(column: Column) -> tuple[Pixels, Reasons]:
    """Decode an Arrow column of images, whose type must pass `image_type_error`.

    Returns uint8[n, 28, 28], with zeros for each value that is no image, and the reasons for these.
    """
    column = one_chunk(column)
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    if pa.types.is_struct(column.type):
        column = pc.struct_field(column, "bytes")
    if pa.types.is_binary_view(column.type):
        column = column.cast(pa.binary())  # Arrow has few functions for views
    if not column.null_count:
        with suppress(pa.ArrowException):
            is_list = isinstance(column.type, _LISTS)
            pixels = _pixels_of_lists(column) if is_list else _pixels_of_bytes(column)
            if pixels is not None:
                return pixels, {}
    # The slow way, value by value: some are pictures, or no images.
    images = np.zeros((len(column), SIDE, SIDE), np.uint8)
    reasons: Reasons = {}
    for row, value in enumerate(column):
        try:
            images[row] = _decode_image(value.as_py())
        except BadImageError as error:
            reasons[row] = str(error)
    return images, reasons


def _pixels_of_bytes(column: pa.Array) -> Pixels | None:
    """The pixels of values of 784 bytes, else an ArrowException; None if some may be pictures."""
    pixels = pixels_view(column.cast(IMAGE_TYPE))
    rows = pixels.reshape(len(pixels), PIXELS)
    for start in _PICTURE_STARTS:
        if (rows[:, : len(start)] == np.frombuffer(start, np.uint8)).all(axis=1).any():
            return None
    return pixels


def _pixels_of_lists(column: pa.Array) -> Pixels | None:
    """The pixels of lists of 784 integers, else an ArrowException; None if one is null."""
    lists_of_rows = pa.list_(pa.list_(pa.uint8(), SIDE), SIDE)
    is_nested = isinstance(column.type.value_type, _LISTS)
    lists = column.cast(lists_of_rows if is_nested else pa.list_(pa.uint8(), PIXELS))
    values = lists.flatten(recursive=True)  # leaves null lists out
    if values.null_count or len(values) != len(column) * PIXELS:
        return None
    pixels: Pixels = values.to_numpy(zero_copy_only=False)
    return pixels.reshape(len(column), SIDE, SIDE)


def _decode_image(value: list[Any] | bytes | None) -> Pixels:
    """The image of one value of a column. BadImageError: it is none."""
    if value is None:
        raise BadImageError("the image is null; fill it in or drop the row")
    # At quality 95 about one in 200 MNIST images gives a JPEG of exactly 784 bytes.
    if isinstance(value, bytes) and (len(value) != PIXELS or value.startswith(_PICTURE_STARTS)):
        return _decode_picture(value)
    try:
        pixels = np.array(list(value), np.uint8)
    except (TypeError, ValueError, OverflowError):  # null; lists of unlike lengths; 256
        pixels = np.empty(0, np.uint8)
    if pixels.shape not in ((PIXELS,), (SIDE, SIDE)):
        form = "not 784 or 28 x 28 integers in 0..255"
        raise BadImageError(f"the image is {form}; resize or scale it")
    return pixels.reshape(SIDE, SIDE)


def _decode_picture(data: bytes) -> Pixels:
    """The image of a PNG or JPEG. BadImageError: it is none, or has another size or mode."""
    try:
        # Pillow reads only the header until the size is known: a bomb is never unpacked.
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as picture:
            if picture.size == (SIDE, SIDE) and picture.mode == "L":
                return np.asarray(picture)
            form = f"{picture.width} x {picture.height} pixels of mode {picture.mode}"
    except Exception as error:  # on damaged bytes Pillow's decoders raise many types
        why = f"neither 784 pixels nor a readable PNG or JPEG ({type(error).__name__})"
        raise BadImageError(f"{len(data)} bytes are {why}; save it again") from None
    raise BadImageError(f"the picture has {form}, not 28 x 28 of L (8-bit grayscale); convert it")


def join_reasons(bad_images: Reasons, bad_numbers: Reasons, what: str = "number") -> Reasons:
    """Reasons of both decoders as one reason for each bad row, in the order of the rows."""
    joined = dict(bad_images)
    for row, reason in bad_numbers.items():
        of_image = f"{joined[row]}; " if row in joined else ""
        joined[row] = f"{of_image}the {what} {reason}"
    return dict(sorted(joined.items()))


@dataclass
class ReasonCounts:
    """Counts of bad rows by reason, and the first of these rows."""

    # All reasons after the first twenty are one entry, so that the counts stay small.
    reasons: Counter[str] = field(default_factory=Counter)
    examples: list[BadRow] = field(default_factory=list)

    def add(self, reasons: Mapping[str, int], examples: Iterable[BadRow]) -> None:
        """Add counts of other rows, and those rows or the first of them."""
        for reason, rows in reasons.items():
            is_counted = reason in self.reasons or len(self.reasons) < 20
            self.reasons[reason if is_counted else "other reasons"] += rows
        self.examples = sorted([*self.examples, *examples])[:5]

    @property
    def total(self) -> int:
        return self.reasons.total()

    def describe(self) -> str:
        """The first bad rows with their reasons, for a message."""
        texts = [f"{file}: row {row}: {reason}" for file, row, reason in self.examples]
        if self.total > len(texts):
            texts.append("…")
        return " | ".join(texts)


_FORMATS: Final = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Formats that are only pixels: for EPS, Pillow would run another program."""

_FAINT: Final = 0.25
"""Ink below this share of the strongest is grain, and becomes 0; above 1 - this share it is 1."""


def prepare_picture(picture: Picture) -> Pixels:
    """Prepare a picture as MNIST's images were, white on black: uint8[28, 28].

    Ink is what is darker or lighter than the edge. It is scaled to fit 20 x 20 pixels, and centred
    by its mass (LeCun et al. 1998).

    Raises:
        RequestError: there is no such file, it is no picture, or nothing is drawn on it.
        TryAgainError: the storage does not answer.
    """
    name, grey = _read_grey(picture)
    edge = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    ink = np.abs(grey - np.median(edge))
    strongest = ink.max()
    if strongest < 16:  # of 255
        nothing = "nothing is drawn on it that is darker or lighter than its edge"
        raise RequestError(f"{name}: {nothing}")
    ink = ((ink / strongest - _FAINT) / (1 - 2 * _FAINT)).clip(0, 1)
    drawn = Image.fromarray(ink)
    drawn = drawn.crop(drawn.getbbox())
    scale = 20 / max(drawn.size)
    width = max(1, round(scale * drawn.width))  # a line may be thinner than a pixel
    height = max(1, round(scale * drawn.height))
    digit = np.asarray(drawn.resize((width, height), Image.Resampling.BICUBIC)).clip(0)
    digit *= 255 / digit.max()  # thin strokes have become faint
    top, left = _start_when_centred(digit.sum(axis=1)), _start_when_centred(digit.sum(axis=0))
    pixels = np.zeros((SIDE, SIDE), np.uint8)
    pixels[top : top + height, left : left + width] = digit.round()
    return pixels


def _read_grey(picture: Picture) -> tuple[str, npt.NDArray[np.float32]]:
    """The name of a picture in messages, and its brightness, float32[height, width] in 0..255."""
    name = "the picture"
    if isinstance(picture, str | Path):
        file = locate_existing(str(picture), "picture")
        with as_request_error():
            name, picture = file.display, file.read_bytes()
    try:
        if isinstance(picture, bytes):
            with warnings.catch_warnings():  # a few bytes may unfold to any number of pixels
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                picture = Image.open(io.BytesIO(picture), formats=_FORMATS)
        if picture.mode[0] in "IF" or 0 in picture.size:  # Pillow would cut off brighter values
            raise RequestError(f"{name}: has no pixels, or pixels of more than 8 bits")
        image = ImageOps.exif_transpose(picture).convert("RGBA")
    except RequestError:
        raise
    except Exception as error:  # Pillow's decoders raise many types
        problem = f"cannot be read as a picture ({type(error).__name__})"
        raise RequestError(f"{name}: {problem}; save it as PNG") from None
    image.thumbnail((1024, 1024))  # only ever smaller
    white = Image.new("RGBA", image.size, "white")
    return name, np.asarray(Image.alpha_composite(white, image).convert("L"), np.float32)


def _start_when_centred(mass: npt.NDArray[np.float32]) -> int:
    """Where a digit with this mass by row or column must begin to have its centre in the middle."""
    centre = np.average(np.arange(len(mass)), weights=mass)
    return int(np.clip(round(SIDE / 2 - centre), 0, SIDE - len(mass)))
