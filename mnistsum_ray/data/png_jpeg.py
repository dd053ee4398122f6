"""Decode a PNG or JPEG of one MNIST image: 28x28, 8-bit grayscale."""

import io
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from mnistsum_ray.data.pixels import PIXELS, SIDE, Pixels

_FORMATS: Final = ("PNG", "JPEG")

_PNG_START: Final = np.frombuffer(b"\x89PNG\r\n\x1a\n", np.uint8)
_JPEG_START: Final = np.frombuffer(b"\xff\xd8\xff", np.uint8)
"""Followed by the next marker, a byte of 0xC0 or more."""

_EXIF_ORIENTATION: Final = 0x0112
"""EXIF tag: how the camera was held; 1 is upright."""


class ImageError(ValueError):
    """A row's image cannot be used; the message says what it is and what to do."""


def starts_as_png_or_jpeg(images: Pixels) -> npt.NDArray[np.bool_]:
    """Which of n rows of 784 bytes begin as a PNG or JPEG does, and so are not pixels: bool[n].

    A JPEG of exactly 784 bytes is not rare: at quality 95 about one in 200 MNIST images gives one.
    """
    start = images.reshape(len(images), PIXELS)[:, : len(_PNG_START)]
    jpeg = (start[:, : len(_JPEG_START)] == _JPEG_START).all(1) & (start[:, len(_JPEG_START)] >= 0xC0)
    found: npt.NDArray[np.bool_] = jpeg | (start == _PNG_START).all(1)
    return found


def decode_png_or_jpeg(data: bytes) -> Pixels:
    """Decode to uint8[28, 28], turned upright as its EXIF says.

    Raises:
        ImageError: the bytes are not a 28x28 grayscale PNG or JPEG.
    """
    try:
        # Pillow reads only the header until the size is known, so a decompression bomb is never unpacked.
        with Image.open(io.BytesIO(data), formats=_FORMATS) as picture:
            if picture.size != (SIDE, SIDE):
                raise ImageError(f"the picture is {picture.width} x {picture.height} pixels, not 28 x 28; resize it")
            if picture.mode != "L":
                raise ImageError(f"the picture has mode {picture.mode}, not L (8-bit grayscale); convert it")
            if picture.getexif().get(_EXIF_ORIENTATION, 1) == 1:
                return np.asarray(picture)
            upright: Pixels = np.asarray(ImageOps.exif_transpose(picture))
            return upright
    except ImageError:
        raise
    except Image.DecompressionBombError:
        raise ImageError("the picture claims to unpack to far more than 28 x 28 pixels; resize it") from None
    except Exception as error:  # on damaged bytes Pillow's decoders raise many types
        if len(data) == PIXELS:
            raise ImageError(
                f"784 bytes begin as a PNG or JPEG does, and cannot be read as one ({type(error).__name__}); save it again, or "
                "store the pixels as a list of 784 integers"
            ) from None
        raise ImageError(
            f"{len(data)} bytes are neither 784 pixels nor a readable PNG or JPEG ({type(error).__name__}); save it again"
        ) from None
