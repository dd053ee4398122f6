"""Bad rows and bad files: each is reported with its place and reason, and everything else is scored."""

import html
import os
import re
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mnistsum_ray.data.images import Pixels, one_chunk, pixels_view
from mnistsum_ray.model.heads import PREDICTION_FIELDS
from tests.conftest import check_predictions, plain_predictions
from tests.integration.conftest import Scored, score_here

FILES, ROWS_A_FILE, GROUP = 3, 715, 100  # every fifth row is bad in one of four ways
BAD = ROWS_A_FILE // 5

pytestmark = pytest.mark.usefixtures("cluster")

NULL = "the image is null; fill it in or drop the row"
WAYS: list[tuple[dict[str, Any], str]] = [
    ({"image": None}, NULL),
    ({"image": b"no"}, "2 bytes are neither 784 pixels nor a readable PNG or JPEG"),
    ({"number": 10}, "the number is 10, not one of 0..9"),
    ({"number": -1, "image": None}, f"{NULL}; the number is -1"),
]
"""Values that replace the image or the number of a row, and the reason that the row gets. More of them: tests/data."""

BAD_FILES = {
    "latin-\\udce9.parquet": "its name is not UTF-8",
    "bad_column.parquet": "has a column 'Reason', which scoring would add; rename it",
    "bad_cut.parquet": "was cut off",
    "bad_missing.parquet": "has no column 'number'",
    "bad_pages.parquet": "cannot be read",
    "bad_shape.parquet": "which holds no images",
}


