"""Photos: encoded pictures of any size."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyarrow as pa
from PIL import Image

from mnistsum_ray.data.columns.base import Array, ArrowColumn, Reasons, plain_type
from mnistsum_ray.data.columns.images import (
    BYTES,
    MOST_PIXELS,
    Pictures,
    bytes_or_lists,
    each_value,
    of_struct,
    open_picture,
    upright,
)


@dataclass(frozen=True)
class Photos(Pictures):
    """PNG or JPEG files of any size, stretched to uint8[n, side, side, 3] in a batch.

    Each is decoded when it is read, to check it, but stays encoded in the object store, and is
    decoded again for each batch: 20,000 photos of 224 x 224 pixels are 3 GB, and encoded 0.4 GB.
    They look as in a viewer: turned by EXIF, 16 bits scaled to 8, on white where transparent.
    """

    side: int

    stays_encoded: ClassVar[bool] = True

    def problem(self) -> str | None:
        is_right = isinstance(self.side, int) and 1 <= self.side <= MOST_PIXELS
        return None if is_right else f"side is {self.side!r}, and must be in 1..{MOST_PIXELS:,}"

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.side, self.side, 3)

    @property
    def form(self) -> str:
        return "PNG or JPEG files of any size"

    def type_error(self, kind: pa.DataType) -> str | None:
        is_known = of_struct(plain_type(kind)) in (pa.null(), *BYTES)
        return None if is_known else f"has type {kind}, which holds no PNG or JPEG bytes"

    def decode(self, column: ArrowColumn, name: str) -> tuple[Array, Reasons]:
        """Check each file; returns an array of bytes, which are empty for a rejected row."""
        column = bytes_or_lists(column)
        stored = self.zeros(len(column))

        def check(row: int, value: bytes) -> None:
            self._load_one(value)
            stored[row] = value

        return stored, each_value(column, name, check)

    def _load_one(self, data: bytes) -> Array:
        with open_picture(data, "no readable") as picture:
            picture.draft("RGB", (self.side, self.side))  # a JPEG is decoded to a smaller size
            return np.asarray(_rgb(upright(picture)).resize((self.side, self.side)))

    def read(self, column: ArrowColumn, name: str) -> tuple[Array, Reasons]:
        column = bytes_or_lists(column)
        pixels = np.zeros((len(column), *self.shape), np.uint8)

        def take(row: int, value: bytes) -> None:
            pixels[row] = self._load_one(value)

        return pixels, each_value(column, name, take)

    def load(self, stored: Array) -> Array:
        pixels = np.zeros((len(stored), *self.shape), np.uint8)
        for row, data in enumerate(stored):
            if data:  # a rejected row has none
                pixels[row] = self._load_one(data)
        return pixels

    def zeros(self, rows: int) -> Array:
        return np.full(rows, b"", object)

    def to_arrow(self, values: Array) -> pa.Array:
        return pa.array(values, pa.binary())


def _rgb(picture: Image.Image) -> Image.Image:
    """Return a picture as viewers show it, in colours of 8 bits."""
    if picture.mode.startswith("I"):  # 16 bits, which Pillow would cut off at 255
        shades = np.asarray(picture).astype(np.uint32)
        return Image.fromarray(((shades * 255 + 32_767) // 65_535).astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        on_white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(on_white, picture.convert("RGBA")).convert("RGB")
    return picture.convert("RGB")
