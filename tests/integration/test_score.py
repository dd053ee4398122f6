"""A world of good and bad rows and files: each row is predicted as by PyTorch, or says why not.

Scored on a disk and on S3 (moto's server), by commands that differ in their paths alone.
"""

import html
import os
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from mnistsum_ray import RequestError, ScoreConfig, load_model, predict_rows, score
from mnistsum_ray.data.images import Pixels, one_chunk, pixels_view
from mnistsum_ray.model.heads import PREDICTION_FIELDS
from mnistsum_ray.storage.uri import locate
from tests.conftest import check_predictions, plain_predictions
from tests.integration.conftest import Scored, score_here

pytestmark = pytest.mark.usefixtures("cluster")

FILES, ROWS_A_FILE = 3, 715  # every fifth row is bad in one of four ways
BAD = ROWS_A_FILE // 5

NULL = "the image is null; fill it in or drop the row"
WAYS: list[tuple[dict[str, Any], str]] = [
    ({"image": None}, NULL),
    ({"image": b"no"}, "2 bytes are neither 784 pixels nor a readable PNG or JPEG"),
    ({"number": 10}, "the number is 10, not one of 0..9"),
    ({"number": -1, "image": None}, f"{NULL}; the number is -1"),
]
"""Values of a row, and the reason that it gets. More of them: tests/data."""

BAD_FILES = {
    "latin-\\udce9.parquet": "its name is not UTF-8",
    "bad_column.parquet": "has a column 'Reason', which scoring would add; rename it",
    r"bad_\x1b[2J.parquet": "its name holds a control character; rename it",
    "bad_cut.parquet": "was cut off",
    "bad_empty.parquet": "is not Parquet, or was cut off",
    "bad_floats.parquet": "column 'number' has type double, not an integer type",
    "bad_footer.parquet": "is not Parquet, or was cut off",
    "bad_missing.parquet": "has no column 'number' but",
    "bad_pages.parquet": "cannot be read",
    "bad_shape.parquet": "which holds no images",
    "bad_twice.parquet": "more than one column 'number'",
}

DAYS = [datetime(1970, 1, 1), datetime(9999, 12, 31), None]


