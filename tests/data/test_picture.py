"""Pictures that people draw become what MNIST's own are, however they are drawn; others are refused."""

import io
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from mnistsum_ray.data.images import one_chunk, pixels_view
from mnistsum_ray.data.picture import background_of, prepare_picture
from mnistsum_ray.errors import RequestError
from tests.data.pictures import KINDS, draw_kind

SEVEN = [(0.2, 0.12), (0.8, 0.08), (0.45, 0.95)]
FOUR = [(0.6, 0.05), (0.2, 0.6), (0.85, 0.57), (0.62, 0.6), (0.65, 0.35), (0.62, 0.97)]
Colour = tuple[int, ...] | int


def draw(
    strokes: list[tuple[float, float]] = SEVEN,
    size: tuple[int, int] = (400, 500),
    box: tuple[int, int, int, int] = (80, 60, 320, 440),
    ink: Colour = (0, 0, 0),
    paper: Colour = (255, 255, 255),
    width: int = 36,
    mode: str = "RGB",
) -> Image.Image:
    """A digit as a line with a thick pen; the strokes are in units of the box (left, top, right, bottom)."""
    picture = Image.new(mode, size, paper)
    places = [(box[0] + (box[2] - box[0]) * x, box[1] + (box[3] - box[1]) * y) for x, y in strokes]
    ImageDraw.Draw(picture).line(places, fill=ink, width=width, joint="curve")
    return picture


def with_dots(across: int, down: int) -> Image.Image:
    picture = Image.new("L", (900, 900), 255)
    for x, y in np.ndindex(across, down):
        ImageDraw.Draw(picture).ellipse([60 + 100 * x, 60 + 100 * y, 80 + 100 * x, 80 + 100 * y], fill=0)
    return picture


def likeness(one: np.ndarray, other: np.ndarray) -> float:
    """Correlation of two images, one of which may be shifted by a pixel, as a centre of mass may be rounded up or down."""
    shifted = (np.roll(one, (y, x), (0, 1)) for y in (-1, 0, 1) for x in (-1, 0, 1))
    return float(max(np.corrcoef(image.ravel(), other.ravel())[0, 1] for image in shifted))


