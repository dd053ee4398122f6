"""Checks of the input files: unusable ones get a reason, and a column that no file has is an error of the request."""

import json
import pickle
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mnistsum_ray.config import ScoreConfig
from mnistsum_ray.data.inputs import list_inputs
from mnistsum_ray.data.parquet import open_parquet, plain_arrow_types, to_parquet
from mnistsum_ray.errors import RequestError
from mnistsum_ray.scoring.preflight import read_footers
from mnistsum_ray.storage.paths import locate
from tests.conftest import with_footer

GOOD = pa.table({"image": [bytes(784)] * 3, "number": [1, 2, 3]})


def footers(folder: Path, **columns: Any) -> dict[str, dict[str, Any]]:
    config = ScoreConfig(model="m", input=(str(folder),), output="o", **columns)
    inputs = list_inputs(config.input, locate("/nowhere", "--output"))
    return {row["name"]: row for row in read_footers(inputs, config).to_pylist()}


def test_the_footer_of_a_usable_file(tmp_path: Path) -> None:
    pq.write_table(GOOD, tmp_path / "a.parquet", row_group_size=2)
    row = footers(tmp_path)["a.parquet"]
    assert (row["rows"], row["longest_group"], row["error"]) == (3, 2, None)
    assert row["bytes"] > 3 * 784 / 2  # Parquet stores repeated images once
    wide = GOOD.slice(1).replace_schema_metadata({"note": "x" * 300_000})  # its footer is longer than the first read
    pq.write_table(wide, tmp_path / "a.parquet")
    again = footers(tmp_path)["a.parquet"]
    assert (again["rows"], again["error"]) == (2, None)
    assert again["footer_sha256"] != row["footer_sha256"]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda whole: b"", "is empty (0 bytes)"),
        (lambda whole: b"id,number\n1,2\n" * 100, "is not Parquet, or was cut off"),
        (lambda whole: whole[:-1], "is not Parquet, or was cut off"),
        (lambda whole: whole[:-8] + (2**31 - 1).to_bytes(4, "little") + b"PAR1", "has a damaged footer"),
        (lambda whole: whole[:-8][:-40] + b"\xff" * 40 + whole[-8:], "cannot be read"),
        (lambda whole: whole[:-4] + b"PARE", "is encrypted Parquet"),
    ],
)
def test_a_damaged_file_gets_a_reason(tmp_path: Path, damage: Callable[[bytes], bytes], reason: str) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(GOOD, path)
    path.write_bytes(damage(path.read_bytes()))
    row = footers(tmp_path)["a.parquet"]
    assert reason in row["error"]
    assert row["rows"] is None


def test_a_footer_that_promises_too_many_rows_makes_that_file_unusable(tmp_path: Path) -> None:
    for name in ("wrong", "good"):
        pq.write_table(pa.table({"image": [bytes(784)] * 1234, "number": [1] * 1234}), tmp_path / f"{name}.parquet")
    with_footer(tmp_path / "wrong.parquet", 1234, 2**62)
    found = footers(tmp_path)
    assert "has a footer that promises 4,611,686,018,427,387,904 rows in" in found["wrong.parquet"]["error"]
    assert (found["good.parquet"]["rows"], found["good.parquet"]["error"]) == (1234, None)


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("INTERVAL '3 days'", "column 'other' has the type INTERVAL, which would be lost"),
        ("TIMETZ '10:11:12+03'", "column 'other' has the type TIME WITH TIME ZONE, which would be lost"),
        ("42::VARIANT", "column 'other' has the type VARIANT, which would be lost"),
    ],
)
def test_a_type_that_pyarrow_cannot_write_back_makes_the_file_unusable(tmp_path: Path, expression: str, reason: str) -> None:
    path = tmp_path / "a.parquet"
    duckdb.sql(f"COPY (SELECT repeat('x', 784)::BLOB AS image, 1 AS number, {expression} AS other) TO '{path}' (FORMAT parquet)")
    assert reason in footers(tmp_path)["a.parquet"]["error"]


@pytest.mark.parametrize("column", ["day", "deep", "image"])
def test_an_int96_timestamp_makes_the_file_unusable(tmp_path: Path, column: str) -> None:
    """Spark writes them. pyarrow would read either other nanoseconds or, of distant years, other dates."""
    days = pa.array([datetime(1500, 12, 31)] * 3, pa.timestamp("us"))
    deep = pa.StructArray.from_arrays([GOOD["image"].combine_chunks(), days], ["bytes", "taken"])
    other = {"day": {"day": days}, "deep": {"deep": deep}, "image": {"image": deep}}[column]
    table = pa.table({name: GOOD[name] for name in GOOD.column_names} | other)
    pq.write_table(table, tmp_path / "a.parquet", use_deprecated_int96_timestamps=True)
    assert f"column {column!r} has the type INT96, which would be lost; cast it" in footers(tmp_path)["a.parquet"]["error"]


