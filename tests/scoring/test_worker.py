"""Reading parts: every row is read once, in order, and damaged files are reported. Written parts: columns, metadata, stamp."""

import json
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mnistsum_ray.errors import StorageError, UnusableFileError
from mnistsum_ray.scoring.output import OutputFiles
from mnistsum_ray.scoring.preflight import Plan
from mnistsum_ray.scoring.stamp import COUNTS_KEY, FORMAT, KEY
from mnistsum_ray.scoring.worker import PartRows, read_parts, write_part
from mnistsum_ray.storage.paths import locate
from tests.scoring.conftest import CONSOLE, parts_of, plan_of, predictions, write_all


def write(path: Path, rows: int, group: int) -> pa.Table:
    images = [(np.arange(784) + row).astype(np.uint8).tobytes() for row in range(rows)]
    labels = [None if row % 3 == 0 else row % 10 for row in range(rows)]
    table = pa.table({"id": range(rows), "image": images, "number": [row % 11 for row in range(rows)], "label": labels})
    pq.write_table(table, path, row_group_size=group)
    return table


def read(plan: Plan) -> list[PartRows | UnusableFileError]:
    return [rows for _, rows in read_parts(plan.inputs.root, parts_of(plan), plan.config)]


def read_one(folder: Path) -> PartRows:
    (rows,) = read(plan_of(folder))
    assert isinstance(rows, PartRows), rows
    return rows


@pytest.mark.parametrize("max_rows_per_file", [7, 100, 2500, 9000])
@pytest.mark.parametrize("group", [90, 5000])
def test_every_row_is_read_once_in_order_and_decoded(tmp_path: Path, max_rows_per_file: int, group: int) -> None:
    table = write(tmp_path / "a.parquet", 5000, group)
    plan = plan_of(tmp_path, max_rows_per_file=max_rows_per_file, label_column="label")
    position = 0
    for decoded in read(plan):
        assert isinstance(decoded, PartRows)
        assert decoded.part.first_row == position
        ids = np.arange(position, position + decoded.part.rows)
        assert decoded.table["id"].to_pylist() == ids.tolist()
        assert decoded.table.column_names == table.column_names
        bad = ids % 11 == 10
        assert list(decoded.reasons) == np.flatnonzero(bad).tolist()
        assert decoded.numbers.tolist() == np.where(bad, 0, ids % 11).tolist()
        assert decoded.labels is not None
        assert decoded.labels.tolist() == [-1 if row % 3 == 0 else row % 10 for row in ids]
        assert [image.tobytes() for image in decoded.images] == table["image"].take(pa.array(ids)).to_pylist()
        position += decoded.part.rows
    assert position == 5000
    last = parts_of(plan)[-1]
    ((_, decoded),) = read_parts(plan.inputs.root, [last], plan.config)
    assert isinstance(decoded, PartRows)
    assert decoded.table["id"].to_pylist() == list(range(last.first_row, 5000)), "read alone"


