"""One picture of a handwritten digit, of any size and colours, prepared as MNIST's own were (LeCun et al. 1998).

The ink is cropped, scaled to fit 20 x 20 pixels with its proportions, and shifted until its centre of mass is the centre of
28 x 28. It is found by its distance from the background in colour, so that dark ink on light, light on dark and red on green are
alike. The background is one colour or, in a photo, which is lit unevenly, a smooth surface.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter, ImageOps, UnidentifiedImageError

from mnistsum_ray.data.images import SIDE, Pixels
from mnistsum_ray.errors import MissingFileError, RequestError, StorageError, one_line
from mnistsum_ray.storage.paths import locate_existing

Floats = npt.NDArray[np.floating[Any]]

_FORMATS: Final = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Formats that are only pixels: for EPS, Pillow would run another program."""

_WORKING_SIDE: Final = 1024
"""Larger pictures are scaled down to so many pixels first."""

_NOISY_SIDE: Final = 100
"""Pictures of so many pixels a side are smoothed."""

_BOX: Final = 20
"""MNIST's digits fit into so many pixels, and are centred by their mass."""

_MIN_CONTRAST: Final = 16
"""Distance in 0..255 of ink from its background, below which a picture is blank."""

_MIN_CLARITY: Final = 4
"""The same in standard deviations of the background's noise."""

_SURROUNDING_SIDE: Final = 64
_SURROUNDING: Final = 31
"""The background of a photo is the median of so many of _SURROUNDING_SIDE parts of it, in height and width."""

_EDGE: Final = 60
"""Ink of 0..255 that counts as drawn, where the drawing ends."""

_MIN_PART: Final = 0.04
"""Share of the ink in a connected part, below which it is a speck."""

_MIN_INNER: Final = 0.15
"""Share of the ink in parts that do not touch the edge of the picture, above which the others are left out."""

_MIN_STROKE: Final = 1.7
"""Strokes that are thinner, in pixels of the box, are widened. Those of the sample are 1.95 wide (median)."""

_DETAIL: Final = 8
"""Strokes are measured and widened at so many times the size of the box."""


@dataclass(frozen=True)
class PreparedPicture:
    """A picture as the network takes it."""

    pixels: Pixels
    """uint8[28, 28], 0 background, 255 ink."""
    how: str
    """What was done to it, in words."""


def prepare_picture(picture: str | Path | Image.Image) -> PreparedPicture:
    """Read a picture (a file, a URI, or a picture of Pillow's) and prepare it for the network.

    28 x 28 light ink on black is taken as it is.

    Raises:
        RequestError: there is no such file, it is no picture, or nothing is drawn on it.
    """
    name, opened = ("the picture", picture) if isinstance(picture, Image.Image) else _open(str(picture))
    try:
        image = ImageOps.exif_transpose(opened)
        colours, transparent = _colours(image)
    except Exception as error:  # Pillow's decoders raise many types
        raise RequestError(f"{name}: cannot be read as a picture ({one_line(error)}); save it again") from None
    grey = bool((np.ptp(colours, axis=2) < 8).all())
    what = f"{image.width}x{image.height} {'grayscale' if grey else 'colour'}{', transparent' if transparent else ''}"
    if image.size == (SIDE, SIDE) and grey and not transparent and _is_like_mnist(colours[..., 0]):
        return PreparedPicture(np.rint(colours[..., 0]).astype(np.uint8), f"{what}, light ink on black: used as it is")

    ink, dark = _find_ink(colours, name)
    scale = image.height / ink.shape[0]
    cropped = _crop(ink)
    if not cropped.size:
        raise RequestError(f"{name}: is full of specks, and there is no digit among them")
    drawn, widened = _fit(Image.fromarray(cropped))
    steps = [
        *(["inverted"] if dark else []),
        f"cropped to {round(scale * cropped.shape[1])}x{round(scale * cropped.shape[0])}",
        *(["thin strokes widened"] if widened else []),
        f"scaled to {drawn.width}x{drawn.height}, centred in {SIDE}x{SIDE}",
    ]
    order = "dark ink on light" if dark else "light ink on dark"
    return PreparedPicture(_centre(np.asarray(drawn)), f"{what}, {order}: {', '.join(steps)}")


