"""Every accepted form of an image decodes to the same pixels; what is no image gives a reason."""

import io
import re
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from ray.data.extensions import ArrowTensorArray

from mnistsum_ray.data import images as images_module
from mnistsum_ray.data.images import (
    DIGITS,
    IMAGE_TYPE,
    Pixels,
    ReasonCounts,
    decode_images,
    decode_numbers,
    image_type_error,
    number_type_error,
)
from tests.data.test_picture import giant

IMAGES: Pixels = np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8)


def encoded(image: Any, form: str = "PNG", **options: Any) -> bytes:
    data = io.BytesIO()
    Image.fromarray(image).save(data, form, **options)
    return data.getvalue()


BYTES = [image.tobytes() for image in IMAGES]
LISTS = [image.ravel().tolist() for image in IMAGES]
PNG = [encoded(image) for image in IMAGES]
TENSOR = pa.FixedShapeTensorArray.from_numpy_ndarray(IMAGES)
CHANNEL = pa.fixed_shape_tensor(pa.uint8(), [1, 28, 28])
FORMS = {
    "own": pa.array(BYTES, IMAGE_TYPE),
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
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_pixels(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but pictures at once: value by value they take a tenth of the time of a scoring."""
    if form not in ("png", "huggingface"):
        monkeypatch.delattr(images_module, "_decode_image")
    assert image_type_error(FORMS[form].type) is None
    for rows in (slice(0, 3), slice(1, 2)):
        images, bad = decode_images(FORMS[form][rows])
        assert not bad
        assert images.dtype == np.uint8
        assert np.array_equal(images, IMAGES[rows])


def test_a_picture_of_784_bytes_is_not_taken_for_pixels(pixels: Pixels) -> None:
    """As one in two hundred MNIST images is at quality 95."""
    jpegs = ((image, encoded(image, "JPEG", quality=95)) for image in pixels)
    image, jpeg = next((image, data) for image, data in jpegs if len(data) == 784)
    found, bad = decode_images(pa.array([BYTES[0], jpeg, jpeg[:20] + bytes(764)]))
    assert list(bad) == [2]
    assert np.array_equal(found[0], IMAGES[0])
    assert np.abs(found[1].astype(int) - image).max() <= 20


RAW, LIST, NESTED = bytes(784), [0] * 784, [[0] * 28] * 28
UNLIKE = "the image is not 784 or 28 x 28 integers in 0..255"
NEITHER = "neither 784 pixels nor a readable PNG"
BAD = [
    (RAW, None, "the image is null"),
    (RAW, b"", f"0 bytes are {NEITHER}"),
    (RAW, PNG[0][:60], NEITHER),
    (RAW, encoded(np.zeros((10, 12, 3), np.uint8)), "12 x 10 pixels of mode RGB, not"),
    (RAW, giant(20_000), "(DecompressionBombError)"),
    (LIST, [1, 2, 3], UNLIKE),
    (LIST, [256, *LIST[1:]], UNLIKE),
    (LIST, [None, *LIST[1:]], UNLIKE),
    (NESTED, [*NESTED[1:], [0] * 29], UNLIKE),
    ({"bytes": RAW, "path": ""}, {"bytes": None, "path": "1"}, "the image is null"),
]


@pytest.mark.parametrize(("good", "value", "reason"), BAD)
def test_what_is_no_image_says_why_and_is_left_out(good: Any, value: Any, reason: str) -> None:
    images, bad = decode_images(pa.array([good, value, good]))
    assert list(bad) == [1]
    assert reason in bad[1]
    assert not images.any()


def test_a_column_that_cannot_hold_images_or_numbers_is_named() -> None:
    lists = [pa.list_(pa.float32()), pa.list_(pa.list_(pa.list_(pa.uint8())))]
    for kind in (pa.string(), pa.int64(), pa.struct({"bytes": pa.int32()}), *lists):
        assert "which holds no images" in str(image_type_error(kind)), kind
    for kind in (pa.bool_(), pa.binary(), pa.list_(pa.int8())):
        assert "which holds no whole numbers" in str(number_type_error(kind))
    for kind in (pa.int8(), pa.uint64(), pa.float32(), pa.string(), pa.null()):
        assert number_type_error(kind) is None


NUMBERS = [
    (pa.array([8, 0, None, 9, 10], pa.int16()).slice(1), {0: 0, 2: 9}),
    (pa.array([2**64 - 1, 2**63, 3], pa.uint64()), {2: 3}),
    (pa.array([3.0, 3.5, float("nan"), float("inf"), -0.0, None, -1.0]), {0: 3, 4: 0}),
    (pa.array(["7", "7.0", "7.5", "seven", "", None, "-1", "10", "nan", "9" * 400]), {0: 7, 1: 7}),
    (pa.array(["3"], pa.large_string()), {0: 3}),
    (pa.array([b"3"]), {}),
    (pa.array([b"3", b"caf\xe9"]).view(pa.string()), {0: 3}),  # Arrow does not check texts
]


@pytest.mark.parametrize(("values", "right"), NUMBERS)
def test_a_number_of_any_type_is_below_ten_or_has_a_reason(
    values: pa.Array, right: dict[int, int]
) -> None:
    """Which quotes it in short."""
    numbers, bad = decode_numbers(values, DIGITS)
    assert sorted([*bad, *right]) == list(range(len(values)))
    assert {row: numbers[row] for row in right} == right
    assert not numbers[list(bad)].any()
    wrong = r"is (null; fill it in|.{1,310}, not one of 0\.\.9; correct it) or drop the row"
    assert all(re.fullmatch(wrong, reason) for reason in bad.values())


def test_sums_of_reasons_stay_small() -> None:
    """Each part has other reasons, as with labels of another kind; the rows are counted exactly."""
    counts = ReasonCounts()
    for part in reversed(range(50)):
        rows = [(f"{part:02}", row, f"the digit is {100 * part + row}") for row in range(60)]
        counts.add(Counter(reason for *_, reason in rows), rows)
    assert len(counts.reasons) == 21
    assert counts.total == 3000
    assert counts.examples == [("00", row, f"the digit is {row}") for row in range(5)]
    assert counts.describe().startswith("00: row 0: the digit is 0 | 00: row 1: ")
    assert counts.describe().endswith(" | …")
