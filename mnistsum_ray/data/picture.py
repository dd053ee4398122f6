"""A picture of a handwritten digit, prepared as MNIST's own images were (LeCun et al. 1998)."""

import io
import warnings
from pathlib import Path
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from mnistsum_ray.data.images import SIDE, Pixels
from mnistsum_ray.errors import RequestError, StorageError
from mnistsum_ray.storage.uri import locate_existing

Picture: TypeAlias = str | Path | bytes | Image.Image
"""A file, a URI, the bytes of a file, or a picture of Pillow's."""

_FORMATS: Final = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Formats that are only pixels: for EPS, Pillow would run another program."""

_MAX_PIXELS: Final = 50_000_000
"""Larger pictures are refused: a file of a few bytes may unfold to any number of pixels."""

_WORKING_SIDE: Final = 1024
"""Larger pictures are scaled down to so many pixels first."""

_BOX: Final = 20
"""MNIST's digits fit into so many pixels, and are centred by their mass."""

_MIN_CONTRAST: Final = 16
"""Distance in 0..255 of ink from the edge, below which a picture is empty."""

_FAINT: Final = 0.25
"""Ink below this share of the strongest is grain, and becomes 0; above 1 - this share it is 1."""


def prepare_picture(picture: Picture) -> Pixels:
    """Prepare a picture as MNIST's images were, white on black: uint8[28, 28].

    Ink is what is darker or lighter than the edge. It is scaled to fit 20 x 20 pixels, and centred
    by its mass.

    Raises:
        RequestError: there is no such file, it is no picture, or nothing is drawn on it.
    """
    name, grey = _read_grey(picture)
    edge = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    ink = np.abs(grey - np.median(edge))
    strongest = ink.max()
    if strongest < _MIN_CONTRAST:
        nothing = "nothing is drawn on it that is darker or lighter than its edge"
        raise RequestError(f"{name}: {nothing}")
    ink = ((ink / strongest - _FAINT) / (1 - 2 * _FAINT)).clip(0, 1)
    drawn = Image.fromarray(ink)
    drawn = drawn.crop(drawn.getbbox())
    scale = _BOX / max(drawn.size)
    width = max(1, round(scale * drawn.width))  # a line may be thinner than a pixel
    height = max(1, round(scale * drawn.height))
    digit = np.asarray(drawn.resize((width, height), Image.Resampling.BICUBIC)).clip(0)
    digit *= 255 / digit.max()  # thin strokes have become faint
    mass_of_rows = digit.sum(axis=1)
    mass_of_columns = digit.sum(axis=0)
    top = _start_when_centred(mass_of_rows)
    left = _start_when_centred(mass_of_columns)
    pixels = np.zeros((SIDE, SIDE), np.uint8)
    pixels[top : top + height, left : left + width] = digit.round()
    return pixels


def _read_grey(picture: Picture) -> tuple[str, npt.NDArray[np.float32]]:
    """The name of a picture in messages, and its brightness, float32[height, width] in 0..255."""
    name = "the picture"
    try:
        if isinstance(picture, str | Path):
            file = locate_existing(str(picture), "picture")
            name, picture = file.display, file.read_bytes()
        if isinstance(picture, bytes):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                picture = Image.open(io.BytesIO(picture), formats=_FORMATS)
        picture.draft("RGB", (_WORKING_SIDE, _WORKING_SIDE))  # a large JPEG is decoded smaller
        size = picture.width * picture.height  # known from the header
        if size > _MAX_PIXELS:
            raise RequestError(f"{name}: has {size:,} pixels; scale it down to {_MAX_PIXELS:,}")
        image = ImageOps.exif_transpose(picture).convert("RGBA")
    except (RequestError, StorageError) as error:
        raise RequestError(str(error)) from None
    except Exception:  # Pillow's decoders raise many types
        raise RequestError(f"{name}: cannot be read as a picture; save it as PNG") from None
    image.thumbnail((_WORKING_SIDE, _WORKING_SIDE))
    white = Image.new("RGBA", image.size, "white")
    return name, np.asarray(Image.alpha_composite(white, image).convert("L"), np.float32)


def _start_when_centred(mass: npt.NDArray[np.float32]) -> int:
    """Where a digit with this mass by row or column begins, so that its centre is in the middle."""
    centre = np.average(np.arange(len(mass)), weights=mass)
    return int(np.clip(round(SIDE / 2 - centre), 0, SIDE - len(mass)))