@pytest.mark.parametrize("mark", [json.dumps, pickle.dumps, lambda shape: None], ids=["Ray", "Ray 2.54", "Arrow"])
@pytest.mark.parametrize(
    ("shape", "error"), [((56, 14), "'image' holds tensors of shape [56, 14], not [28, 28]"), ((28, 28), None)]
)
def test_tensors_of_another_shape_make_the_file_unusable(tmp_path: Path, mark: Any, shape: tuple[int, int], error: str) -> None:
    if metadata := mark(shape):
        lists = pa.array([[0] * 784] * 3, pa.large_list(pa.uint8()))
        marks = {"ARROW:extension:name": "ray.data.arrow_tensor_v2", "ARROW:extension:metadata": metadata}
        image = pa.field("image", lists.type, metadata=marks)
    else:
        lists = pa.FixedShapeTensorArray.from_numpy_ndarray(np.zeros((3, *shape), np.uint8))
        image = pa.field("image", lists.type)
    table = pa.Table.from_arrays([lists, GOOD["number"]], schema=pa.schema([image, GOOD.schema.field("number")]))
    with plain_arrow_types():  # of the pickle, the types of Ray in this process would raise an error
        pq.write_table(table, tmp_path / "a.parquet")
    found = footers(tmp_path)["a.parquet"]["error"]
    assert (error in found) if error else found is None


def test_every_other_type_of_duckdb_is_written_back_unchanged(tmp_path: Path) -> None:
    path, again = tmp_path / "a.parquet", tmp_path / "again.parquet"
    others = [
        *("'{\"a\": 1}'::JSON", "uuid()", "TIME '10:11:12'", "TIMESTAMPTZ '2020-01-01 00:00:00+00'", "TIMESTAMP_NS '2020-01-01'"),
        *("1.5::DECIMAL(9, 2)", "MAP {'a': 1}", "{'x': 1}", "[1, 2]", "DATE '2020-01-01'", "'a'::ENUM ('a', 'b')", "1::UTINYINT"),
    ]
    columns = ", ".join(f"{other} AS other{index}" for index, other in enumerate(others))
    duckdb.sql(f"COPY (SELECT repeat('x', 784)::BLOB AS image, 1 AS number, {columns}) TO '{path}' (FORMAT parquet)")
    assert footers(tmp_path)["a.parquet"]["error"] is None
    with open_parquet(locate(str(path), "--input")) as file:
        again.write_bytes(to_parquet(file.read()))
    types = ", ".join(f"typeof(other{index})" for index in range(len(others)))
    before, after = (duckdb.execute(f"SELECT *, {types} FROM '{file}'").fetchall() for file in (path, again))
    assert before == after


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        (GOOD.drop_columns(["number"]), "has no column 'number' but 'image'; --number-column names another"),
        (GOOD.drop_columns(["image"]), "has no column 'image' but 'number'; --image-column names another"),
        (GOOD.set_column(1, "number", pa.array([1.0, 2.0, 3.0])), "column 'number' has type double, not an integer type"),
        (GOOD.set_column(0, "image", pa.array(["a", "b", "c"])), "column 'image' has type string, which holds no images"),
        (GOOD.append_column("pred_sum", pa.array([1, 2, 3])), "has a column 'pred_sum', which scoring would add; rename it"),
        (pa.Table.from_arrays([*GOOD.columns, GOOD["number"]], ["image", "number", "number"]), "more than one column 'number'"),
    ],
)
def test_unusable_columns_are_named(tmp_path: Path, table: pa.Table, reason: str) -> None:
    pq.write_table(table, tmp_path / "a.parquet")
    pq.write_table(GOOD, tmp_path / "good.parquet")
    found = footers(tmp_path)
    assert reason in found["a.parquet"]["error"]
    assert (found["a.parquet"]["rows"], found["good.parquet"]["error"]) == (3, None)


def test_columns_of_probabilities_are_added_where_they_are_asked_for(tmp_path: Path) -> None:
    (tmp_path / "sum_probs=1").mkdir()
    pq.write_table(GOOD.append_column("Digit_probs", pa.array([1, 2, 3])), tmp_path / "a.parquet")
    pq.write_table(GOOD, tmp_path / "sum_probs=1" / "b.parquet")
    assert [row["error"] for row in footers(tmp_path).values()] == [None, None]
    file, folder = (row["error"] for row in footers(tmp_path, probabilities=True).values())
    assert file == "has a column 'Digit_probs', which scoring would add; rename it"
    assert folder.startswith("lies in a folder 'sum_probs=1', which readers take for the column that scoring adds")


@pytest.mark.parametrize("folder", ["Consistent=1/deep", "sum%5Fprob=0", "reason=none"])
def test_a_folder_that_readers_take_for_a_column_of_the_output_makes_its_files_unusable(tmp_path: Path, folder: str) -> None:
    for name in (folder, "day=1", "no=pred_digit"):
        (tmp_path / name).mkdir(parents=True)
        pq.write_table(GOOD, tmp_path / name / "a.parquet")
    errors = {name: row["error"] for name, row in footers(tmp_path).items()}
    assert "which readers take for the column that scoring adds" in errors.pop(f"{folder}/a.parquet")
    assert errors == {"day=1/a.parquet": None, "no=pred_digit/a.parquet": None}


def test_a_column_that_no_file_has_is_refused_and_one_that_some_files_have_is_not(tmp_path: Path) -> None:
    for name in "ab":
        pq.write_table(GOOD.rename_columns(["picture", "number"]), tmp_path / f"{name}.parquet")
    (tmp_path / "empty.parquet").touch()
    message = r"--image-column image: no file of --input has such a column; a\.parquet has no column 'image'"
    with pytest.raises(RequestError, match=message):
        footers(tmp_path)
    with pytest.raises(RequestError, match="--label-column digit"):
        footers(tmp_path, image_column="picture", label_column="digit")
    pq.write_table(GOOD, tmp_path / "b.parquet")
    assert footers(tmp_path)["b.parquet"]["error"] is None
