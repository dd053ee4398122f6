"""Checks of the input files: unusable ones get a reason, and a column that no file has is an error of the request."""

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mnistsum_ray.config import ScoreConfig
from mnistsum_ray.data.inputs import list_inputs
from mnistsum_ray.data.parquet import read_table, to_parquet
from mnistsum_ray.errors import RequestError
from mnistsum_ray.scoring.preflight import read_footers
from mnistsum_ray.storage.paths import locate
from tests.conftest import with_footer
from tests.scoring.conftest import CONSOLE

GOOD = pa.table({"image": [bytes(784)] * 3, "number": [1, 2, 3]})

Write = Callable[[Path], object]
"""Writes a file."""


def footers(folder: Path, **columns: Any) -> dict[str, dict[str, Any]]:
    config = ScoreConfig(model="m", input=(str(folder),), output="o", **columns)
    inputs = list_inputs(config.input, locate("/nowhere", "--output"))
    return {row["name"]: row for row in read_footers(inputs, config, CONSOLE).to_pylist()}


def errors(folder: Path, **columns: Any) -> dict[str, str | None]:
    return {name: row["error"] for name, row in footers(folder, **columns).items()}


def test_the_footer_of_a_usable_file(tmp_path: Path) -> None:
    pq.write_table(GOOD, tmp_path / "a.parquet", row_group_size=2)
    row = footers(tmp_path)["a.parquet"]
    assert (row["rows"], row["longest_group"], row["error"]) == (3, 2, None)
    assert row["bytes"] > 3 * 784 / 2  # Parquet stores repeated images once
    wide = GOOD.replace_schema_metadata({"note": "x" * 300_000})  # its footer is longer than the first read
    pq.write_table(wide, tmp_path / "a.parquet")
    assert footers(tmp_path)["a.parquet"]["footer_sha256"] != row["footer_sha256"]


def damaged(damage: Callable[[bytes], bytes]) -> Write:
    return lambda path: path.write_bytes(damage(to_parquet(GOOD).to_pybytes()))


def lying(path: Path) -> None:
    pq.write_table(pa.table({"image": [bytes(784)] * 1234, "number": [1] * 1234}), path)
    with_footer(path, 1234, 2**62)


def with_sql(expression: str) -> Write:
    columns = f"repeat('x', 784)::BLOB AS image, 1 AS number, {expression}"
    return lambda path: duckdb.sql(f"COPY (SELECT {columns}) TO '{path}' (FORMAT parquet)")


def with_column(name: str, values: pa.Array | None, **options: Any) -> Write:
    """GOOD with another column; without the column if there are no values."""
    kept = {column: GOOD[column] for column in GOOD.column_names if column != name}
    table = pa.table(kept | ({} if values is None else {name: values}))
    return lambda path: pq.write_table(table, path, **options)


UNUSABLE: list[tuple[Write, str]] = [
    (damaged(lambda whole: b""), "is empty (0 bytes)"),
    (damaged(lambda whole: b"id,number\n1,2\n" * 100), "is not Parquet, or was cut off"),
    (damaged(lambda whole: whole[:-1]), "is not Parquet, or was cut off"),
    (damaged(lambda whole: whole[:-8] + (2**31 - 1).to_bytes(4, "little") + b"PAR1"), "has a damaged footer"),
    (damaged(lambda whole: whole[:-8][:-40] + b"\xff" * 40 + whole[-8:]), "cannot be read"),
    (damaged(lambda whole: whole[:-4] + b"PARE"), "encrypted"),
    (lying, "has a footer that promises 4,611,686,018,427,387,904 rows in"),
    (with_column("number", None), "has no column 'number' but 'image'; --number-column names another"),
    (with_column("image", None), "has no column 'image' but 'number'; --image-column names another"),
    (with_column("number", pa.array([1.0, 2.0, 3.0])), "column 'number' has type double, not an integer type"),
    (with_column("image", pa.array(["a", "b", "c"])), "column 'image' has type string, which holds no images"),
    (with_column("Digit_probs", pa.array([1, 2, 3])), "has a column 'Digit_probs', which scoring would add; rename it"),
    (
        lambda path: pq.write_table(pa.Table.from_arrays([*GOOD.columns, GOOD["number"]], ["image", "number", "number"]), path),
        "more than one column 'number'",
    ),
]


@pytest.mark.parametrize(("write", "reason"), UNUSABLE, ids=[reason for _, reason in UNUSABLE])
def test_an_unusable_file_gets_a_reason(tmp_path: Path, write: Write, reason: str) -> None:
    write(tmp_path / "a.parquet")
    pq.write_table(GOOD, tmp_path / "good.parquet")
    found = errors(tmp_path, probabilities=True)
    assert reason in str(found["a.parquet"])
    assert found["good.parquet"] is None


DAYS = pa.array([datetime(1500, 12, 31)] * 3, pa.timestamp("us"))
DEEP_DAYS = pa.StructArray.from_arrays([GOOD["image"].combine_chunks(), DAYS], ["bytes", "taken"])


@pytest.mark.parametrize(
    ("write", "recast"),
    [
        (with_sql("INTERVAL '3 days' AS a"), ["a (INTERVAL)"]),
        (with_column("day", DAYS, use_deprecated_int96_timestamps=True), ["day (INT96)"]),
        (with_column("image", DEEP_DAYS, use_deprecated_int96_timestamps=True), []),
    ],
)
def test_a_column_whose_type_changes_is_named_and_its_file_is_used(tmp_path: Path, write: Write, recast: list[str]) -> None:
    write(tmp_path / "a.parquet")
    row = footers(tmp_path)["a.parquet"]
    assert (row["error"], row["recast"]) == (None, recast)
    path = locate(str(tmp_path / "a.parquet"), "--input")
    to_parquet(read_table(path))  # what pyarrow reads it writes


def test_a_column_that_no_file_has_is_refused_and_one_that_some_files_have_is_not(tmp_path: Path) -> None:
    for name in "ab":
        pq.write_table(GOOD.rename_columns(["picture", "number"]), tmp_path / f"{name}.parquet")
    (tmp_path / "empty.parquet").touch()
    message = r"--image-column image: no file of --input has such a column; a\.parquet has no column 'image'"
    with pytest.raises(RequestError, match=message):
        footers(tmp_path)
    with pytest.raises(RequestError, match="--label-column digit"):
        footers(tmp_path, image_column="picture", label_column="digit")
    with_column("digit", pa.array(["a", "b", "c"]))(tmp_path / "labels.parquet")
    assert errors(tmp_path, label_column="digit")["labels.parquet"] is None, "a label of any type costs no file"
    pq.write_table(GOOD, tmp_path / "b.parquet")
    assert errors(tmp_path)["b.parquet"] is None
