"""24 kinds of pictures of a digit, as people draw, photograph and scan them, each made from an image of MNIST."""

import io
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from mnistsum_ray.data.images import Pixels
from mnistsum_ray.errors import RequestError
from mnistsum_ray.predicting import Model, predict

_NAVY = (30, 30, 60)
_Y, _X = np.mgrid[0:1:280j, 0:1:280j]


def _placed(image: Image.Image, left: int, top: int, side: int = 20) -> Image.Image:
    """28 x 28 with what is drawn at a place, its longer side of so many pixels. -1 is the last column or row, 27."""
    drawn = ImageOps.contain(image.crop(image.getbbox()), (side, side), Image.Resampling.BICUBIC)
    whole = Image.new("L", (28, 28))
    whole.paste(drawn, (left % (29 - drawn.width), top % (29 - drawn.height)))
    return whole


def _large(image: Image.Image) -> Image.Image:
    """The image in 280 x 280, with smooth strokes."""
    return image.resize((280, 280), Image.Resampling.BICUBIC)


def _on_paper(ink: Image.Image, color: tuple[int, ...] = _NAVY, paper: tuple[int, ...] = (245, 245, 240)) -> Image.Image:
    return Image.composite(Image.new("RGB", ink.size, color), Image.new("RGB", ink.size, paper), ink)


def _lit(image: Image.Image, light: Any) -> Image.Image:
    """Dark ink on paper under a light of float[280, 280], from a camera with noise."""
    noise = np.random.default_rng(0).normal(0, 3, (280, 280, 3))
    page = np.asarray(_on_paper(_large(image)), np.float32) * light[..., None] + noise
    return Image.fromarray(page.clip(0, 255).astype(np.uint8))


def _with_lines(image: Image.Image, lines: list[list[int]], width: int, color: tuple[int, ...] = _NAVY) -> Image.Image:
    page = _on_paper(_large(image))
    for line in lines:
        ImageDraw.Draw(page).line(line, fill=color, width=width)
    return page


def _two(image: Image.Image, apart: int) -> Image.Image:
    both = Image.new("L", (480, 320))
    for place in (20, 20 + apart):
        both.paste(255, (place, 20), _large(image))
    return _on_paper(both)


def _salted(image: Image.Image) -> Image.Image:
    page, random = np.array(_on_paper(_large(image)).convert("L")), np.random.default_rng(0)
    for value in (0, 255):
        page[random.random(page.shape) < 0.02] = value
    return Image.fromarray(page)


def _as_jpeg(page: Image.Image) -> Image.Image:
    file = io.BytesIO()
    page.save(file, "JPEG", quality=12)
    return Image.open(file)


def _thinned(image: Image.Image) -> Image.Image:
    return _large(image).point(lambda value: 255 * (value > 150)).filter(ImageFilter.MinFilter(9))


_RULES = [[0, y, 280, y] for y in range(35, 280, 70)]
_CHECKS = [line for at in range(20, 280, 40) for line in ([0, at, 280, at], [at, 0, at, 280])]

KINDS: dict[str, Callable[[Image.Image, int], Image.Image]] = {
    "28 x 28, as MNIST's": lambda image, _: image,
    "28 x 28, in a corner": lambda image, index: _placed(image, (1, -2)[index % 2], (1, -2)[index // 2 % 2]),
    "28 x 28, in a corner, touching": lambda image, index: _placed(image, -(index % 2), -(index // 2 % 2)),
    "28 x 28, shifted": lambda image, index: _placed(image, 2 + index % 4, 6 - index % 3),
    "28 x 28, small": lambda image, _: _placed(image, 9, 9, 10),
    "28 x 28, filled": lambda image, _: _placed(image, 0, 0, 28),
    "dark on white": lambda image, _: _on_paper(_large(image)),
    "white on a blackboard": lambda image, _: _on_paper(_large(image), (250, 250, 240), (30, 70, 50)),
    "thin pen": lambda image, _: _on_paper(_thinned(image)),
    "thick pen": lambda image, _: _on_paper(_large(image).filter(ImageFilter.MaxFilter(13))),
    "pencil": lambda image, _: _on_paper(_large(image), (205, 205, 205)),
    "uneven light": lambda image, _: _lit(image, 0.55 + 0.45 * _X),
    "hard shadow across": lambda image, _: _lit(image, np.where(_X + 0.3 * _Y > 0.62, 0.5, 1)),
    "hard shadow beside": lambda image, _: _lit(image, np.where(_X > 0.87, 0.5, 1)),
    "ruled lines": lambda image, _: _with_lines(image, _RULES, 5),
    "a line under it": lambda image, _: _with_lines(image, [[20, 232, 260, 232]], 9),
    "checked paper": lambda image, _: _with_lines(image, _CHECKS, 3, (120, 140, 200)),
    "in a box": lambda image, _: _with_lines(image, [[52, 26, 228, 26, 228, 254, 52, 254, 52, 26]], 6),
    "two digits": lambda image, _: _two(image, 180),
    "two digits that touch": lambda image, _: _two(image, 130),
    "cut off": lambda image, index: _on_paper(_large(image)).crop((0, 130 * (index % 2), 280, 150 + 130 * (index % 2))),
    "salt and pepper": lambda image, _: _salted(image),
    "colours, JPEG": lambda image, _: _as_jpeg(_on_paper(_large(image), (20, 40, 160), (250, 230, 90))),
    "tilted, transparent": lambda image, _: Image.merge(
        "RGBA", [Image.new("L", (280, 280), 40)] * 3 + [_large(image).rotate(15)]
    ),
}


def count_answers(model: Model, kind: str, images: Pixels, digits: Any) -> Counter[str]:
    """Pictures of a kind that are right, refused, unsure, or wrong and sure, as every answer to two digits is."""
    counts = Counter[str]()
    for index, (image, digit) in enumerate(zip(images, digits, strict=True)):
        try:
            found = predict(model, KINDS[kind](Image.fromarray(image), index), 3)
            right = found.digit == digit and not kind.startswith("two digits")
            counts["unsure" if found.unsure else "right" if right else "wrong and sure"] += 1
        except RequestError:
            counts["refused"] += 1
    return counts
