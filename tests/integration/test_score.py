"""Good and bad rows and files: each row is predicted as by PyTorch, or says why not.

Scored on a disk and on S3 (moto's server), by commands that differ in their paths alone.
"""

import time
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from mnistsum_ray import RequestError, load_model, predict_rows
from mnistsum_ray.data.images import Pixels, one_chunk, pixels_view
from mnistsum_ray.model.heads import PREDICTION_FIELDS
from mnistsum_ray.storage.uri import locate
from tests.conftest import check_predictions, plain_predictions
from tests.integration.conftest import Scored, score_here

pytestmark = pytest.mark.usefixtures("cluster")

FILES, ROWS = 3, 715  # every fifth row is bad in one of four ways
BAD = ROWS // 5

NULL = "the image is null; fill it in or drop the row"
WAYS: list[tuple[dict[str, Any], str]] = [
    ({"image": None}, NULL),
    ({"image": b"no"}, "2 bytes are neither 784 pixels nor a readable PNG or JPEG"),
    ({"number": 10}, "the number is 10, not one of 0..9"),
    ({"number": -1, "image": None}, f"{NULL}; the number is -1"),
]
"""Values of a row, and the reason that it gets. More of them: tests/data."""

BAD_FILES = {
    "column.parquet": "has a column 'Reason', which scoring would add; rename it",
    r"control\x1b[2J.parquet": "its name holds a control character; rename it",
    "empty.parquet": "is empty (0 bytes)",
    "floats.parquet": "column 'number' has type double, not an integer type",
    "missing.parquet": "has no column 'number' but",
    "pages.parquet": "cannot be read",
    "shape.parquet": "which holds no images",
}

DAYS = [datetime(1970, 1, 1), datetime(9999, 12, 31), None]
KINDS = {"image": pa.binary(), "number": pa.int16(), "day": pa.timestamp("us")}


