"""One picture of a handwritten digit, of any size, prepared as MNIST's own were (LeCun et al. 1998).

The ink is what differs in brightness from the background, which is that of most of the edge: dark ink on light is inverted. It is
cropped, scaled to fit 20 x 20 pixels with its proportions, and shifted until its centre of mass is the centre of 28 x 28. What
cannot be one digit on a background of one brightness is refused; what may not be is prepared, with the doubts that it is.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageOps, UnidentifiedImageError

from mnistsum_ray.data.images import SIDE, Pixels
from mnistsum_ray.errors import MissingFileError, RequestError, StorageError, one_line
from mnistsum_ray.storage.paths import locate_existing

Floats = npt.NDArray[np.floating[Any]]

_FORMATS: Final = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Formats that are only pixels: for EPS, Pillow would run another program."""

_WORKING_SIDE: Final = 1024
"""Larger pictures are scaled down to so many pixels first."""

_BOX: Final = 20
"""MNIST's digits fit into so many pixels, and are centred by their mass."""

_MIN_CONTRAST: Final = 16
"""Distance in 0..255 of ink from its background, below which a picture is blank."""

_MAX_PIECES: Final = 3
"""Connected pieces of a digit whose strokes do not meet."""

_MAX_ASPECT: Final = 1.2
"""Width of a digit in heights; 3.5 % of MNIST's are wider."""

_LINE_SHARE: Final = 0.1
_FRAME_SHARE: Final = 0.7
"""Greatest height at both sides of a line across, and least of a frame: 1 and 0 of 400 digits of MNIST have them."""

_MOST_SPECKS: Final = 32

_MIN_PIECE: Final = 0.04
"""Share of the ink in a piece, below which it is a speck."""

_EDGE: Final = 60
"""Ink of 0..255 that counts as drawn, where the drawing ends."""

_MIN_STROKE: Final = 1.7
"""Strokes that are thinner, in pixels of the box, are widened. Those of the sample are 1.95 wide (median)."""

_DETAIL: Final = 8
"""Strokes are measured and widened at so many times the size of the box."""


@dataclass(frozen=True)
class PreparedPicture:
    """A picture as the network takes it."""

    pixels: Pixels
    """uint8[28, 28]"""
    how: str
    """What was done to it, in words."""
    doubts: Sequence[str] = ()
    """Why it may not be one whole digit, in words."""


def prepare_picture(picture: str | Path | Image.Image, background: int = 0, *, prepare: bool = True) -> PreparedPicture:
    """Read a picture (a file, a URI, or a picture of Pillow's) and prepare it for training images of this background, 0 or 255.

    28 x 28 pixels of a digit that is centred and as large as MNIST's are inverted at most; without `prepare` all 28 x 28 pixels
    are taken as they are.

    Raises:
        RequestError: there is no such file, it is no picture, it is not to be prepared and not 28 x 28, or what is drawn on it is
            not one digit that stands out.
    """
    name, data = ("the picture", b"") if isinstance(picture, Image.Image) else _read(str(picture))
    try:
        opened = picture if isinstance(picture, Image.Image) else Image.open(io.BytesIO(data), formats=_FORMATS)
        image = ImageOps.exif_transpose(opened)
        grey, kind = _brightness(image)
    except UnidentifiedImageError:
        raise RequestError(f"{name}: is no picture of a known format ({', '.join(_FORMATS)}); convert it to PNG") from None
    except Exception as error:  # Pillow's decoders raise many types
        raise RequestError(f"{name}: cannot be read as a picture ({one_line(error)}); save it again") from None
    what, paper = f"{image.width}x{image.height} {kind}", background_of(grey)
    if not prepare and image.size != (SIDE, SIDE):
        raise RequestError(f"{name}: is {what}, not {SIDE}x{SIDE}; scale it, or have it prepared")
    if not prepare or (image.size == (SIDE, SIDE) and kind == "grayscale" and _is_like_mnist(np.abs(grey - paper))):
        inverted = prepare and paper != background
        pixels = np.abs(grey - 255 * inverted).astype(np.uint8)
        return PreparedPicture(pixels, f"{what}, {'inverted' if inverted else 'used as it is'}")

    ink, dark = _find_ink(grey, name)
    cropped, doubts = _one_digit(ink, name)
    scale = image.height / ink.height
    drawn, widened = _fit(cropped)
    order = ("dark ink on light" if dark else "light ink on dark") + (": inverted," if dark == (background == 0) else ":")
    crop = f"cropped to {round(scale * cropped.width)}x{round(scale * cropped.height)}"
    strokes = "thin strokes widened, " if widened else ""
    how = f"{what}, {order} {crop}, {strokes}scaled to {drawn.width}x{drawn.height}, centred in {SIDE}x{SIDE}"
    return PreparedPicture(np.abs(background - _centre(np.asarray(drawn)).astype(int)).astype(np.uint8), how, doubts)