def _open(text: str) -> tuple[str, Image.Image]:
    """The name of a file or URI, and the picture in it, whose pixels are not decoded yet."""
    place = locate_existing(text, "picture")
    try:
        if place.is_local and not Path(place.path).is_file():  # to read a pipe would wait for ever
            raise MissingFileError
        data = place.read_bytes()
        return place.display, Image.open(io.BytesIO(data), formats=_FORMATS)
    except MissingFileError:
        raise RequestError(f"{place.display}: there is no such file; a pipe, a device or a folder is none") from None
    except StorageError as error:
        raise RequestError(str(error)) from None
    except UnidentifiedImageError:
        raise RequestError(
            f"{place.display}: is no picture of a known format ({', '.join(_FORMATS)}); convert it to PNG"
        ) from None
    except Exception as error:  # Pillow raises many types, also before it decodes pixels
        raise RequestError(f"{place.display}: cannot be read ({one_line(error)})") from None


def _colours(image: Image.Image) -> tuple[Floats, bool]:
    """Colours float32[height, width, 3] in 0..255, of at most _WORKING_SIDE pixels; and whether parts of it are transparent."""
    if image.mode.startswith("I") or image.mode == "F":  # more than 8 bits: by its own range
        values = np.asarray(image, np.float32)
        values = (values - values.min()) * (255 / max(float(np.ptp(values)), 1.0))
        image = Image.fromarray(values.astype(np.uint8))
    image = image.convert("RGBA")
    image.thumbnail((_WORKING_SIDE, _WORKING_SIDE))
    pixels = np.asarray(image, np.float32)
    colours, alpha = pixels[..., :3], pixels[..., 3:] / 255
    if alpha.min() > 0.98:
        return colours, False
    visible = colours[alpha[..., 0] > 0.5]
    if not len(visible):
        return np.zeros_like(colours), True
    middle = np.median(visible, 0)
    # Ink alone has one colour, and gets a background unlike it. A card with ink on it goes on in its own colour.
    ink_alone = np.percentile(np.abs(visible - middle).max(1), 98) < 64
    background = (0.0 if middle.mean() > 127 else 255.0) if ink_alone else middle
    return colours * alpha + background * (1 - alpha), True


def _is_like_mnist(grey: Floats) -> bool:
    border = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    return bool(np.median(border) <= 8 and grey.max() >= 200 and np.median(grey) <= 8)


def _find_ink(colours: Floats, name: str) -> tuple[Pixels, bool]:
    """Where the ink is, uint8[height, width], 255 for ink; and whether it is darker than its background.

    Of two guesses at the background, that one counts from which the ink stands out most clearly.

    Raises:
        RequestError: nothing is drawn on the picture.
    """
    found = max((_Ink(colours - background) for background in _backgrounds(colours)), key=lambda ink: ink.clarity)
    if found.contrast < _MIN_CONTRAST or found.clarity < _MIN_CLARITY:
        raise RequestError(f"{name}: nothing is drawn on it, or with too little contrast")
    return found.pixels(), found.dark


class _Ink:
    """What differs from a background."""

    def __init__(self, difference: Floats) -> None:
        """Take the picture less its background, float[height, width, 3]."""
        picture = Image.fromarray(np.abs(difference).max(2).clip(0, 255).astype(np.uint8))
        noisy = np.median(np.asarray(picture)) > 0
        if noisy and min(picture.size) >= _NOISY_SIDE:  # noise is of single pixels, and a stroke is wider there
            picture = picture.filter(ImageFilter.MedianFilter(3))
        self._distance = np.asarray(picture, np.float32)
        self._threshold = _otsu(self._distance)
        ink = self._distance > self._threshold
        self._noise = 1.4826 * float(np.median(self._distance[~ink]))
        self.contrast = float(np.median(self._distance[ink])) if ink.any() else 0.0
        self.clarity = self.contrast / (self._noise + 2)
        self.dark = bool(difference.mean(2)[ink].sum() < 0)

    def pixels(self) -> Pixels:
        """0 up to the noise, 255 from nearly the usual distance of ink on."""
        low = max(min(3 * self._noise, self._threshold), self.contrast / 4)
        scaled: Pixels = (255 * ((self._distance - low) / (0.9 * self.contrast - low)).clip(0, 1)).astype(np.uint8)
        return scaled