def test_a_file_that_changes_during_the_run_is_unreadable(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", 50, 50)
    write(tmp_path / "b.parquet", 50, 50)
    plan = plan_of(tmp_path)
    write(tmp_path / "a.parquet", 60, 50)
    changed, whole = read(plan)
    assert "has changed since the run began" in str(changed)
    assert isinstance(whole, PartRows)


def test_a_file_that_is_gone_is_waited_for_and_no_fault_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may lie on a node without the mount, or its storage may be away for a moment."""
    table = write(tmp_path / "a.parquet", 50, 50)
    plan = plan_of(tmp_path)
    waited: list[float] = []

    def come_back(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 2:
            (tmp_path / "away").rename(tmp_path / "a.parquet")

    monkeypatch.setattr("time.sleep", come_back)
    (tmp_path / "a.parquet").rename(tmp_path / "away")
    (rows,) = read(plan)
    assert isinstance(rows, PartRows)
    assert rows.table.num_rows == table.num_rows
    assert waited == [1, 2]
    (tmp_path / "a.parquet").unlink()
    monkeypatch.setattr("time.monotonic", iter(range(0, 1000, 20)).__next__)
    with pytest.raises(StorageError, match=r"a\.parquet: is not there any more, or not on this node"):
        read(plan)


def other_column(values: pa.Array) -> pa.Table:
    """A table whose first row is bad, with another column."""
    count = len(values)
    return pa.table({"image": [bytes(784)] * count, "number": [77, *range(1, count)], "label": [1] * count, "other": values})


VIEWS = {
    "string_view": pa.array(["a", None, "c"], pa.string_view()),
    "binary_view": pa.array([b"a", None, b"c"], pa.binary_view()),
    "list_view": pa.array([[1], None, [2, 3]], pa.list_view(pa.int64())),
    "large_list_view": pa.array([[1], None, [2, 3]], pa.large_list_view(pa.int64())),
    "list of string_view": pa.array([["a"], None, ["b", "c"]], pa.list_(pa.string_view())),
    "struct of string_view": pa.array([{"x": "a"}, None, {"x": "c"}], pa.struct({"x": pa.string_view()})),
    "map of string_view": pa.array([[("k", "a")], None, [("k", "c")]], pa.map_(pa.string(), pa.string_view())),
}


@pytest.mark.parametrize("name", VIEWS)
def test_with_a_view_column_only_the_bad_row_is_rejected(tmp_path: Path, name: str) -> None:
    pq.write_table(other_column(VIEWS[name]), tmp_path / "a.parquet")
    plan = plan_of(tmp_path, tmp_path / "out" / "deep")
    write_all(plan)
    good, bad = (
        pq.ParquetFile(tmp_path / "out" / "deep" / folder / "a.parquet").read() for folder in ("predictions", "rejected")
    )
    assert good["other"].to_pylist() == VIEWS[name].to_pylist()[1:]
    assert bad["other"].to_pylist() == VIEWS[name].to_pylist()[:1]


def test_images_in_a_binary_view_are_decoded(tmp_path: Path) -> None:
    images = [(np.arange(784) + row).astype(np.uint8).tobytes() for row in range(3)]
    pq.write_table(
        other_column(pa.array([1, 2, 3])).set_column(0, "image", pa.array(images, pa.binary_view())), tmp_path / "a.parquet"
    )
    assert [image.tobytes() for image in read_one(tmp_path).images] == images


@pytest.mark.parametrize("year", [1500, 9999])
@pytest.mark.parametrize("nested", [False, True])
def test_a_file_with_an_int96_timestamp_out_of_range_is_unreadable(tmp_path: Path, year: int, nested: bool) -> None:
    days = pa.array([datetime(2020, 1, 1), datetime(year, 12, 31)], pa.timestamp("us"))
    column = pa.StructArray.from_arrays([days], ["day"]) if nested else days
    for name, values in (("a", column), ("b", column.take(pa.array([0, 0])))):
        pq.write_table(other_column(values), tmp_path / f"{name}.parquet", use_deprecated_int96_timestamps=True)
    unreadable, readable = read(plan_of(tmp_path))
    assert "column 'other' holds INT96 timestamps outside of the years 1677 to 2262" in str(unreadable)
    assert isinstance(readable, PartRows)


def test_a_file_with_a_wrong_page_checksum_is_unreadable(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, 784).astype(np.uint8).tobytes() for _ in range(50)]
    table = pa.table({"image": images, "number": [1] * 50, "label": [1] * 50})
    options = {
        "compression": "none",
        "use_dictionary": False,
        "write_statistics": False,
    }  # so that the file holds each image once, as it is
    pq.write_table(table, tmp_path / "a.parquet", write_page_checksum=True, **options)
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    offset = data.index(images[20])
    data[offset + 100] ^= 1  # changes one pixel by 1
    (tmp_path / "a.parquet").write_bytes(data)
    (damaged,) = read(plan_of(tmp_path))
    assert "CRC checksum verification failed" in str(damaged)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A file with five rows in two parts, the last two bad; the folder of its output."""
    (tmp_path / "in" / "deep").mkdir(parents=True)
    table = pa.table({"image": [bytes(784)] * 5, "number": [1, 2, 3, 44, 55], "Reason": ["a"] * 5, "label": [0, 1, None, 3, 4]})
    table = table.replace_schema_metadata({b"pandas": b"{}", b"huggingface": b"{}", b"mine": b"yes"})
    pq.write_table(table, tmp_path / "in" / "deep" / "a.parquet", row_group_size=1)
    write_all(plan_of(tmp_path / "in", tmp_path / "out", max_rows_per_file=4, label_column="label"))
    return tmp_path / "out"


NAME = "deep/a-00000-of-00002.parquet"


def stamps(output: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = OutputFiles.read(locate(str(output), "--output"), CONSOLE).stamps.to_pylist()
    return found


def test_the_files_of_a_part_and_their_stamp(written: Path) -> None:
    good = pq.ParquetFile(written / "predictions" / NAME).read()
    assert good.column_names == ["number", "Reason", "label", "pred_digit", "digit_prob", "pred_sum", "sum_prob", "consistent"]
    assert good["consistent"].to_pylist() == [False, True, True]
    assert good.schema.metadata.keys() == {b"pandas", b"mine", KEY, COUNTS_KEY}, "all of the input but what names its columns"
    bad = pq.ParquetFile(written / "rejected" / NAME).read()
    assert bad.column_names == ["image", "number", "input_Reason", "label", "source_file", "source_row", "reason"]
    assert (bad["source_row"].to_pylist(), bad["source_file"][0].as_py()) == (
        [3],
        str(written.parent / "in" / "deep" / "a.parquet"),
    )
    assert bad["reason"].to_pylist() == ["the number is 44, not one of 0..9; correct it or drop the row"]
    first, last = stamps(written)
    assert [first[name] for name in ("first_row", "rows", "rejected", "rows_in_file", "rejected_in_file")] == [0, 4, 1, 3, 1]
    assert [last[name] for name in ("first_row", "rows", "rejected", "rows_in_file", "rejected_in_file")] == [4, 1, 1, 0, 1]
    assert first["error"] is None
    counts = json.loads(first["counts"])
    assert (counts["consistent"], counts["digits"][:4], counts["unsure"][2]) == (
        2,
        [1, 1, 1, 0],
        [0.5, "deep/a.parquet", 2, 2, 3],
    )
    assert list(counts["examples"].values()) == [[["deep/a.parquet", 3]]]
    of_sums = counts["reliability"]["sum"]
    assert (sum(of_sums["rows"]), sum(of_sums["right"]), of_sums["brier"]) == (2, 1, 1), "of two labelled rows, one sum is wrong"


def without_counts(folder: Path, **changed: Any) -> None:
    """Write the predictions again without counts, and with another stamp."""
    table = pq.ParquetFile(folder / "predictions" / NAME).read()
    stamp = json.loads(table.schema.metadata[KEY]) | changed
    pq.write_table(table.replace_schema_metadata({KEY: json.dumps(stamp).encode()}), folder / "predictions" / NAME)


@pytest.mark.parametrize(
    ("damage", "error", "ours"),
    [
        (lambda folder: (folder / "predictions" / NAME).write_bytes(b"PAR1 no PAR1"), "has a damaged footer", False),
        (lambda folder: (folder / "rejected" / NAME).unlink(), "has lost its rejected rows", True),
        (
            lambda folder: pq.write_table(pa.table({"a": [1]}), folder / "predictions" / NAME),
            "is not a file of this program",
            False,
        ),
        (lambda folder: without_counts(folder, format=FORMAT - 1), "was written by another version of this program", True),
    ],
)
def test_damaged_output_files_get_an_error(written: Path, damage: Any, error: str, *, ours: bool) -> None:
    damage(written)
    files = OutputFiles.read(locate(str(written), "--output"), CONSOLE)
    assert error in files.stamps["error"][0].as_py()
    assert (not files.foreign) is ours


def test_counts_of_another_version_cost_only_the_report(written: Path) -> None:
    without_counts(written)
    stamp = stamps(written)[0]
    assert (stamp["error"], stamp["rows"], stamp["counts"]) == (None, 4, "{}")


def test_keys_in_an_object_store_uri_are_not_written(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", 20, 20)
    plan = plan_of(tmp_path, tmp_path / "out")
    ((_, rows),) = read_parts(plan.inputs.root, parts_of(plan), plan.config)
    assert isinstance(rows, PartRows)
    there = replace(plan.inputs, root=locate("s3://key:secret@bucket/in?region=eu-west-1", "--input"))
    write_part(replace(plan, inputs=there), rows, predictions(20))
    assert stamps(tmp_path / "out")[0]["source"] == "s3://bucket/in/a.parquet"
    for path in (tmp_path / "out").rglob("*.parquet"):
        assert b"secret" not in path.read_bytes()
