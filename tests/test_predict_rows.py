"""Predictions for the tables that people have in memory, for arrays and for one picture."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from mnistsum_ray import RequestError, RunError, load_model, predict, predict_rows, prepare_picture
from mnistsum_ray.data.images import one_chunk, pixels_view
from mnistsum_ray.data.sources import SAMPLE
from mnistsum_ray.model.heads import PREDICTION_FIELDS
from mnistsum_ray.model.network import TwoHeadCNN

ROWS = 30


@pytest.fixture(scope="module")
def network(model: Path) -> TwoHeadCNN:
    loaded = load_model(str(model))
    assert isinstance(loaded, TwoHeadCNN)
    return loaded


@pytest.fixture(scope="module")
def table() -> pa.Table:
    """Rows 3 and 5 are bad. As floats, 256 neighbours of the ids would be one."""
    images = [
        bytes(image) for image in pixels_view(one_chunk(pq.read_table(SAMPLE)["image"]))[:ROWS]
    ]
    images[3] = b"no image"
    numbers = [None if row == 5 else row % 10 for row in range(ROWS)]
    ids = [None, *range(2**60, 2**60 + ROWS - 1)]
    return pa.table(
        {"id": ids, "image": pa.array(images, pa.binary()), "number": pa.array(numbers, pa.int8())}
    )


FRAMES: dict[str, Callable[[pa.Table], Any]] = {
    "Arrow": lambda table: table,
    "batches of Arrow": lambda table: table.to_reader(max_chunksize=7),
    "pandas": lambda table: table.to_pandas(
        types_mapper={pa.int8(): pd.Int8Dtype(), pa.int64(): pd.Int64Dtype()}.get
    ),
    "Polars": pl.from_arrow,
    "DuckDB": duckdb.from_arrow,
}


@pytest.mark.parametrize("frame", FRAMES)
def test_rows_come_back_with_predictions(network: TwoHeadCNN, table: pa.Table, frame: str) -> None:
    done = predict_rows(network, FRAMES[frame](table), probabilities=True)
    assert done.column_names == [
        *table.column_names,
        *PREDICTION_FIELDS.names,
        "digit_probs",
        "sum_probs",
        "reason",
    ]
    assert done.select(table.column_names).to_pylist() == table.to_pylist()
    reasons = done["reason"].to_pylist()
    assert "8 bytes" in reasons[3]
    assert reasons[5] == "the number is null; fill it in or drop the row"
    good = [row for row in range(ROWS) if row not in (3, 5)]
    assert not any(reasons[row] for row in good)
    images = np.stack(
        [
            np.frombuffer(image, np.uint8).reshape(28, 28)
            for image in table["image"].take(good).to_pylist()
        ]
    )
    expected = predict(
        network, images, np.array(table["number"].take(good).to_pylist()), probabilities=True
    )
    for name in (*PREDICTION_FIELDS.names, "digit_probs", "sum_probs"):
        assert [row for row, value in enumerate(done[name].to_pylist()) if value is None] == [
            3,
            5,
        ], name
        if name != "consistent":
            found = np.array(done[name].take(good).to_pylist(), np.float32)
            assert np.array_equal(found, expected.values[name].astype(np.float32)), name


def test_one_picture(network: TwoHeadCNN, model: Path, table: pa.Table, tmp_path: Path) -> None:
    pixels = np.frombuffer(table["image"][0].as_py(), np.uint8).reshape(28, 28)
    picture, file = Image.fromarray(pixels), tmp_path / "one.png"
    picture.save(file)
    found = predict(str(model), file, 5)
    assert found == predict(network, picture, 5) == predict(network, str(file), 5)
    assert np.array_equal(found.pixels, prepare_picture(file))
    expected = predict(network, found.pixels[None], np.array([5]))
    assert (found.digit, found.sum) == (expected.digit[0], expected.sum[0])
    assert [found.digit, found.sum] == [found.digit_probs.argmax(), found.sum_probs.argmax()]
    assert (found.digit_prob, found.sum_prob) == pytest.approx(
        (expected.digit_prob[0], expected.sum_prob[0]), abs=1e-5
    )
    assert (found.number, found.consistent, found.unsure) == (5, found.sum == found.digit + 5, True)
    for number in (10, -1, 2.5, None):
        with pytest.raises(RequestError, match=f"the number is {number}, not one of 0..9"):
            predict(network, picture, number)


def test_parquet_is_made_of_pictures(network: TwoHeadCNN, table: pa.Table, tmp_path: Path) -> None:
    """As README shows."""
    pixels = np.frombuffer(table["image"][0].as_py(), np.uint8).reshape(28, 28)
    Image.fromarray(255 - pixels).resize((300, 300)).save(tmp_path / "one.jpg")
    rows = pd.DataFrame({"image": [prepare_picture(tmp_path / "one.jpg").tobytes()], "number": [5]})
    found = predict_rows(network, rows)
    expected = predict(network, tmp_path / "one.jpg", 5).digit
    assert (found["pred_digit"].to_pylist(), found["reason"].to_pylist()) == ([expected], [None])


def test_scores_that_are_not_finite_are_an_error(network: TwoHeadCNN, table: pa.Table) -> None:
    broken = deepcopy(network)
    torch.nn.init.constant_(broken.conv1.weight, 3e38)
    with pytest.raises(RunError, match="scores are infinite or NaN for some image"):
        predict_rows(broken, table)


def test_views_with_negative_strides_are_predicted(network: TwoHeadCNN) -> None:
    images = pixels_view(one_chunk(pq.read_table(SAMPLE)["image"]))[:ROWS]
    numbers = np.arange(ROWS) % 10
    mirrored = predict(network, images[::-1, :, ::-1], numbers[::-1])
    assert (
        mirrored.digit.tolist()
        == predict(network, images[::-1, :, ::-1].copy(), numbers[::-1].copy()).digit.tolist()
    )


def test_columns_that_do_not_fit_are_errors(network: TwoHeadCNN, table: pa.Table) -> None:
    with pytest.raises(
        ValueError, match="there must be one column 'picture'; there are 'id', 'image', 'number'"
    ):
        predict_rows(network, table, image_column="picture")
    with pytest.raises(ValueError, match="column 'image'"):
        predict_rows(network, table.set_column(1, "image", pa.array([0.5] * ROWS)))
    with pytest.raises(ValueError, match="column 'reason' would be added; rename it"):
        predict_rows(network, table.append_column("reason", pa.array(["why"] * ROWS)))
    with pytest.raises(ValueError, match="column 'Sum_Probs' would be added; rename it"):
        predict_rows(network, table.append_column("Sum_Probs", table["id"]), probabilities=True)
    assert predict_rows(network, table.append_column("Sum_Probs", table["id"])).num_rows == ROWS
    with pytest.raises(TypeError, match="not dict"):
        predict_rows(network, table.to_pydict())


def test_no_rows_and_a_model_by_its_path(model: Path, table: pa.Table) -> None:
    found = predict_rows(model, table.slice(0, 0), probabilities=True)
    assert (found["reason"].type, found["sum_probs"].type) == (pa.string(), pa.list_(pa.float32()))


def test_a_batch_size_below_one_is_an_error(network: TwoHeadCNN, table: pa.Table) -> None:
    with pytest.raises(ValueError, match="batch_size: must be at least 1, is 0"):
        predict(network, np.zeros((2, 28, 28), np.uint8), np.zeros(2, np.int64), batch_size=0)
    with pytest.raises(ValueError, match="batch_size: must be at least 1, is -1"):
        predict_rows(network, table, batch_size=-1)
