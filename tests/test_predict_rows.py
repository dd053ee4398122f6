"""Predictions for the tables that people have in memory, and for one picture."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import torch
from PIL import Image

from mnistsum_ray import (
    RequestError,
    RunError,
    load_model,
    predict_rows,
    save_model,
)
from mnistsum_ray.data.columns.base import Array, Arrays
from mnistsum_ray.mnist import MnistSum, TwoHeadCNN, predict, prepare_picture
from mnistsum_ray.model import inference
from tests.tasks import Points, PointSettings, points

ROWS = 30
BAD = [3, 5]


@pytest.fixture(scope="module")
def network(model: Path) -> TwoHeadCNN:
    loaded = load_model(str(model))
    assert isinstance(loaded, TwoHeadCNN)
    return loaded


@pytest.fixture(scope="module")
def table(pixels: Array) -> pa.Table:
    """BAD rows have no image or no number."""
    images = [image.tobytes() for image in pixels[:ROWS]]
    images[3] = b"no image"
    numbers = pa.array([None if row == 5 else row % 10 for row in range(ROWS)], pa.int8())
    return pa.table({"id": range(ROWS), "image": pa.array(images), "number": numbers})


def plain(network: TwoHeadCNN, images: Array, numbers: list[int], rows: int) -> Arrays:
    given = {"image": images, "number": np.array(numbers)}
    return inference.predict_rows(MnistSum(), network, given, rows, probabilities=True)


def test_rows_come_back_with_predictions(
    network: TwoHeadCNN, table: pa.Table, pixels: Array
) -> None:
    done = predict_rows(network, table.to_reader(max_chunksize=7), probabilities=True)
    predicted = MnistSum.outputs.names
    assert done.column_names == [*table.column_names, *predicted, "reason"]
    assert done.select(table.column_names).to_pylist() == table.to_pylist()
    reasons = done["reason"].to_pylist()
    assert [row for row, reason in enumerate(reasons) if reason] == BAD
    assert reasons[5] == "the number is null; fill it in or drop the row"
    good = [row for row in range(ROWS) if row not in BAD]
    numbers = table["number"].take(good).to_pylist()
    expected = plain(network, pixels[good], numbers, len(good))
    for name in predicted:
        values = done[name].to_pylist()
        assert [row for row, value in enumerate(values) if value is None] == BAD, name
        if name != "consistent":
            found = np.array([values[row] for row in good], np.float32)
            assert np.array_equal(found, expected[name]), name
    frames: list[Any] = [table.to_pandas(), pl.from_arrow(table), duckdb.from_arrow(table)]
    for frame in frames:
        assert predict_rows(network, frame)["reason"].to_pylist() == reasons
    nothing = predict_rows(network, table.slice(0, 0), probabilities=True)
    assert nothing.schema.field("sum_probs").type == pa.list_(pa.float32())


def test_a_picture_is_answered_from_a_file_or_from_memory(
    network: TwoHeadCNN, model: Path, pixels: Array, tmp_path: Path
) -> None:
    picture, file = Image.fromarray(pixels[0]), tmp_path / "one.png"
    picture.save(file)
    found = predict(model, file, 5)
    assert found == predict(network, picture, 5) == predict(network, str(file), 5)
    expected = plain(network, prepare_picture(file)[None], [5], 1)
    assert (found.digit, found.sum) == (expected["pred_digit"][0], expected["pred_sum"][0])
    assert (found.number, found.consistent) == (5, found.sum == found.digit + 5)
    assert found.unsure, "the weights are random"
    wrong: list[Any] = [10, -1, 2.5, None]
    for number in wrong:
        with pytest.raises(RequestError, match=f"the number is {number}, not one of 0..9"):
            predict(network, picture, number)


def test_what_does_not_fit_is_an_error(network: TwoHeadCNN, table: pa.Table) -> None:
    floats = table.set_column(1, "image", pa.array([0.5] * ROWS))
    reasons = table.append_column("reason", table["id"])
    sums = table.append_column("Sum_Probs", table["id"])
    cases: list[tuple[Any, str]] = [
        (floats, "column 'image' has type double, which holds no images"),
        (reasons, "column 'reason' would be added; rename it"),
        (sums, "column 'Sum_Probs' would be added; rename it"),
        (table.append_column("image", table["image"]), "has 2 columns 'image' but"),
        (7, "rows: cannot be read as a table: "),
        ({"image": [b""], "number": [1, 2]}, "rows: cannot be read as a table: "),
    ]
    for frame, said in cases:
        with pytest.raises(RequestError, match=said):
            predict_rows(network, frame, probabilities=True)
    assert predict_rows(network, sums).num_rows == ROWS
    names: list[tuple[str, Any, str]] = [
        (
            "image_column",
            "picture",
            "^rows: has no column 'picture' but id, image, number; image_co",
        ),
        (
            "number_column",
            "image",
            "^rows: column 'image' would be two columns of the task; number",
        ),
        ("picture_column", "image", "^picture_column is not one of image_column, number_column$"),
    ]
    for column, name, said in names:
        with pytest.raises(RequestError, match=said):
            predict_rows(network, table, **{column: name})
    broken = deepcopy(network)
    torch.nn.init.constant_(broken.conv1.weight, 3e38)
    with pytest.raises(RunError, match="digit_prob is infinite or NaN for some row"):
        predict_rows(broken, table)


def test_a_model_that_could_not_be_loaded_again_is_not_saved(
    network: TwoHeadCNN, tmp_path: Path
) -> None:
    other: Any = torch.nn.Linear(2, 2)
    with pytest.raises(RequestError, match="not a TwoHeadCNN, and could not be loaded again"):
        save_model(other, tmp_path / "linear")
    assert not (tmp_path / "linear").exists()
    save_model(deepcopy(network).bfloat16(), tmp_path / "rounded")
    weight = load_model(tmp_path / "rounded" / "model.safetensors").get_parameter("conv1.weight")
    assert torch.equal(weight, network.conv1.weight.bfloat16().float())


def test_a_task_of_ones_own_is_predicted_with_its_settings(tmp_path: Path) -> None:
    task, places = Points(PointSettings(hidden=5)), points(6)["place"].numpy()
    torch.manual_seed(0)
    network = task.network().eval()
    save_model(network, tmp_path / "m", task)
    rows = {"where": [*places.tolist(), None]}
    by_model = predict_rows(tmp_path / "m", rows, Points, place_column="where")
    assert by_model == predict_rows(network, rows, task, place_column="where")
    expected = network(points(6)).argmax(1).tolist()
    assert by_model["pred_side"].to_pylist() == [*expected, None]
    with pytest.raises(RequestError, match="its task is points, and not mnistsum; add its --task"):
        load_model(tmp_path / "m")
