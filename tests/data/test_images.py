"""Every accepted form of an image decodes to the same pixels; a value that is not an image gives a reason."""

import io
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from ray.data.extensions import ArrowTensorTypeV2

from mnistsum_ray.data.images import (
    Pixels,
    ReasonCounts,
    decode_images,
    decode_numbers,
    image_type_error,
    number_type_error,
    one_chunk,
    pixels_array,
    pixels_view,
)

IMAGES: Pixels = np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8)


def encoded(image: Any, form: str = "PNG", mode: str = "L") -> bytes:
    data = io.BytesIO()
    Image.fromarray(image).convert(mode).save(data, form)
    return data.getvalue()


def lists() -> list[list[int]]:
    return [image.ravel().tolist() for image in IMAGES]


def forms() -> dict[str, pa.Array]:
    tensor = pa.FixedShapeTensorArray.from_numpy_ndarray(IMAGES)
    png = [encoded(image) for image in IMAGES]
    return {
        "own": pixels_array(IMAGES),
        "binary": pa.array([image.tobytes() for image in IMAGES]),
        "large_binary": pa.array([image.tobytes() for image in IMAGES], pa.large_binary()),
        "list_int64": pa.array(lists()),
        "list_uint8": pa.array(lists(), pa.list_(pa.uint8())),
        "large_list": pa.array(lists(), pa.large_list(pa.int16())),
        "fixed_size_list": pa.array(lists(), pa.list_(pa.uint8(), 784)),
        "nested": pa.array([image.tolist() for image in IMAGES]),
        "nested_fixed": pa.array([image.tolist() for image in IMAGES], pa.list_(pa.list_(pa.uint8(), 28), 28)),
        "tensor": tensor,
        "tensor_with_channel": pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.uint8(), [1, 28, 28]), tensor.storage),
        "png": pa.array(png),
        "huggingface": pa.array([{"bytes": data, "path": None} for data in png]),
        "ray_variable_shape": pa.array([{"data": values, "shape": [28, 28]} for values in lists()]),
        "dictionary": pa.array(png).dictionary_encode(),
    }


def test_every_form_gives_the_same_pixels() -> None:
    for name, column in forms().items():
        assert image_type_error(column.type) is None, name
        images, bad = decode_images(column)
        assert not bad, name
        assert images.dtype == np.uint8
        assert np.array_equal(images, IMAGES), name
        sliced, _ = decode_images(column.slice(1, 2))
        assert np.array_equal(sliced, IMAGES[1:]), name


@pytest.fixture(scope="module")
def jpeg_of_784_bytes(sample: pa.Table) -> tuple[Pixels, bytes]:
    """As one in two hundred MNIST images is at quality 95."""
    for image in pixels_view(one_chunk(sample["image"])):
        data = io.BytesIO()
        Image.fromarray(image).save(data, "JPEG", quality=95)
        if len(data.getvalue()) == 784:
            return image, data.getvalue()
    raise AssertionError("none has 784 bytes")


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary(784)], ids=str)
def test_a_picture_of_784_bytes_is_not_taken_for_pixels(jpeg_of_784_bytes: tuple[Pixels, bytes], kind: pa.DataType) -> None:
    image, jpeg = jpeg_of_784_bytes
    for values in ([IMAGES[0].tobytes(), jpeg], [jpeg]):
        images, bad = decode_images(pa.array(values, kind))
        assert not bad
        assert np.abs(images[-1].astype(int) - image).max() <= 20
        assert len(values) == 1 or np.array_equal(images[0], IMAGES[0])
    images, bad = decode_images(pa.array([jpeg[:20] + bytes(764), IMAGES[1].tobytes()], kind))
    assert list(bad) == [0]
    assert "784 bytes begin as a PNG or JPEG does, and cannot be read as one" in bad[0]
    assert (images[1] == IMAGES[1]).all()


@pytest.mark.parametrize(("form", "orientation", "turns"), [("PNG", 6, 3), ("JPEG", 8, 1), ("JPEG", 1, 0)])
def test_a_picture_is_turned_as_its_exif_says(form: str, orientation: int, turns: int) -> None:
    image = np.zeros((28, 28), np.uint8)
    image[2:8, 3:20] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = io.BytesIO()
    Image.fromarray(image).save(data, form, exif=exif)
    images, bad = decode_images(pa.array([data.getvalue()]))
    assert not bad
    assert np.abs(images[0].astype(int) - np.rot90(image, turns)).max() <= 40


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "null"),
        (b"", "0 bytes are neither 784 pixels nor a readable PNG or JPEG"),
        (b"\x89PNG not really", "neither 784 pixels nor a readable PNG"),
        (encoded(IMAGES[0])[:60], "neither 784 pixels nor a readable PNG"),
        (encoded(np.zeros((10, 12), np.uint8)), "12 x 10 pixels, not 28 x 28"),
        (encoded(IMAGES[0], mode="RGB"), "mode RGB, not L"),
        (encoded(IMAGES[0], "BMP"), "neither 784 pixels nor a readable PNG"),
        (encoded(np.zeros((20_000, 20_000), np.uint8)), "claims to unpack to far more than 28 x 28 pixels"),
    ],
)
def test_bad_bytes_say_why_and_leave_the_rows_beside_them(value: bytes | None, reason: str) -> None:
    images, bad = decode_images(pa.array([IMAGES[0].tobytes(), value, IMAGES[2].tobytes()], pa.binary()))
    assert list(bad) == [1]
    assert reason in bad[1]
    assert np.array_equal(images[[0, 2]], IMAGES[[0, 2]])