def _read(text: str) -> tuple[str, bytes]:
    """The name of a file or URI, and its bytes."""
    place = locate_existing(text, "picture")
    try:
        if place.is_local and not Path(place.path).is_file():  # to read a pipe would wait for ever
            raise MissingFileError
        return place.display, place.read_bytes()
    except MissingFileError:
        raise RequestError(f"{place.display}: there is no such file; a pipe, a device or a folder is none") from None
    except StorageError as error:
        raise RequestError(str(error)) from None


def _brightness(image: Image.Image) -> tuple[Floats, str]:
    """Brightness float32[height, width] in 0..255, of at most _WORKING_SIDE pixels; and what kind of picture it is, in words."""
    if image.mode.startswith("I;16"):  # a scan; Pillow would clip it at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    image = image.convert("RGBA")
    image.thumbnail((_WORKING_SIDE, _WORKING_SIDE))
    kind = "grayscale" if (np.ptp(np.asarray(image)[..., :3], axis=2) < 8).all() else "colour"
    grey, alpha = np.moveaxis(np.asarray(image.convert("LA"), np.float32), 2, 0)
    if alpha.min() > 250:
        return grey, kind
    alpha /= 255
    is_light = (grey * alpha).sum() > 127 * alpha.sum()  # ink, which gets a background unlike it
    return grey * alpha + (0 if is_light else 255) * (1 - alpha), f"{kind}, transparent"


def _is_like_mnist(ink: Floats) -> bool:
    """Whether ink on 28 x 28, 0 for none, fills MNIST's box and has its centre of mass in the middle, as all of MNIST's have."""
    left, top, right, bottom = Image.fromarray(ink > _EDGE / 2).getbbox() or (0, 0, 0, 0)
    if np.median(_border(ink)) > 8 or ink.max() < 200 or abs(max(right - left, bottom - top) - _BOX) > 1:
        return False
    return all(abs(np.average(places, weights=ink) - SIDE / 2) <= 1 for places in np.indices(ink.shape))


def background_of(images: npt.NDArray[Any]) -> int:
    """The brightness of most of the edge of images [..., height, width], rounded to 0 or 255; of none 0, as MNIST's is."""
    return 255 if images.size and np.median(_border(images)) > 127 else 0