def rows_of(sample: pa.Table, file: int) -> tuple[pa.Table, Pixels, np.ndarray]:
    """Rows of a file, and the images and numbers that they had before some became bad."""
    places = (np.arange(ROWS_A_FILE) * 7 + file) % 5000
    images = pixels_view(one_chunk(sample["image"].take(pa.array(places))))
    numbers = places % 10
    columns = zip(images, numbers, strict=True)
    rows: list[dict[str, Any]] = [
        {"id": f"{file}-{row}", "image": image.tobytes(), "number": int(number)}
        for row, (image, number) in enumerate(columns)
    ]
    for row in range(0, ROWS_A_FILE, 5):
        rows[row] |= WAYS[row // 5 % len(WAYS)][0]
    kind = pa.schema({"id": pa.string(), "image": pa.binary(), "number": pa.int16()})
    kind = kind.append(pa.field("digit", pa.int8()))  # null
    return pa.Table.from_pylist(rows, kind), images, numbers


@pytest.fixture(scope="module")
def source(sample: pa.Table, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FILES files with bad rows, two with columns of odd types, and BAD_FILES."""
    folder = tmp_path_factory.mktemp("source") / "in"
    folder.mkdir()
    for file in range(FILES):
        pq.write_table(rows_of(sample, file)[0], folder / f"{file:02}.parquet", row_group_size=100)
    three = {"image": sample["image"][:3], "number": [1, 2, 3], "day": DAYS}
    for name, labels in {"floats": [0.0, 0.5, None], "texts": ["0", "zero", None]}.items():
        path = folder / f"{name}.parquet"
        table = pa.table(three | {"digit": labels})
        pq.write_table(table, path, use_deprecated_int96_timestamps=True)  # as Spark writes

    good = rows_of(sample, 0)[0]
    pq.write_table(good, folder / "bad_pages.parquet")
    whole = (folder / "bad_pages.parquet").read_bytes()
    middle = 4 + len(whole) // 2
    pages = whole[:4] + b"\xff" * (middle - 4) + whole[middle:]
    (folder / "bad_pages.parquet").write_bytes(pages)
    (folder / "bad_\x1b[2J.parquet").write_bytes(whole)
    (folder / "bad_cut.parquet").write_bytes(whole[:-1000])
    (folder / "bad_empty.parquet").touch()
    (folder / "bad_footer.parquet").write_bytes(whole[:-8] + b"\xff\xff\xff\x7fPAR1")
    place = good.column_names.index("number")
    tables = {
        "column": good.append_column("Reason", good["id"]),
        "floats": good.set_column(place, "number", good["number"].cast(pa.float64())),
        "missing": good.drop_columns(["number"]),
        "shape": pa.table(
            {"image": [{"data": [0] * 784, "shape": 784}], "number": [1], "digit": [1]}
        ),
        "twice": good.append_column("number", good["number"]),
    }
    for name, table in tables.items():
        pq.write_table(table, folder / f"bad_{name}.parquet")
    Path(os.fsdecode(os.fsencode(folder) + b"/latin-\xe9.parquet")).write_bytes(whole)
    return folder


SETTINGS: dict[str, Any] = {"label_column": "digit", "max_rows_per_file": 300}


@pytest.fixture(scope="module")
def scored(model: Path, source: Path) -> Scored:
    output = source.parent / "out"
    return score_here(model, output, source, num_workers=2, batch_size=20, **SETTINGS)


def test_counts_add_up_and_every_bad_file_is_named_with_its_reason(scored: Scored) -> None:
    line = scored.line
    assert (line["files"], line["failed_files"]) == (FILES + 2 + len(BAD_FILES), len(BAD_FILES))
    assert line["scored_rows"] == FILES * (ROWS_A_FILE - BAD) + 6
    assert line["rejected_rows"] == FILES * BAD
    assert line["input_rows"] - line["failed_rows"] == FILES * ROWS_A_FILE + 6
    manifest = scored.manifest()
    assert sum(manifest["rejected_by_reason"].values()) == line["rejected_rows"]
    files = scored.files()
    said = scored.said.splitlines()
    for name, reason in BAD_FILES.items():
        assert files[name]["status"] == "failed"
        assert reason in files[name]["reason"]
        (written,) = [text for text in said if f"cannot be used: {name}: " in text]
        assert reason in written
        assert not list((scored.output / "predictions").glob(f"{Path(name).stem}*"))
    for file in range(FILES):
        row = files[f"{file:02}.parquet"]
        counts = (row["rows"], row["scored"], row["rejected"])
        assert counts == (ROWS_A_FILE, ROWS_A_FILE - BAD, BAD)
    page = html.unescape((scored.output / "report.html").read_text())
    assert page.replace("\n", "").isprintable(), "a terminal would obey control characters"
    for reason, count in manifest["rejected_by_reason"].items():
        assert f"<td>{count:,}</td><td>{reason}</td><td>" in page


def test_every_bad_row_says_why_and_the_good_rows_beside_it_are_predicted(
    scored: Scored, model: Path, sample: pa.Table
) -> None:
    for file in range(FILES):
        source, images, numbers = rows_of(sample, file)
        table = scored.table(f"{file:02}-*")
        assert table.select(["id", "number"]).equals(source.select(["id", "number"]))
        bad = np.arange(ROWS_A_FILE) % 5 == 0
        for index, row in enumerate(table.filter(pa.array(bad)).to_pylist()):
            assert WAYS[index % len(WAYS)][1] in row["reason"]
            assert [row[name] for name in PREDICTION_FIELDS.names] == [None] * 5
        predicted = table.filter(pa.array(~bad))
        assert predicted["reason"].null_count == len(predicted)
        check_predictions(predicted, plain_predictions(model, images[~bad], numbers[~bad]))


def test_labels_and_columns_of_any_type_cost_no_file(scored: Scored) -> None:
    assert scored.manifest()["labelled_rows"] == 1
    assert "columns whose type changes in the output: day (INT96); " in scored.said
    for name in ("floats", "texts"):
        assert scored.table(f"{name}.parquet")["day"].to_pylist() == DAYS


@pytest.mark.slow
def test_s3_gives_what_a_disk_gives(source: Path, scored: Scored, model: Path) -> None:
    root = locate("s3://scores/run", "--output")
    names = [path.name for path in source.iterdir() if path.name.isprintable()]
    for name in names:
        (root / "in" / name).write((source / name).read_bytes())
    (root / "model/model.safetensors").write((model / "model.safetensors").read_bytes())
    uris = [f"s3://scores/run/{part}" for part in ("model", "out", "in/*.parquet")]
    there = score_here(*uris, **SETTINGS)
    for name in ("scored_rows", "rejected_rows", "digit_accuracy", "sum_accuracy"):
        assert there.line[name] == scored.line[name], name
    assert (there.line["files"], there.line["failed_files"]) == (len(names), len(names) - FILES - 2)
    written = {file.name for file in (root / "out").files()}
    on_disk = {path.name: path for path in scored.output.rglob("*") if path.is_file()}
    assert written == on_disk.keys()
    for name, path in on_disk.items():
        if path.parent.name == "predictions":
            data = (root / "out/predictions" / name).read_bytes()
            found = pq.read_table(pa.BufferReader(data)).replace_schema_metadata()
            assert found.equals(pq.read_table(path).replace_schema_metadata()), name
    again = score_here(*uris, **SETTINGS, overwrite=True).line
    assert (again["resumed_rows"], again["scored_rows"]) == (0, scored.line["scored_rows"])


def test_a_wrong_request_names_the_flag(model: Path, source: Path, tmp_path: Path) -> None:
    request: dict[str, Any] = {"model": str(model), "output": str(tmp_path / "out")}
    said = r"^--image-column picture: no file of --input has it; "
    with pytest.raises(RequestError, match=said):
        score(ScoreConfig(**request, input=(str(source),), image_column="picture"))


@pytest.mark.slow
def test_a_ray_dataset_comes_back_with_predictions(model: Path, sample: pa.Table) -> None:
    """All rows in their order, though the task of the first ones is slow.

    The dataset of the user keeps its own options.
    """
    table, _, _ = rows_of(sample, 0)

    def wait_first(block: pa.Table) -> pa.Table:
        time.sleep(2 if block["id"][0].as_py() == "0-0" else 0)
        return block

    blocks = ray.data.from_arrow([table.slice(start, 100) for start in range(0, len(table), 100)])
    dataset = blocks.map_batches(wait_first, batch_format="pyarrow")
    answered = pa.concat_tables(ray.get(predict_rows(model, dataset).to_arrow_refs()))
    assert not dataset.context.execution_options.preserve_order
    expected = predict_rows(load_model(model), table)
    for name in ("id", "pred_digit", "pred_sum", "consistent", "reason"):
        assert answered[name].to_pylist() == expected[name].to_pylist(), name