def _backgrounds(colours: Floats) -> Iterator[Floats]:
    """Guesses: the most frequent colour of the edge, for a drawing; for a photo, the median of a wide surrounding."""
    edge = np.concatenate([colours[0], colours[-1], colours[:, 0], colours[:, -1]])
    kinds, counts = np.unique(edge // 16, axis=0, return_counts=True)
    yield np.median(edge[(edge // 16 == kinds[counts.argmax()]).all(1)], 0)

    height, width = colours.shape[:2]
    small = Image.fromarray(colours.astype(np.uint8)).resize((_SURROUNDING_SIDE, _SURROUNDING_SIDE), Image.Resampling.BOX)
    middle = small.filter(ImageFilter.MedianFilter(_SURROUNDING))
    yield np.asarray(middle.resize((width, height), Image.Resampling.BILINEAR), np.float32)


def _otsu(values: Floats) -> float:
    """The threshold that separates values of 0..255 into the two classes with the largest variance between them (Otsu 1979)."""
    counts = np.bincount(values.astype(np.uint8).ravel(), minlength=256).astype(float)
    below, sums = counts.cumsum(), (counts * np.arange(256)).cumsum()
    with np.errstate(divide="ignore", invalid="ignore"):
        between = (sums[-1] * below - sums * below[-1]) ** 2 / (below * (below[-1] - below))
    return float(np.nanargmax(np.where(np.isfinite(between), between, -1)))


def _crop(ink: Pixels) -> Pixels:
    """The part of the picture that has ink, without specks; of size 0 where there are only specks."""
    step = max(1, max(ink.shape) // 128)
    padded = np.pad(ink > _EDGE, [(0, -size % step) for size in ink.shape])
    blocks = padded.reshape(padded.shape[0] // step, step, padded.shape[1] // step, step)
    sums = blocks.sum((1, 3))
    # The fill joins four neighbours; a thin diagonal has gaps.
    joined = Image.fromarray(np.where(sums, 255, 0).astype(np.uint8)).filter(ImageFilter.MaxFilter(3))
    parts = joined.convert("I")
    part = 255  # each connected part gets a number above it
    while len(left := np.argwhere(np.asarray(parts) == 255)):
        part += 1
        ImageDraw.floodfill(parts, (int(left[0][1]), int(left[0][0])), part)
    labels = np.asarray(parts)
    sizes = {label: sums[labels == label].sum() for label in range(256, part + 1)}
    margin = max(1, max(labels.shape) // 32)
    edge = labels.copy()
    edge[margin:-margin, margin:-margin] = 0
    inner = {label: size for label, size in sizes.items() if label not in edge}
    if sum(inner.values()) >= _MIN_INNER * sums.sum():  # what touches the edge is then a shadow, or the end of the paper
        sizes = inner
    kept = np.isin(labels, [label for label, size in sizes.items() if size >= _MIN_PART * sum(sizes.values())])
    ink = np.where(np.repeat(np.repeat(kept, step, 0), step, 1)[: ink.shape[0], : ink.shape[1]], ink, np.uint8(0))
    rows, columns = (np.flatnonzero((ink > _EDGE).any(axis)) for axis in (1, 0))
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] if len(rows) else ink[:0]


def _fit(ink: Image.Image) -> tuple[Image.Image, bool]:
    """The ink scaled to fit into the box with its proportions; and whether its strokes were widened."""

    def scaled(image: Image.Image, side: int) -> Image.Image:
        size = [max(1, round(length * side / max(image.size))) for length in image.size]
        return image.resize((size[0], size[1]), Image.Resampling.BILINEAR)

    large = scaled(ink, _DETAIL * _BOX)
    full = 255 / np.asarray(large).max()  # thin strokes have become faint
    large = large.point(lambda value: round(value * full))
    mask = np.asarray(large) > 127
    edges = sum(np.abs(np.diff(np.pad(mask, 1).astype(int), axis=axis)).sum() for axis in (0, 1))
    width = 2 * mask.sum() / max(edges, 1) / _DETAIL
    grow = max(0, round(_DETAIL * (_MIN_STROKE - width) / 2))
    if grow:
        wide = ImageOps.expand(large, grow).filter(ImageFilter.MaxFilter(2 * grow + 1))
        large = wide.crop(wide.getbbox())
    return scaled(large, _BOX), grow > 0


def _centre(drawn: Pixels) -> Pixels:
    """The drawing on 28 x 28 with its centre of mass in the middle, as far as the drawing fits."""
    pixels = np.zeros((SIDE, SIDE), np.uint8)
    weight = drawn.astype(float)
    corner = []
    for axis, size in enumerate(drawn.shape):
        mass = weight.sum(1 - axis)
        corner.append(int(np.clip(round(SIDE / 2 - (mass @ np.arange(size)) / mass.sum()), 0, SIDE - size)))
    pixels[corner[0] : corner[0] + drawn.shape[0], corner[1] : corner[1] + drawn.shape[1]] = drawn
    return pixels
