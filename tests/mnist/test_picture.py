"""Pictures that people draw become what MNIST's own are; what is none is refused in one line."""

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mnistsum_ray.data.columns.base import Array
from mnistsum_ray.errors import RequestError
from mnistsum_ray.mnist.picture import Picture, prepare_picture
from tests.data.test_images import giant


def large(image: Array, side: int = 280) -> Image.Image:
    return Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)


def page(image: Array, ink: Any, paper: Any) -> Image.Image:
    """Larger than the image, which is in a corner."""
    strength = np.pad(np.asarray(large(image)), ((20, 400), (200, 10)))[..., None] / 255
    return Image.fromarray((strength * ink + (1 - strength) * paper).astype(np.uint8))


def drawn(form: str, image: Array) -> bytes:
    """How an image of MNIST may be drawn and stored."""
    file, exif = io.BytesIO(), Image.Exif()
    if form == "dark, very large":
        large(255 - image, 1100).save(file, "PNG")
    elif form == "on a blackboard":
        page(image, (250, 250, 240), (30, 70, 50)).save(file, "WEBP")
    elif form == "transparent":
        Image.merge("LA", [Image.new("L", (280, 280), 40), large(image)]).save(file, "PNG")
    elif form == "photographed":  # lying, with a note of how to turn it
        exif[0x0112] = 6
        lying = page(image, (20, 40, 160), (250, 230, 90)).transpose(Image.Transpose.ROTATE_90)
        lying.save(file, "JPEG", quality=30, exif=exif)
    return file.getvalue()


def likeness(one: Array, other: Array) -> float:
    """Correlation, where one may be shifted by a pixel: a centre is rounded up or down."""
    shifted = (np.roll(one, (y, x), (0, 1)) for y in (-1, 0, 1) for x in (-1, 0, 1))
    return float(max(np.corrcoef(image.ravel(), other.ravel())[0, 1] for image in shifted))


@pytest.mark.parametrize(
    "form", ["dark, very large", "on a blackboard", "transparent", "photographed"]
)
def test_an_image_of_mnist_comes_back_however_it_is_drawn(form: str, pixels: Array) -> None:
    for image in pixels[::500]:
        found = prepare_picture(drawn(form, image))
        assert likeness(found, image) > 0.9
        assert found.dtype == np.uint8
        assert (found.shape, found.max(), np.median(found[0])) == ((28, 28), 255, 0)
        mass = [found.sum(1 - axis) @ np.arange(28) / found.sum() for axis in (0, 1)]
        assert np.abs(np.array(mass) - 14).max() <= 0.51


def test_what_is_no_picture_is_refused(tmp_path: Path) -> None:
    Image.new("L", (50, 50), 255).save(tmp_path / "white.png")
    refused: list[tuple[Picture, str]] = [
        (Path(__file__), "cannot be read as a picture"),
        (tmp_path / "white.png", "nothing is drawn on it"),
        (tmp_path / "nowhere.png", "does not exist"),
        (giant(1)[:45], "cannot be read as a picture"),  # cut off
        (giant(20_000), "cannot be read as a picture"),  # a few bytes of too many pixels
    ]
    for picture, said in refused:
        name = str(picture) if isinstance(picture, Path) else "the picture"
        with pytest.raises(RequestError, match=f"^{re.escape(name)}: {said}"):
            prepare_picture(picture)