def rows_of(sample: pa.Table, file: int) -> tuple[pa.Table, Pixels, np.ndarray]:
    """Rows of a file, and the images and numbers that they had before some became bad."""
    places = (np.arange(ROWS) * 7 + file) % 5000
    images = pixels_view(one_chunk(sample["image"].take(pa.array(places))))
    numbers = places % 10
    rows: list[dict[str, Any]] = []
    for row, (image, number) in enumerate(zip(images, numbers, strict=True)):
        rows.append({"image": image.tobytes(), "number": int(number), "day": DAYS[row % 3]})
        if row % 5 == 0:
            rows[row] |= WAYS[row // 5 % len(WAYS)][0]
    return pa.Table.from_pylist(rows, pa.schema(KINDS)), images, numbers


@pytest.fixture(scope="module")
def source(sample: pa.Table, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FILES files with bad rows, and BAD_FILES."""
    folder = tmp_path_factory.mktemp("source") / "in"
    folder.mkdir()
    for file in range(FILES):
        path = folder / f"{file:02}.parquet"
        table, _, _ = rows_of(sample, file)
        # As Spark writes days.
        pq.write_table(table, path, row_group_size=100, use_deprecated_int96_timestamps=True)
    whole = bytearray(path.read_bytes())
    (folder / "control\x1b[2J.parquet").write_bytes(whole)
    middle = len(whole) // 2
    whole[4:middle] = b"\xff" * (middle - 4)
    (folder / "pages.parquet").write_bytes(whole)
    (folder / "empty.parquet").touch()
    tables = {
        "column": table.append_column("Reason", table["day"]),
        "floats": table.set_column(1, "number", table["number"].cast(pa.float64())),
        "missing": table.drop_columns(["number"]),
        "shape": pa.table({"image": [{"data": [0] * 784, "shape": 784}], "number": [1]}),
    }
    for name, bad in tables.items():
        pq.write_table(bad, folder / f"{name}.parquet")
    return folder


@pytest.fixture(scope="module")
def scored(model: Path, source: Path) -> Scored:
    settings = {"num_workers": 2, "batch_size": 20, "max_rows_per_file": 300}
    return score_here(model, source.parent / "out", source, **settings)


def test_counts_add_up_and_every_bad_file_is_named_with_its_reason(scored: Scored) -> None:
    line = scored.line
    assert (line["files"], line["failed_files"]) == (FILES + len(BAD_FILES), len(BAD_FILES))
    assert (line["scored_rows"], line["rejected_rows"]) == (FILES * (ROWS - BAD), FILES * BAD)
    assert line["input_rows"] - line["failed_rows"] == FILES * ROWS
    files = {row["file"]: row for row in pq.read_table(scored.output / "files.parquet").to_pylist()}
    for name, reason in BAD_FILES.items():
        assert files[name]["status"] == "failed"
        assert reason in files[name]["reason"]
        assert f"cannot be used: {name}: {files[name]['reason']}\n" in scored.said
    assert {path.name[:2] for path in (scored.output / "predictions").iterdir()} == {
        f"{file:02}" for file in range(FILES)
    }
    assert "columns whose type changes in the output: day (INT96); " in scored.said
    page = (scored.output / "report.html").read_text()
    assert page.replace("\n", "").isprintable(), "a terminal would obey control characters"
    assert WAYS[2][1] in page


def test_every_bad_row_says_why_and_the_good_rows_beside_it_are_predicted(
    scored: Scored, model: Path, sample: pa.Table
) -> None:
    for file in range(FILES):
        source, images, numbers = rows_of(sample, file)
        table = scored.table(f"{file:02}-*")
        assert table.select(["number", "day"]).to_pydict() == source.drop("image").to_pydict()
        bad = np.arange(ROWS) % 5 == 0
        for index, row in enumerate(table.filter(pa.array(bad)).to_pylist()):
            assert WAYS[index % len(WAYS)][1] in row["reason"]
            assert [row[name] for name in PREDICTION_FIELDS.names] == [None] * 5
        predicted = table.filter(pa.array(~bad))
        assert predicted["reason"].null_count == len(predicted)
        check_predictions(predicted, plain_predictions(model, images[~bad], numbers[~bad]))


@pytest.mark.slow
def test_s3_gives_what_a_disk_gives(source: Path, scored: Scored, model: Path) -> None:
    root = locate("s3://bucket/run", "--output")
    for path in source.glob("0*"):
        (root / "in" / path.name).write(path.read_bytes())
    (root / "model/model.safetensors").write((model / "model.safetensors").read_bytes())
    uris = [f"s3://bucket/run/{part}" for part in ("model", "out", "in/*.parquet")]
    for overwrite in (False, True):
        line = score_here(*uris, max_rows_per_file=300, overwrite=overwrite).line
        assert (line["resumed_rows"], line["scored_rows"]) == (0, scored.line["scored_rows"])
    for path in (scored.output / "predictions").iterdir():
        data = (root / "out/predictions" / path.name).read_bytes()
        assert pq.read_table(pa.BufferReader(data)).equals(pq.read_table(path)), path


def test_a_column_that_is_nowhere_names_its_flag(source: Path, model: Path, tmp_path: Path) -> None:
    said = "^--image-column picture: no file of --input has such a column"
    with pytest.raises(RequestError, match=said):
        score_here(model, tmp_path / "out", source, image_column="picture")


@pytest.mark.slow
def test_a_ray_dataset_comes_back_with_predictions(model: Path, sample: pa.Table) -> None:
    """All rows in their order, though the task of the first ones is slow.

    The dataset of the user keeps its own options.
    """
    table = rows_of(sample, 0)[0].append_column("id", pa.array(range(ROWS)))

    def wait_first(block: pa.Table) -> pa.Table:
        time.sleep(0 if block["id"][0].as_py() else 2)
        return block

    blocks = ray.data.from_arrow([table.slice(start, 100) for start in range(0, ROWS, 100)])
    dataset = blocks.map_batches(wait_first, batch_format="pyarrow")
    answered = pa.concat_tables(ray.get(predict_rows(model, dataset).to_arrow_refs()))
    assert not dataset.context.execution_options.preserve_order
    expected = predict_rows(load_model(model), table)
    for name in ("id", "pred_digit", "pred_sum", "consistent", "reason"):
        assert answered[name].to_pylist() == expected[name].to_pylist(), name
