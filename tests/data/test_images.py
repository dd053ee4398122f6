"""Every accepted form of an image decodes to the same pixels; what is no image gives a reason."""

import io
import zlib
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from ray.data.extensions import ArrowTensorArray

from mnistsum_ray import Images, Photos
from mnistsum_ray.data.columns.base import Array

GREY, COLOUR = Images(28, 28), Images(20, 30, "RGB")
RANDOM = np.random.default_rng(0)
IMAGES: Array = RANDOM.integers(0, 256, (3, 28, 28), dtype=np.uint8)
COLOURED: Array = RANDOM.integers(0, 256, (3, 20, 30, 3), dtype=np.uint8)


def encoded(image: Any, form: str = "PNG", **options: Any) -> bytes:
    data = io.BytesIO()
    Image.fromarray(image).save(data, form, **options)
    return data.getvalue()


def giant(side: int) -> bytes:
    """A PNG of a few bytes that says in its header that it has so many pixels a side."""
    png = encoded(np.zeros((1, 1), np.uint8))
    header = b"IHDR" + side.to_bytes(4, "big") * 2 + png[24:29]
    return png[:12] + header + zlib.crc32(header).to_bytes(4, "big") + png[33:]


BYTES = [image.tobytes() for image in IMAGES]
LISTS = [image.ravel().tolist() for image in IMAGES]
PNG = [encoded(image) for image in IMAGES]
TENSOR = pa.FixedShapeTensorArray.from_numpy_ndarray(IMAGES)
CHANNEL = pa.fixed_shape_tensor(pa.uint8(), [1, 28, 28])
FORMS = {
    "fixed_size_binary": pa.array(BYTES, pa.binary(784)),
    "large_binary": pa.array(BYTES, pa.large_binary()),
    "binary_view": pa.array(BYTES, pa.binary_view()),
    "list_int64": pa.array(LISTS),
    "large_list": pa.array(LISTS, pa.large_list(pa.int16())),
    "fixed_size_list": pa.array(LISTS, pa.list_(pa.uint8(), 784)),
    "nested": pa.array(IMAGES.tolist()),
    "nested_fixed": pa.array(IMAGES.tolist(), pa.list_(pa.list_(pa.uint8(), 28), 28)),
    "tensor": TENSOR,
    "tensor_with_channel": pa.ExtensionArray.from_storage(CHANNEL, TENSOR.storage),
    "ray_tensor": ArrowTensorArray.from_numpy(IMAGES),
    "png": pa.array(PNG),
    "huggingface": pa.array([{"bytes": data, "path": None} for data in PNG]),
    "coloured bytes": pa.array([image.tobytes() for image in COLOURED]),
    "coloured list": pa.array([image.ravel().tolist() for image in COLOURED]),
    "coloured nested": pa.array(COLOURED.tolist()),
    "coloured tensor": pa.FixedShapeTensorArray.from_numpy_ndarray(COLOURED),
    "coloured png": pa.array([encoded(image) for image in COLOURED]),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_pixels(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but pictures at once: value by value they take a tenth of the time of a scoring."""
    if "png" not in form and form != "huggingface":
        monkeypatch.delattr(Images, "_decode_one")
    column, expected = (COLOUR, COLOURED) if "coloured" in form else (GREY, IMAGES)
    assert column.type_error(FORMS[form].type) is None
    for rows in (slice(0, 3), slice(1, 2)):
        images, rejected = column.decode(FORMS[form][rows], "image")
        assert not rejected
        assert images.dtype == np.uint8
        assert np.array_equal(images, expected[rows])
    transposed = expected.swapaxes(1, 2).copy().swapaxes(1, 2)
    decoded, _ = column.decode(column.to_arrow(transposed), "image")
    assert np.array_equal(decoded, expected), "as they lie in the object store"


def test_a_picture_of_784_bytes_is_not_taken_for_pixels(pixels: Array) -> None:
    """As one in two hundred MNIST images is at quality 95."""
    jpegs = ((image, encoded(image, "JPEG", quality=95)) for image in pixels)
    image, jpeg = next((image, data) for image, data in jpegs if len(data) == 784)
    found, rejected = GREY.decode(pa.array([BYTES[0], jpeg, jpeg[:20] + bytes(764)]), "image")
    assert list(rejected) == [2]
    assert np.array_equal(found[0], IMAGES[0])
    assert np.abs(found[1].astype(int) - image).max() <= 20


RAW, LIST, NESTED = bytes(784), [0] * 784, [[0] * 28] * 28
UNLIKE = "the image is not 784 or 28 x 28 integers in 0..255"
NEITHER = "neither 784 pixels nor a readable PNG"
SMALL = encoded(np.zeros((10, 12, 3), np.uint8))
REJECTED = [
    (GREY, RAW, None, "the image is null; fill it in or drop the row"),
    (GREY, RAW, b"", f"0 bytes are {NEITHER}"),
    (GREY, RAW, PNG[0][:60], NEITHER),
    (GREY, RAW, SMALL, "12 x 10 pixels of mode RGB, not 28 x 28 of L (8-bit grayscale)"),
    (GREY, RAW, giant(20_000), "(DecompressionBombError)"),
    (GREY, LIST, [1, 2, 3], UNLIKE),
    (GREY, LIST, [256, *LIST[1:]], UNLIKE),
    (GREY, LIST, [None, *LIST[1:]], UNLIKE),
    (GREY, NESTED, [*NESTED[1:], [0] * 29], UNLIKE),
    (GREY, {"bytes": RAW, "path": ""}, {"bytes": None, "path": "1"}, "the image is null"),
    (COLOUR, bytes(1800), PNG[0], "28 x 28 pixels of mode L, not 30 x 20 of RGB (8-bit colour)"),
    (COLOUR, bytes(1800), bytes(600), "600 bytes are neither 1800 pixels nor a readable PNG"),
    (COLOUR, [0] * 1800, [0] * 600, "is not 1800 or 20 x 30 x 3 integers in 0..255"),
]


@pytest.mark.parametrize(("column", "good", "value", "reason"), REJECTED)
def test_what_is_no_image_says_why_and_is_zeros(
    column: Images, good: Any, value: Any, reason: str
) -> None:
    images, rejected = column.decode(pa.array([good, value, good]), "image")
    assert list(rejected) == [1]
    assert reason in rejected[1]
    assert images.shape == (3, *column.shape)
    assert not images.any()


def test_a_column_that_cannot_hold_images_is_named() -> None:
    deep = pa.list_(pa.list_(pa.list_(pa.uint8())))
    for kind in (pa.string(), pa.int64(), pa.struct({"bytes": pa.int32()}), pa.list_(pa.float32())):
        for column in (GREY, COLOUR):
            assert "which holds no images (lists of " in str(column.type_error(kind)), kind
        assert "which holds no PNG or JPEG bytes" in str(Photos(8).type_error(kind)), kind
    assert (GREY.type_error(deep) is None, COLOUR.type_error(deep) is None) == (False, True)
    assert Photos(8).type_error(pa.list_(pa.uint8())) is not None
    for kind in (pa.binary(), pa.struct({"bytes": pa.binary(), "path": pa.string()}), pa.null()):
        assert GREY.type_error(kind) is Photos(8).type_error(kind) is None


def test_photos_of_any_size_are_checked_stay_encoded_and_are_stretched_when_loaded() -> None:
    wide = np.zeros((40, 90, 3), np.uint8)
    wide[:, 45:] = 200, 100, 0
    good = [encoded(wide), encoded(wide, "JPEG", quality=95), encoded(wide[:, :, 0])]
    column, values = Photos(16), [*good, None, b"", good[0][:50], giant(20_000)]
    for kind in (pa.binary(), pa.binary_view()):
        stored, rejected = column.decode(pa.array(values, kind), "photo")
        assert stored.tolist() == [*good, *[b""] * 4]
        assert list(rejected) == [3, 4, 5, 6]
    said = ["the photo is null; fill it in or drop the row", "0 bytes are no readable PNG or JPEG"]
    said += ["50 bytes are no readable PNG", "67 bytes are no readable PNG or JPEG (Decompress"]
    for row, text in enumerate(said, 3):
        assert rejected[row].startswith(text), rejected
    again, rejected = column.decode(column.to_arrow(stored), "photo")
    assert again.tolist()[:3] == good
    loaded = column.load(stored)
    assert (loaded.dtype.name, loaded.shape) == ("uint8", (7, 16, 16, 3))
    for photo in loaded[:2]:  # a JPEG is not exact
        assert np.abs(photo[:, :7].astype(int)).max() <= 12
        assert np.abs(photo[:, 9:].astype(int) - [200, 100, 0]).max() <= 12
    assert (loaded[2, :, 10:] == 200).all(), "grey photos become coloured"
    assert not loaded[3:].any()


def picture_file(picture: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    data = io.BytesIO()
    picture.save(data, form, **options)
    return data.getvalue()


def looks(data: bytes) -> Array:
    """Pixels of a photo of 8 x 8, as a batch has them."""
    column = Photos(8)
    stored, rejected = column.decode(pa.array([data]), "photo")
    assert rejected == {}
    pixels: Array = column.load(stored)[0].astype(int)
    return pixels


def test_photos_look_as_viewers_show_them() -> None:
    corner = np.zeros((8, 8, 3), np.uint8)
    corner[:4, :4] = 255, 0, 0  # red at the top left
    upright = Image.fromarray(corner)
    # Of the eight orientations of EXIF, and how a camera stores the picture for each.
    stored_as = {
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.transpose(Image.Transpose.ROTATE_180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.transpose(Image.Transpose.ROTATE_90),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.transpose(Image.Transpose.ROTATE_270),
    }
    for orientation, stored in stored_as.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        for form in ("PNG", "JPEG"):
            found = looks(picture_file(stored, form, exif=exif))
            assert np.abs(found - corner).mean() < 15, (orientation, form)
        image, rejected = Images(8, 8, "RGB").decode(
            pa.array([picture_file(stored, exif=exif)]), "image"
        )
        assert (np.array_equal(image[0], corner), rejected) == (True, {}), orientation

    shades = np.linspace(0, 65_535, 64).astype(np.uint16).reshape(8, 8)
    deep = looks(picture_file(Image.fromarray(shades)))
    assert np.abs(deep - (shades / 257)[:, :, None]).max() <= 1

    clear = np.zeros((8, 8, 4), np.uint8)
    clear[:4] = 0, 0, 255, 255  # blue above, and nothing below
    transparent = Image.fromarray(clear, "RGBA")
    half = Image.fromarray(np.full((8, 8, 2), [0, 128], np.uint8), "LA")
    for data in (picture_file(transparent), picture_file(transparent.quantize(4))):
        found = looks(data)
        assert (found[0, 0].tolist(), found[7, 7].tolist()) == ([0, 0, 255], [255, 255, 255])
    assert np.abs(looks(picture_file(half)) - 127).max() <= 1

    printed = looks(picture_file(upright.convert("CMYK"), "JPEG", quality=95))
    assert np.abs(printed - corner).mean() < 15
