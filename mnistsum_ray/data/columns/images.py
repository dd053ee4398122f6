"""Pictures of one size, and what all pictures have in common."""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image, ImageOps

from mnistsum_ray.data.columns.base import (
    LISTS,
    NULL,
    Array,
    ArrowColumn,
    Column,
    Reasons,
    plain,
    plain_type,
    tensor_error,
)

BYTES: Final = (pa.binary(), pa.large_binary(), pa.binary_view())

_FIRST_BYTES: Final = {"PNG": b"\x89PNG\r\n\x1a\n", "JPEG": b"\xff\xd8\xff"}

MOST_PIXELS: Final = 16_384
"""Largest height and width of a picture in a batch."""

_MODES: Final = {"L": "8-bit grayscale", "RGB": "8-bit colour"}


class UnusablePictureError(ValueError):
    """A value is no picture that can be used; the message says why and what to do."""


@dataclass(frozen=True)
class Pictures(Column):
    """Base of the kinds of pictures. Scoring does not write them again."""

    dtype: ClassVar[str] = "uint8"
    is_passed_on: ClassVar[bool] = False

    def random(self, rows: int, generator: np.random.Generator) -> Array:
        return generator.integers(256, size=(rows, *self.shape), dtype=np.uint8)


@dataclass(frozen=True)
class Images(Pictures):
    """Pictures of one size: uint8[n, height, width] or, of mode RGB, uint8[n, height, width, 3].

    In files they are flat or nested lists of integers, an Arrow or Ray tensor, raw bytes, PNG or
    JPEG bytes, or Hugging Face's struct {bytes, path}.
    """

    height: int
    width: int
    mode: Literal["L", "RGB"] = "L"

    def problem(self) -> str | None:
        for name in ("height", "width"):
            value = getattr(self, name)
            if not isinstance(value, int) or not 1 <= value <= MOST_PIXELS:
                return f"{name} is {value!r}, and must be an integer in 1..{MOST_PIXELS:,}"
        return None if self.mode in _MODES else f"mode is {self.mode!r}, and must be L or RGB"

    @property
    def shape(self) -> tuple[int, ...]:
        size = (self.height, self.width)
        return (*size, 3) if self.mode == "RGB" else size

    @property
    def form(self) -> str:
        return f"images of {self.width} x {self.height} pixels, {_MODES[self.mode]}"

    def type_error(self, kind: pa.DataType) -> str | None:
        values = of_struct(plain_type(kind))
        if values in (pa.null(), *BYTES) or pa.types.is_fixed_size_binary(values):
            return None
        depth = 0
        while isinstance(values, LISTS):
            values, depth = values.value_type, depth + 1
        if 1 <= depth <= len(self.shape) and pa.types.is_integer(values):
            return tensor_error(kind, self.shape)
        size = self.row_bytes
        known = f"lists of {size} integers, {size} bytes, PNG or JPEG bytes, {{bytes, path}}"
        return f"has type {kind}, which holds no images ({known})"

    def decode(self, column: ArrowColumn, name: str) -> tuple[Array, Reasons]:
        column = bytes_or_lists(column)
        if not column.null_count:
            with suppress(pa.ArrowException):
                is_list = isinstance(column.type, LISTS)
                pixels = self._decode_lists(column) if is_list else self._decode_bytes(column)
                if pixels is not None:
                    return pixels, {}
        # The slow way, value by value: some are pictures, or no images.
        images = self.zeros(len(column))
        reasons = each_value(column, name, lambda row, value: self._decode_one(images, row, value))
        return images, reasons

    def view(self, column: pa.FixedSizeBinaryArray) -> Array:
        """Return values of `row_bytes` bytes, none of them null, without a copy."""
        size = self.row_bytes
        flat = np.frombuffer(column.buffers()[1] or b"", np.uint8)
        start = column.offset * size
        return flat[start : start + len(column) * size].reshape(len(column), *self.shape)

    def _decode_bytes(self, column: pa.Array) -> Array | None:
        """Return values of raw bytes, else an ArrowException; None if some may be PNG or JPEG."""
        pixels = self.view(column.cast(pa.binary(self.row_bytes)))
        rows = pixels.reshape(len(pixels), self.row_bytes)
        for start in _FIRST_BYTES.values():
            if (
                len(start) <= self.row_bytes
                and (rows[:, : len(start)] == np.frombuffer(start, np.uint8)).all(axis=1).any()
            ):
                return None
        return pixels

    def _decode_lists(self, column: pa.Array) -> Array | None:
        """Return values of lists of integers, else an ArrowException; None if one is null."""
        is_nested = isinstance(column.type.value_type, LISTS)
        kind: Any = pa.uint8()
        for length in reversed(self.shape if is_nested else (self.row_bytes,)):
            kind = pa.list_(kind, length)
        values = column.cast(kind).flatten(recursive=True)  # leaves null lists out
        if values.null_count or len(values) != len(column) * self.row_bytes:
            return None
        pixels: Array = values.to_numpy(zero_copy_only=False)
        return pixels.reshape(len(column), *self.shape)

    def _decode_one(self, images: Array, row: int, value: list[Any] | bytes) -> None:
        size = self.row_bytes
        starts = tuple(_FIRST_BYTES.values())
        # The JPEG of one in 200 small images has exactly as many bytes as there are pixels.
        if isinstance(value, bytes) and (len(value) != size or value.startswith(starts)):
            images[row] = self._decode_picture(value)
            return
        try:
            pixels = np.array(list(value), np.uint8)
        except (TypeError, ValueError, OverflowError):  # null; lists of unlike lengths; 256
            pixels = np.empty(0, np.uint8)
        if pixels.shape not in ((size,), self.shape):
            form = f"not {size} or {' x '.join(map(str, self.shape))} integers in 0..255"
            raise UnusablePictureError(f"the image is {form}; resize or scale it")
        images[row] = pixels.reshape(self.shape)

    def _decode_picture(self, data: bytes) -> Array:
        with open_picture(data, f"neither {self.row_bytes} pixels nor a readable") as opened:
            picture = upright(opened)
            if picture.size == (self.width, self.height) and picture.mode == self.mode:
                return np.asarray(picture)
            form = f"{picture.width} x {picture.height} pixels of mode {picture.mode}"
            wanted = f"not {self.width} x {self.height} of {self.mode} ({_MODES[self.mode]})"
            raise UnusablePictureError(f"the picture has {form}, {wanted}; convert it")