def turned(picture: Image.Image) -> Image.Image:
    """As a telephone stores it: lying, with a note of how to turn it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    picture.transpose(Image.Transpose.ROTATE_90).save(file, "JPEG", exif=exif)
    return Image.open(file)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda s: draw(s, ink=0, paper=255, mode="L"), "400x500 grayscale, dark ink on light: inverted, cropped to "),
        (lambda s: draw(s, ink=(250, 250, 240), paper=(30, 70, 50)), "colour, light ink on dark: cropped to "),
        (lambda s: draw(s, ink=(20, 40, 160), paper=(250, 230, 90)), "colour, dark ink on light: inverted"),
        (lambda s: draw(s, ink=(210, 210, 210)), "grayscale, dark ink on light: inverted"),
        (lambda s: draw(s, (1600, 1200), (900, 300, 1380, 1060), width=72), "1600x1200 grayscale, dark"),
        (lambda s: draw(s, (40, 60), (6, 6, 34, 50), width=4), "40x60 grayscale, dark"),
        (lambda s: draw(s, width=12), "thin strokes widened"),
        (lambda s: draw(s, ink=(0, 0, 0, 255), paper=(0, 0, 0, 0), mode="RGBA"), "transparent, dark ink on light: inverted"),
        (lambda s: draw(s, ink=(255, 255, 255, 255), paper=(0, 0, 0, 0), mode="RGBA"), "transparent, light ink on dark: cropped"),
        (lambda s: draw(s).convert("1"), "400x500 grayscale, dark"),
        (lambda s: draw(s).convert("P"), "400x500 grayscale, dark"),
        (lambda s: turned(draw(s)), "400x500 grayscale, dark"),
    ],
)
def test_a_digit_looks_the_same_however_it_is_drawn(make: Callable[[list[tuple[float, float]]], Image.Image], said: str) -> None:
    for strokes in (SEVEN, FOUR):
        prepared = prepare_picture(make(strokes))
        assert said in prepared.how
        pixels = prepared.pixels
        assert pixels.dtype == np.uint8
        assert pixels.shape == (28, 28)
        assert likeness(pixels, prepare_picture(draw(strokes)).pixels) > 0.88
        rows, columns = np.flatnonzero(pixels.max(1)), np.flatnonzero(pixels.max(0))
        assert max(np.ptp(rows), np.ptp(columns)) + 1 in (19, 20)
        mass = np.array([pixels.sum(1 - axis) @ np.arange(28) / pixels.sum() for axis in (0, 1)])
        assert np.abs(mass - 14).max() <= 0.5
        assert pixels.max() > 230


@pytest.mark.parametrize(("side", "pen"), [(90, 1), (300, 2), (2000, 1)])
def test_a_thin_pen_is_seen_whole(side: int, pen: int) -> None:
    """Also where the picture is large, and a line is fainter when it has been scaled down."""
    pixels = prepare_picture(draw(FOUR, (side, side), (side // 4, side // 5, side * 3 // 4, side * 4 // 5), width=pen)).pixels
    assert likeness(pixels, prepare_picture(draw(FOUR)).pixels) > 0.8
    assert pixels.max() > 180


def test_an_image_of_mnist_is_used_as_it_is_and_comes_back_from_another_form(sample: pa.Table) -> None:
    for image in pixels_view(one_chunk(sample["image"]))[::500]:
        as_it_is = prepare_picture(Image.fromarray(image))
        assert as_it_is.how == "28x28 grayscale, used as it is"
        assert np.array_equal(as_it_is.pixels, image)
        dark = Image.fromarray(255 - image)
        assert np.array_equal(prepare_picture(dark).pixels, image)
        assert likeness(prepare_picture(dark.resize((280, 280), Image.Resampling.BICUBIC)).pixels, image) > 0.85


def test_ink_is_as_dark_as_in_the_training_images(sample: pa.Table) -> None:
    images = pixels_view(one_chunk(sample["image"]))[::500]
    assert (background_of(images), background_of(255 - images), background_of(images[:0])) == (0, 255, 0)
    for image in images:
        for picture in (Image.fromarray(image), Image.fromarray(255 - image), draw()):
            assert np.array_equal(prepare_picture(picture, 255).pixels, 255 - prepare_picture(picture).pixels)
    assert "grayscale, dark ink on light: cropped" in prepare_picture(draw(ink=0, paper=255, mode="L"), 255).how


def test_pixels_that_are_not_to_be_prepared_are_taken_as_they_are(sample: pa.Table) -> None:
    shifted = np.roll(pixels_view(one_chunk(sample["image"]))[0], 5, 1)
    for image in (shifted, 255 - shifted, np.full((28, 28), 7, np.uint8)):
        assert np.array_equal(prepare_picture(Image.fromarray(image), prepare=False).pixels, image)
    with pytest.raises(RequestError, match="the picture: is 400x500 grayscale, not 28x28; scale it, or have it prepared"):
        prepare_picture(draw(), prepare=False)


MOST_SURE = dict.fromkeys(("touch", "filled", "shadow", "ruled", "checked", "two", "cut off", "salt"), 0) | {"line": 2, "box": 2}
"""Of five pictures of a kind with this word in its name, how many may be without a doubt."""


@pytest.mark.parametrize("kind", KINDS)
def test_what_may_not_be_one_digit_is_refused_or_doubted(kind: str, sample: pa.Table) -> None:
    """With a model: tests/integration/test_readme.py."""
    sure = 0
    for index, image in enumerate(pixels_view(one_chunk(sample["image"]))[623::1000]):
        with suppress(RequestError):
            sure += not prepare_picture(draw_kind(kind, image, index)).doubts
    most = next((count for word, count in MOST_SURE.items() if word in kind), None)
    assert sure >= 3 if most is None else sure <= most


def test_specks_and_lines_of_the_paper_are_left_out() -> None:
    clean = draw()
    dirty = clean.copy()
    pen = ImageDraw.Draw(dirty)
    for y in range(30, 490, 60):
        pen.line([(0, y), (400, y)], fill=(190, 205, 235), width=2)
    for x, y in ((40, 460), (370, 60), (350, 300), (110, 400), (120, 250)):
        pen.ellipse([x, y, x + 6, y + 6], fill=(60, 50, 40))
    assert likeness(prepare_picture(dirty).pixels, prepare_picture(clean).pixels) > 0.85


@pytest.mark.parametrize(("across", "down"), [(8, 8), (7, 4)])
def test_a_picture_that_cannot_be_prepared_well_is_refused(across: int, down: int) -> None:
    with pytest.raises(RequestError, match=r"^the picture: is not one digit on a background of one brightness; crop it .*$"):
        prepare_picture(with_dots(across, down))


@pytest.mark.parametrize(
    "picture",
    [
        Image.new("RGB", (300, 200), "white"),
        Image.new("RGBA", (40, 40), (0, 0, 0, 0)),
        Image.new("L", (1, 1), 255),
        draw(ink=(200, 60, 60), paper=(60, 130, 60)),  # of nearly one brightness
    ],
    ids=["white", "transparent", "a pixel", "red on green"],
)
def test_a_picture_without_ink_is_refused(picture: Image.Image) -> None:
    with pytest.raises(RequestError, match="nothing is drawn on it"):
        prepare_picture(picture)


@pytest.mark.timeout(30)
def test_what_is_no_picture_is_refused_in_one_line(tmp_path: Path) -> None:
    whole, noted, note = io.BytesIO(), io.BytesIO(), PngInfo()
    draw().save(whole, "PNG")
    note.add_text("parameters", "x" * 2**21, zip=True)
    draw().save(noted, "PNG", pnginfo=note)
    for name, data, said in [
        ("text.png", b"seven", "is no picture of a known format"),
        ("empty.png", b"", "is no picture of a known format"),
        ("cut.png", whole.getvalue()[:900], "cannot be read as a picture"),
        ("text-chunk.png", noted.getvalue(), "cannot be read"),
    ]:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(RequestError, match=said) as refused:
            prepare_picture(tmp_path / name)
        assert str(refused.value).startswith(f"{tmp_path / name}: ")
        assert "\n" not in str(refused.value)
    with pytest.raises(RequestError, match=r"nowhere.png: there is no such file"):
        prepare_picture(tmp_path / "nowhere.png")
    os.mkfifo(tmp_path / "pipe")
    for what in (tmp_path / "pipe", "/dev/zero", tmp_path):
        with pytest.raises(RequestError, match="there is no such file; a pipe, a device or a folder is none"):
            prepare_picture(what)