def rows_of(sample: pa.Table, file: int) -> tuple[pa.Table, Pixels, np.ndarray]:
    places = (np.arange(ROWS_A_FILE) * 7 + file) % 5000
    images = pixels_view(one_chunk(sample["image"].take(pa.array(places))))
    numbers = places % 10
    rows: list[dict[str, Any]] = [
        {"id": f"{file}-{row}", "image": image.tobytes(), "number": int(number)}
        for row, (image, number) in enumerate(zip(images, numbers, strict=True))
    ]
    for row in range(0, ROWS_A_FILE, 5):
        rows[row] |= WAYS[row // 5 % len(WAYS)][0]
    kind = pa.schema({"id": pa.string(), "image": pa.binary(), "number": pa.int16()})
    return pa.Table.from_pylist(rows, kind), images, numbers


@pytest.fixture(scope="module")
def source(sample: pa.Table, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FILES files with bad rows, and BAD_FILES."""
    folder = tmp_path_factory.mktemp("bad") / "in"
    folder.mkdir()
    for file in range(FILES):
        pq.write_table(
            rows_of(sample, file)[0], folder / f"{file:02}.parquet", row_group_size=GROUP
        )
    good = rows_of(sample, 0)[0]
    pq.write_table(good, folder / "bad_pages.parquet")
    whole = (folder / "bad_pages.parquet").read_bytes()
    middle = 4 + len(whole) // 2
    (folder / "bad_pages.parquet").write_bytes(whole[:4] + b"\xff" * (middle - 4) + whole[middle:])
    (folder / "bad_cut.parquet").write_bytes(whole[:-1000])
    pq.write_table(good.append_column("Reason", good["id"]), folder / "bad_column.parquet")
    pq.write_table(good.drop_columns(["number"]), folder / "bad_missing.parquet")
    shapes = pa.table({"image": [{"data": [0] * 784, "shape": 784}], "number": [1]})
    pq.write_table(shapes, folder / "bad_shape.parquet")
    Path(os.fsdecode(os.fsencode(folder) + b"/latin-\xe9.parquet")).write_bytes(whole)
    return folder


@pytest.fixture(scope="module")
def scored(model: Path, source: Path) -> Scored:
    return score_here(
        model, source.parent / "out", source, label_column=None, max_rows_per_file=300
    )


def test_counts_add_up_and_every_bad_file_is_named_with_its_reason(scored: Scored) -> None:
    line = scored.line
    assert (line["files"], line["failed_files"]) == (FILES + len(BAD_FILES), len(BAD_FILES))
    assert line["scored_rows"] + line["rejected_rows"] == FILES * ROWS_A_FILE
    assert line["rejected_rows"] == FILES * BAD
    manifest = scored.manifest()
    assert sum(manifest["rejected_by_reason"].values()) == line["rejected_rows"]
    files = scored.files()
    for name, reason in BAD_FILES.items():
        assert files[name]["status"] == "failed"
        assert reason in files[name]["reason"]
        (written,) = [
            said
            for said in scored.said.splitlines()
            if said.startswith(f"cannot be used: {name}: ")
        ]
        assert reason in written
        assert not list((scored.output / "predictions").glob(f"{Path(name).stem}*"))
    for file in range(FILES):
        row = files[f"{file:02}.parquet"]
        assert (row["rows"], row["scored"], row["rejected"]) == (
            ROWS_A_FILE,
            ROWS_A_FILE - BAD,
            BAD,
        )
    page = html.unescape((scored.output / "report.html").read_text())
    assert all(
        f"<td>{count:,}</td><td>{reason}</td><td>" in page
        for reason, count in manifest["rejected_by_reason"].items()
    )
    assert re.search(r"<td>\d\d\.parquet, row \d+</td>", page), "examples"


def test_every_bad_row_says_why_and_the_good_rows_beside_it_are_scored(
    scored: Scored, model: Path, sample: pa.Table
) -> None:
    file = FILES - 1
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


@pytest.mark.slow
def test_a_later_run_scores_a_file_that_was_repaired_and_no_other(
    scored: Scored, model: Path, source: Path, sample: pa.Table, tmp_path: Path
) -> None:
    output, folder = Path(shutil.copytree(scored.output, tmp_path / "out")), tmp_path / "in"
    before = {path: path.stat().st_mtime_ns for path in (output / "predictions").iterdir()}
    shutil.copytree(source, folder, copy_function=os.link)  # a copy of a file is another file
    (folder / "late.parquet").write_bytes(b"no")
    (folder / "bad_cut.parquet").unlink()
    pq.write_table(rows_of(sample, 0)[0], folder / "bad_cut.parquet")
    late = score_here(model, output, folder, max_rows_per_file=300)
    assert late.line["failed_files"] == len(BAD_FILES)
    assert (
        "cannot be used: late.parquet: is not Parquet, or was cut off; write it again" in late.said
    )
    assert late.line["resumed_rows"] == FILES * ROWS_A_FILE
    assert late.line["scored_rows"] == scored.line["scored_rows"] + ROWS_A_FILE - BAD
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_all_rows_bad_and_no_rows_at_all(model: Path, tmp_path: Path) -> None:
    """A path beside an image, as Hugging Face writes it, is not followed."""
    (tmp_path / "in").mkdir()
    Image.new("L", (28, 28)).save(tmp_path / "secret.png")
    places = ["../secret.png", str(tmp_path / "secret.png")]
    tables = {
        "none": pa.table({"image": pa.array([], pa.binary()), "number": pa.array([], pa.int8())}),
        "nulls": pa.table({"image": pa.nulls(3), "number": pa.nulls(3)}),
        "paths": pa.table(
            {"image": [{"bytes": None, "path": path} for path in places], "number": [1, 2]}
        ),
    }
    for name, table in tables.items():
        pq.write_table(table, tmp_path / "in" / f"{name}.parquet")
    scored = score_here(model, tmp_path / "out", tmp_path / "in")
    assert (
        scored.line["input_rows"],
        scored.line["scored_rows"],
        scored.line["rejected_rows"],
    ) == (5, 0, 5)
    assert scored.files()["none.parquet"]["status"] == "scored"
    assert scored.table("none.parquet").num_rows == 0
    assert scored.table("none.parquet").column_names == scored.table("nulls.parquet").column_names
    reason = f"{NULL}; the number is null; fill it in or drop the row"
    assert scored.table("nulls.parquet")["reason"].to_pylist() == [reason] * 3
    assert scored.table("paths.parquet")["reason"].null_count == 0


def test_labels_and_columns_of_any_type_cost_no_file(
    model: Path, sample: pa.Table, tmp_path: Path
) -> None:
    """As Spark writes them: INT96, and digits as text or as decimals."""
    (tmp_path / "in").mkdir()
    rows = {"image": sample["image"][:3], "number": [1, 2, 3]}
    digits = {"floats": [0.0, 0.5, None], "texts": ["0", "zero", None]}
    days = [datetime(1970, 1, 1), datetime(9999, 12, 31), None]
    for name, labels in digits.items():
        table = pa.table(rows | {"digit": labels, "day": days})
        pq.write_table(
            table, tmp_path / "in" / f"{name}.parquet", use_deprecated_int96_timestamps=True
        )
    scored = score_here(model, tmp_path / "out", tmp_path / "in", label_column="digit")
    assert (scored.line["scored_rows"], scored.line["failed_files"]) == (6, 0)
    assert scored.manifest()["labelled_rows"] == 1
    assert "columns whose type changes in the output: day (INT96); " in scored.said
    assert "3 labels outside 0..9, counted as unknown\n" in scored.said
    for name, labels in digits.items():
        table = scored.table(f"{name}.parquet")
        assert table["digit"].to_pylist() == labels
        assert table["day"].to_pylist() == days