@contextmanager
def open_picture(data: bytes, problem: str) -> Iterator[Image.Image]:
    """Yield an open PNG or JPEG. If the block fails, raise UnusablePictureError with `problem`."""
    try:
        # Pillow reads only the header until pixels are asked for: a bomb is never unpacked.
        with Image.open(io.BytesIO(data), formats=[*_FIRST_BYTES]) as picture:
            yield picture
    except UnusablePictureError:
        raise
    except Exception as error:  # on damaged bytes Pillow's decoders raise many types
        said = f"{len(data)} bytes are {problem} PNG or JPEG ({type(error).__name__})"
        raise UnusablePictureError(f"{said}; save it again") from None


def upright(picture: Image.Image) -> Image.Image:
    """Return a picture as viewers show it, where its EXIF or XMP data say that it is turned."""
    may_be_turned = {"exif", "xmp", "XML:com.adobe.xmp"} & picture.info.keys()
    return ImageOps.exif_transpose(picture) if may_be_turned else picture


def of_struct(kind: pa.DataType) -> pa.DataType:
    """Return the type of `bytes` in Hugging Face's struct; of another type itself."""
    is_struct = pa.types.is_struct(kind) and "bytes" in kind.names
    return kind.field("bytes").type if is_struct else kind


def bytes_or_lists(column: ArrowColumn) -> pa.Array:
    """Return a column as one array of lists or bytes."""
    column = plain(column)
    if pa.types.is_struct(column.type):
        column = pc.struct_field(column, "bytes")
    return column.cast(pa.binary()) if column.type in BYTES else column


def each_value(column: pa.Array, name: str, take: Callable[[int, Any], None]) -> Reasons:
    """Call `take` with the index of each row and its value; the reasons for rows it refuses."""
    reasons: Reasons = {}
    for row, value in enumerate(column):
        if not value.is_valid:
            reasons[row] = f"the {name} {NULL}"
            continue
        try:
            take(row, value.as_py())
        except UnusablePictureError as error:
            reasons[row] = str(error)
    return reasons
