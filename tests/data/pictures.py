"""24 kinds of pictures of a digit, as people draw, photograph and scan them, each made from an image of MNIST."""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from mnistsum_ray.data.images import Pixels

_X, _Y = np.meshgrid(range(280), range(280))
_RULES = _Y % 70 // 5 == 7
_CHECKS = 0.6 * ((_X % 40 < 3) | (_Y % 40 < 3))
_BOX = np.abs(np.maximum(np.abs(_X - 140) - 88, np.abs(_Y - 140) - 114)) <= 3
_LINE = (np.abs(_Y - 232) < 5) & (np.abs(_X - 140) < 120)


def _placed(image: Image.Image, left: int, top: int, side: int = 20) -> Image.Image:
    """28 x 28 with what is drawn at a place, its longer side of so many pixels; -1 is at the right or at the bottom."""
    drawn = ImageOps.contain(image.crop(image.getbbox()), (side, side), Image.Resampling.BICUBIC)
    whole = Image.new("L", (28, 28))
    whole.paste(drawn, (left % (29 - drawn.width), top % (29 - drawn.height)))
    return whole


def _page(ink: Any, color: Any = (30, 30, 60), paper: Any = (245, 245, 240), light: Any = 1.0) -> Image.Image:
    """Ink [height, width] in 0..1 on paper, under a light of the same shape or everywhere alike."""
    page = (np.multiply.outer(ink, color) + np.multiply.outer(1 - ink, paper)) * np.asarray(light)[..., None]
    return Image.fromarray(page.astype(np.uint8))


def _two(ink: Any, apart: int) -> Image.Image:
    return _page(np.maximum(*(np.pad(ink, ((20, 20), (20 + left, 200 - left))) for left in (0, apart))))


def _filtered(ink: Any, *filters: ImageFilter.Filter) -> Any:
    return np.asarray(Image.fromarray((255 * ink).astype(np.uint8)).filter(*filters)) / 255


def _transparent(ink: Any) -> Image.Image:
    return Image.merge("LA", [Image.new("L", (280, 280), 40), Image.fromarray((255 * ink).astype(np.uint8))])


def _as_jpeg(page: Image.Image) -> Image.Image:
    file = io.BytesIO()
    page.save(file, "JPEG", quality=12)
    return Image.open(file)


Make = Callable[[Image.Image, Any, int], Image.Image]
"""Makes a picture of an image of MNIST, of the same as ink [280, 280] in 0..1, and of an index."""

KINDS: dict[str, Make] = {
    "28 x 28, as MNIST's": lambda image, ink, index: image,
    "28 x 28, in a corner": lambda image, ink, index: _placed(image, (1, -2)[index % 2], (1, -2)[index // 2 % 2]),
    "28 x 28, in a corner, touching": lambda image, ink, index: _placed(image, -(index % 2), -(index // 2 % 2)),
    "28 x 28, shifted": lambda image, ink, index: _placed(image, 2 + index % 4, 6 - index % 3),
    "28 x 28, small": lambda image, ink, index: _placed(image, 9, 9, 10),
    "28 x 28, filled": lambda image, ink, index: _placed(image, 0, 0, 28),
    "dark on white": lambda image, ink, index: _page(ink),
    "white on a blackboard": lambda image, ink, index: _page(ink, (250, 250, 240), (30, 70, 50)),
    "thin pen": lambda image, ink, index: _page(_filtered(ink > 0.6, ImageFilter.MinFilter(9))),
    "thick pen": lambda image, ink, index: _page(_filtered(ink, ImageFilter.MaxFilter(13))),
    "pencil": lambda image, ink, index: _page(ink, (205, 205, 205)),
    "uneven light": lambda image, ink, index: _page(ink, light=0.55 + 0.45 * _X / 280),
    "hard shadow across": lambda image, ink, index: _page(ink, light=np.where(_X + 0.3 * _Y > 174, 0.5, 1)),
    "hard shadow beside": lambda image, ink, index: _page(ink, light=np.where(_X > 243, 0.5, 1)),
    "ruled lines": lambda image, ink, index: _page(np.maximum(ink, _RULES)),
    "a line under it": lambda image, ink, index: _page(np.maximum(ink, _LINE)),
    "checked paper": lambda image, ink, index: _page(np.maximum(ink, _CHECKS)),
    "in a box": lambda image, ink, index: _page(np.maximum(ink, _BOX)),
    "two digits": lambda image, ink, index: _two(ink, 180),
    "two digits that touch": lambda image, ink, index: _two(ink, 130),
    "cut off": lambda image, ink, index: _page(ink[130 * (index % 2) :][:150]),
    "salt and pepper": lambda image, ink, index: _page(np.abs(ink - (np.random.default_rng(0).random(ink.shape) < 0.03))),
    "colours, JPEG": lambda image, ink, index: _as_jpeg(_page(ink, (20, 40, 160), (250, 230, 90))),
    "tilted, transparent": lambda image, ink, index: _transparent(ink).rotate(15),
}


def draw_kind(kind: str, image: Pixels, index: int) -> Image.Image:
    """Draw a picture of a kind; pictures of one kind differ by their index, too."""
    small = Image.fromarray(image)
    return KINDS[kind](small, np.asarray(small.resize((280, 280), Image.Resampling.BICUBIC)) / 255, index)
