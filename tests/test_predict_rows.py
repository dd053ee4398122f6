"""Predictions for the tables that people have in memory and for one picture, and the decoder of images."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mnistsum_ray import RequestError, decode_images, load_model, predict, predict_rows
from mnistsum_ray.data.images import one_chunk, pixels_view
from mnistsum_ray.data.sources import SAMPLE
from mnistsum_ray.model.heads import PREDICTION_FIELDS
from mnistsum_ray.model.network import TwoHeadCNN

ROWS = 30
ADDED = [*PREDICTION_FIELDS.names, "reason"]


@pytest.fixture(scope="module")
def network(model: Path) -> TwoHeadCNN:
    return load_model(str(model))


@pytest.fixture(scope="module")
def table() -> pa.Table:
    """Rows 3 and 5 are bad."""
    images = [bytes(image) for image in pixels_view(one_chunk(pq.read_table(SAMPLE)["image"]))[:ROWS]]
    images[3] = b"no image"
    numbers = [None if row == 5 else row % 10 for row in range(ROWS)]
    return pa.table({"id": pa.array(range(ROWS)), "image": pa.array(images, pa.binary()), "number": pa.array(numbers, pa.int8())})


@pytest.mark.parametrize(
    ("convert", "back"),
    [
        pytest.param(lambda table: table, lambda table: table, id="arrow"),
        pytest.param(lambda table: table.to_pandas(), pa.Table.from_pandas, id="pandas"),
        pytest.param(pl.from_arrow, lambda frame: frame.to_arrow(), id="polars"),
    ],
)
def test_a_table_comes_back_with_predictions(
    network: TwoHeadCNN, table: pa.Table, convert: Callable[[pa.Table], Any], back: Callable[[Any], pa.Table]
) -> None:
    rows = convert(table)
    if isinstance(rows, pd.DataFrame):
        rows["number"] = rows["number"].astype("Int8")  # pandas would make floats of numbers with a null
        rows.index = pd.Index(range(100, 100 + ROWS))
    answered = predict_rows(network, rows)
    assert type(answered) is type(rows)
    if isinstance(answered, pd.DataFrame):
        assert answered.index.equals(rows.index)
        assert [str(kind) for kind in answered.dtypes[ADDED]] == ["Int8", "Float32", "Int8", "Float32", "boolean", "string"]
        assert answered["reason"].isna().sum() == ROWS - 2
    done = back(answered).select(["id", "image", "number", *ADDED])
    assert done["id"].to_pylist() == list(range(ROWS))
    reasons = done["reason"].to_pylist()
    assert [row for row, reason in enumerate(reasons) if reason] == [3, 5]
    assert "8 bytes" in reasons[3]
    assert reasons[5] == "the number is null; fill it in or drop the row"
    for name in PREDICTION_FIELDS.names:
        assert [row for row, value in enumerate(done[name].to_pylist()) if value is None or value != value] == [3, 5], name
    good = [row for row in range(ROWS) if row not in (3, 5)]
    images = np.stack([np.frombuffer(image, np.uint8).reshape(28, 28) for image in table["image"].take(good).to_pylist()])
    numbers = np.array(table["number"].take(good).to_pylist())
    expected = predict(network, images, numbers)
    assert [int(value) for value in done["pred_digit"].take(good).to_pylist()] == expected.digit.tolist()
    assert [int(value) for value in done["pred_sum"].take(good).to_pylist()] == expected.sum.tolist()


def test_other_columns_stay_as_they_are(network: TwoHeadCNN, table: pa.Table) -> None:
    large, tuples = 2**60 + 1, [(row, "x") for row in range(ROWS)]
    frame = table.to_pandas()
    frame["number"] = frame["number"].astype("Int8")
    frame["id"] = pd.array([None, *[large] * (ROWS - 1)], "Int64")
    frame["tuple"] = pd.Series(tuples)
    frame["mixed"] = pd.Series([1, "a", *[None] * (ROWS - 2)], dtype=object)
    before = frame.copy()
    answered = predict_rows(network, frame)
    pd.testing.assert_frame_equal(answered[list(before.columns)], before)
    pd.testing.assert_frame_equal(frame, before)
    assert answered["id"][1] == large
    assert answered["tuple"][2] == tuples[2]
    polars = pl.DataFrame({"image": table["image"].to_pylist(), "number": table["number"].to_pylist()}).with_columns(
        pl.Series("object", tuples, dtype=pl.Object)
    )
    of_polars = predict_rows(network, polars)
    assert of_polars.schema["object"] == pl.Object
    assert of_polars["object"].to_list() == tuples


@pytest.mark.parametrize(
    "convert", [lambda table: table, lambda table: table.to_pandas(), pl.from_arrow], ids=["arrow", "pandas", "polars"]
)
def test_large_ids_stay_exact_beside_a_bad_row(network: TwoHeadCNN, table: pa.Table, convert: Callable[[pa.Table], Any]) -> None:
    ids = [2**60 + row for row in range(ROWS)]  # as floats, 256 neighbours would be one
    numbers = pa.array([15 if row == 5 else row % 10 for row in range(ROWS)])
    answered = predict_rows(network, convert(pa.table({"id": ids, "image": table["image"], "number": numbers})))
    values = answered["id"].to_pylist() if isinstance(answered, pa.Table) else answered["id"].to_list()
    assert values == ids
    assert all(isinstance(value, int) for value in values)


def test_one_picture(network: TwoHeadCNN, model: Path, table: pa.Table, tmp_path: Path) -> None:
    pixels = np.frombuffer(table["image"][0].as_py(), np.uint8).reshape(28, 28)
    picture, file = Image.fromarray(pixels), tmp_path / "one.png"
    picture.save(file)
    found = predict(str(model), file, 5)
    assert found == predict(network, picture, 5) == predict(network, str(file), 5)
    assert np.array_equal(found.pixels, pixels)
    expected = predict(network, pixels[None], np.array([5]))
    assert (found.digit, found.sum) == (expected.digit[0], expected.sum[0])
    assert (found.digit_prob, found.sum_prob) == pytest.approx((expected.digit_prob[0], expected.sum_prob[0]), abs=1e-5)
    assert (found.number, found.consistent) == (5, found.sum == found.digit + 5)
    for number in (10, -1, 2.5, None):
        with pytest.raises(RequestError, match=f"the number is {number}, not one of 0..9"):
            predict(network, picture, number)  # type: ignore[arg-type]


def test_views_with_negative_strides_are_predicted(network: TwoHeadCNN) -> None:
    images = pixels_view(one_chunk(pq.read_table(SAMPLE)["image"]))[:ROWS]
    numbers = np.arange(ROWS) % 10
    mirrored = predict(network, images[::-1, :, ::-1], numbers[::-1])
    assert mirrored.digit.tolist() == predict(network, images[::-1, :, ::-1].copy(), numbers[::-1].copy()).digit.tolist()
    frame = pd.DataFrame({"image": [image.ravel()[::-1] for image in images], "number": numbers[::-1]})
    assert predict_rows(network, frame)["reason"].isna().all()


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_size_below_one_is_an_error(network: TwoHeadCNN, table: pa.Table, batch_size: int) -> None:
    with pytest.raises(ValueError, match=f"batch_size: must be at least 1, is {batch_size}"):
        predict(network, np.zeros((2, 28, 28), np.uint8), np.zeros(2, np.int64), batch_size)
    with pytest.raises(ValueError, match="batch_size: must be at least 1"):
        predict_rows(network, table, batch_size=batch_size)


def test_columns_that_do_not_fit_are_errors(network: TwoHeadCNN, table: pa.Table) -> None:
    with pytest.raises(ValueError, match="there must be one column 'picture'; there are 'id', 'image', 'number'"):
        predict_rows(network, table, image_column="picture")
    with pytest.raises(ValueError, match="column 'image'"):
        predict_rows(network, table.set_column(1, "image", pa.array([0.5] * ROWS)))
    with pytest.raises(ValueError, match="column 'reason' would be added; rename it"):
        predict_rows(network, table.append_column("reason", pa.array(["why"] * ROWS)))
    with pytest.raises(ValueError, match="column 'Pred_Sum' would be added; rename it"):
        predict_rows(network, table.append_column("Pred_Sum", pa.array([1] * ROWS)))
    with pytest.raises(ValueError, match=r"column 'number': .*too large"):
        predict_rows(network, pd.DataFrame({"image": [bytes(784)], "number": [2**70]}))
    with pytest.raises(TypeError, match="not dict"):
        predict_rows(network, table.to_pydict())


def test_no_rows_and_a_model_by_its_path(model: Path, table: pa.Table) -> None:
    assert predict_rows(model, table.slice(0, 0)).column_names == [*table.column_names, *ADDED]


def test_images_are_decoded(table: pa.Table) -> None:
    expected = pixels_view(one_chunk(pq.read_table(SAMPLE)["image"]))[:ROWS]
    for values in (table["image"], table["image"].to_pylist(), pl.Series(table["image"]), table["image"].to_pandas()):
        images, reasons = decode_images(values)
        assert images.dtype == np.uint8
        assert list(reasons) == [3]
        assert np.array_equal(np.delete(images, 3, 0), np.delete(expected, 3, 0))
        assert not images[3].any()
    assert np.array_equal(decode_images(expected.reshape(ROWS, -1).tolist())[0], expected)
    with pytest.raises(ValueError, match="images: "):
        decode_images([0.5])