LINES = [[0] * 28] * 27
OUTSIDE = {"bytes": None, "path": "1.png"}
WIDE = {"data": [0] * 784, "shape": [56, 14]}


@pytest.mark.parametrize(
    ("good", "value", "reason"),
    [
        ([0] * 784, [1, 2, 3], "3 values"),
        ([0] * 784, [256] + [0] * 783, "0..256, outside 0..255"),
        ([0] * 784, [-1] + [0] * 783, "-1..0, outside 0..255"),
        ([0] * 784, [None] + [0] * 783, "nulls among its values"),
        ([0] * 784, None, "null"),
        ([*LINES, [0] * 28], LINES, "27 x 28 values"),
        ([*LINES, [0] * 28], [*LINES, [0] * 29], "28 lines of unequal length"),
        ([*LINES, [0] * 28], [*LINES, None], "null in place of a line"),
        ({"data": [0] * 784, "shape": [28, 28]}, WIDE, "the image has 56 x 14 values, not 784 or 28 x 28; resize it"),
        ({"bytes": bytes(784), "path": None}, OUTSIDE, "put the picture itself into it"),
    ],
)
def test_bad_lists_and_structs_say_why(good: Any, value: Any, reason: str) -> None:
    images, bad = decode_images(pa.array([good, value, good]))
    assert list(bad) == [1]
    assert reason in bad[1]
    assert not images.any()


NUMBER_TYPES = [pa.int8(), pa.uint8(), pa.int16(), pa.uint16(), pa.int32(), pa.uint32(), pa.int64(), pa.uint64()]


def test_every_integer_type_holds_numbers() -> None:
    for kind in [*NUMBER_TYPES, *(pa.dictionary(pa.int8(), kind) for kind in NUMBER_TYPES)]:
        assert number_type_error(kind) is None
        numbers, bad = decode_numbers(pa.array([0, None, 9, 10], kind).slice(1))
        assert numbers.tolist() == [0, 9, 0]
        assert list(bad) == [0, 2]
        assert "null" in bad[0]
        assert "10, not one of 0..9" in bad[2]
    # Extreme ones are bad and not wrapped.
    assert list(decode_numbers(pa.array([2**64 - 1, 2**63, 3], pa.uint64()))[1]) == [0, 1]
    assert list(decode_numbers(pa.array([-(2**63), -1, 3], pa.int64()))[1]) == [0, 1]
    assert list(decode_numbers(pa.nulls(2))[1]) == [0, 1]


NO_IMAGES = [
    pa.string(),
    pa.int64(),
    pa.dictionary(pa.int8(), pa.int64()),
    pa.float32(),
    pa.list_(pa.float32()),
    pa.list_(pa.list_(pa.list_(pa.uint8()))),
    pa.struct([("path", pa.string())]),
    pa.struct([("bytes", pa.int32())]),
    pa.fixed_shape_tensor(pa.uint8(), [28, 28], permutation=[1, 0]),
    pa.fixed_shape_tensor(pa.uint8(), [56, 14]),
    ArrowTensorTypeV2((56, 14), pa.uint8()),
]


def test_a_column_that_cannot_hold_images_or_numbers_is_named() -> None:
    for kind in NO_IMAGES:
        assert image_type_error(kind) is not None, kind
    for kind in (pa.float64(), pa.string(), pa.bool_(), pa.list_(pa.int8())):
        assert "not an integer type" in str(number_type_error(kind))


def test_sums_of_reasons_stay_small() -> None:
    """Each part has other reasons, as with labels of another kind; the number of rows stays exact."""
    counts = ReasonCounts()
    for part in range(50):
        counts.add_reasons(ReasonCounts.of({("a", row): f"the digit is {100 * part + row}" for row in range(60)}))
    assert (len(counts.reasons), counts.total, list(counts.reasons)[-1]) == (21, 3000, "other reasons")
    assert len(counts.examples) <= 20
    assert "other reasons" not in counts.describe()