def _border(images: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.concatenate([images[..., 0, :], images[..., -1, :], images[..., 0], images[..., -1]], axis=-1)


def _find_ink(grey: Floats, name: str) -> tuple[Image.Image, bool]:
    """Where the ink is, 255 for ink; and whether it is darker than its background."""
    difference = grey - np.median(_border(grey))
    distance = np.abs(difference)
    drawn = distance > distance.max() / 2
    contrast = float(np.median(distance[drawn])) if drawn.any() else 0.0
    if contrast < _MIN_CONTRAST:
        raise RequestError(f"{name}: nothing is drawn on it, or with too little contrast")
    low, high = contrast / 4, 0.9 * contrast  # lines of the paper are fainter, and strokes are not all of one strength
    scaled = (255 * ((distance - low) / (high - low)).clip(0, 1)).astype(np.uint8)
    return Image.fromarray(scaled), bool(difference[drawn].sum() < 0)


def _one_digit(ink: Image.Image, name: str) -> tuple[Image.Image, list[str]]:
    """The picture without specks, cropped to its ink, which must be able to be one digit; and the doubts that it is one."""
    # The fill joins four neighbours, and a thin diagonal has gaps.
    small = ink.point(lambda value: 255 * (value > _EDGE)).resize((128, 128), Image.Resampling.BOX)
    labelled = small.point(lambda value: 255 * (value > 0)).filter(ImageFilter.MaxFilter(3))
    count = 0
    while count <= _MOST_SPECKS and len(left := np.argwhere(np.asarray(labelled) == 255)):
        count += 1  # each connected piece gets a number
        ImageDraw.floodfill(labelled, (int(left[0][1]), int(left[0][0])), count)
    labels = np.asarray(labelled)
    sizes = np.bincount(labels.ravel())
    kept = [piece for piece in range(1, count + 1) if sizes[piece] >= _MIN_PIECE * sizes[1:].sum()]
    drawn = Image.fromarray(np.isin(labels, kept))
    framed = any(Image.fromarray(labels == piece).getbbox() == drawn.getbbox() for piece in kept)
    edge = np.isin(_border(labels), kept)
    many = len(kept) > 1
    if count > _MOST_SPECKS or not 0 < len(kept) <= _MAX_PIECES or (many and (framed or edge.any())) or edge.mean() > 0.5:
        raise RequestError(f"{name}: is not one digit on a background of one brightness; crop it to that, or draw it anew")
    ink.paste(0, mask=ImageChops.invert(drawn.convert("L")).resize(ink.size))
    cropped = ink.crop(ink.point(lambda value: 255 * (value > _EDGE)).getbbox())
    columns = sorted(np.flatnonzero((labels == piece).any(0))[[0, -1]].tolist() for piece in kept)
    doubts = {
        "the ink touches the edge of the picture": edge.any(),
        "there are two digits, or a line beside one": any(left[1] < right[0] for left, right in pairwise(columns)),
        "there is a line across the digit, or a frame": _has_line(np.isin(labels, kept)),
        "it is wider than most digits": cropped.width > _MAX_ASPECT * cropped.height,
    }
    return cropped, [doubt for doubt, holds in doubts.items() if holds]


def _has_line(drawn: npt.NDArray[np.bool_]) -> bool:
    """Whether a straight line spans what is drawn, so that it alone is at the left and the right; or lines are along both."""
    drawn = drawn[np.ix_(drawn.any(1), drawn.any(0))]
    height, width = drawn.shape
    side = max(1, width // 24)
    left, right = (np.flatnonzero(band.any(1)) for band in (drawn[:, :side], drawn[:, -side:]))
    first, last = min(left[0], right[0]), max(left[-1], right[-1])
    is_line = last - first < _LINE_SHARE * height and drawn[first : last + 1].any(0).all()
    return bool(width > height / 2 and (is_line or min(len(left), len(right)) > _FRAME_SHARE * height))


def _fit(ink: Image.Image) -> tuple[Image.Image, bool]:
    """The ink scaled to fit into the box with its proportions; and whether its strokes were widened."""
    large = ImageOps.contain(ImageOps.autocontrast(ink), (_DETAIL * _BOX, _DETAIL * _BOX), Image.Resampling.BILINEAR)
    large = ImageOps.autocontrast(large)  # thin strokes have become faint
    mask = np.pad(np.asarray(large) > 127, 1)
    edges = sum(np.count_nonzero(np.diff(mask, axis=axis)) for axis in (0, 1))
    grow = max(0, round((_DETAIL * _MIN_STROKE - 2 * mask.sum() / max(edges, 1)) / 2))
    if grow:
        large = ImageOps.expand(large, grow).filter(ImageFilter.MaxFilter(2 * grow + 1))
    return ImageOps.contain(large, (_BOX, _BOX), Image.Resampling.BILINEAR), grow > 0


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
