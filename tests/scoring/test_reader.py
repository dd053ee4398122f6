"""Reading parts: every row is read once, in order, and damaged files are reported."""

from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mnistsum_ray.data.inputs import list_inputs
from mnistsum_ray.data.parquet import to_parquet
from mnistsum_ray.errors import StorageError
from mnistsum_ray.scoring.footers import Columns, read_footers
from mnistsum_ray.scoring.parts import Part, parts_of, split_into_parts
from mnistsum_ray.scoring.reader import DecodedPart, UnreadablePart, read_batches, read_parts
from mnistsum_ray.storage.location import Location
from mnistsum_ray.storage.paths import locate

COLUMNS = Columns("image", "number", "label")


def write(path: Path, rows: int, group: int) -> pa.Table:
    images = [(np.arange(784) + row).astype(np.uint8).tobytes() for row in range(rows)]
    labels = [None if row % 3 == 0 else row % 10 for row in range(rows)]
    table = pa.table({"id": range(rows), "image": images, "number": [row % 11 for row in range(rows)], "label": labels})
    pq.write_table(table, path, row_group_size=group)
    return table


def planned(folder: Path, max_rows_per_file: int) -> tuple[Location, list[Part]]:
    inputs = list_inputs((str(folder),), locate("/nowhere", "--output"))
    files = inputs.files
    footers = read_footers(inputs.root, files, COLUMNS, {})
    for name in footers.column_names:
        files = files.append_column(name, footers[name])
    return inputs.root, parts_of(split_into_parts(files, max_rows_per_file)[0])


@pytest.mark.parametrize("max_rows_per_file", [7, 100, 2500, 9000])
@pytest.mark.parametrize("group", [90, 5000])
def test_every_row_is_read_once_in_order_and_decoded(tmp_path: Path, max_rows_per_file: int, group: int) -> None:
    table = write(tmp_path / "a.parquet", 5000, group)
    root, parts = planned(tmp_path, max_rows_per_file)
    position = 0
    for decoded in read_parts(root, parts, COLUMNS):
        assert isinstance(decoded, DecodedPart)
        assert decoded.part.first_row == position
        ids = np.arange(position, position + decoded.part.rows)
        good, bad = ids[ids % 11 != 10], ids[ids % 11 == 10]
        assert decoded.passthrough["id"].to_pylist() == good.tolist()
        assert decoded.passthrough.column_names == ["id", "number", "label"]
        assert decoded.numbers.tolist() == (good % 11).tolist()
        assert decoded.labels is not None
        assert decoded.labels.tolist() == [-1 if row % 3 == 0 else row % 10 for row in good]
        assert [image.tobytes() for image in decoded.images] == table["image"].take(pa.array(good)).to_pylist()
        assert decoded.rejected["id"].to_pylist() == bad.tolist()
        assert decoded.rejected.column_names == table.column_names
        assert list(decoded.reasons) == (bad - position).tolist()
        position += decoded.part.rows
    assert position == 5000


def test_a_slice_of_a_row_group_can_be_read_alone(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", 5000, 5000)
    root, parts = planned(tmp_path, 700)
    for part in parts[::-1]:
        (decoded,) = read_parts(root, [part], COLUMNS)
        assert isinstance(decoded, DecodedPart)
        assert decoded.passthrough["id"][0].as_py() in (part.first_row, part.first_row + 1)
        assert len(decoded.numbers) + len(decoded.reasons) == part.rows


def test_small_parts_are_batched(tmp_path: Path) -> None:
    for index in range(30):
        write(tmp_path / f"{index:02}.parquet", 100, 100)
    root, parts = planned(tmp_path, 8192)
    assert [len(batch) for batch in read_batches(root, parts, COLUMNS)] == [21, 9]
    root, parts = planned(tmp_path, 10)
    assert sum(len(batch) for batch in read_batches(root, parts, COLUMNS)) == 300


def test_a_file_that_changes_during_the_run_is_unreadable(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", 50, 50)
    write(tmp_path / "b.parquet", 50, 50)
    root, parts = planned(tmp_path, 8192)
    write(tmp_path / "a.parquet", 60, 50)
    changed, whole = read_parts(root, parts, COLUMNS)
    assert isinstance(changed, UnreadablePart)
    assert "has changed since the run began" in changed.reason
    assert isinstance(whole, DecodedPart)


def test_a_file_that_is_gone_is_waited_for_and_no_fault_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may lie on a node without the mount, or its storage may be away for a moment."""
    table = write(tmp_path / "a.parquet", 50, 50)
    root, parts = planned(tmp_path, 8192)
    waited: list[float] = []

    def come_back(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 2:
            (tmp_path / "away").rename(tmp_path / "a.parquet")

    monkeypatch.setattr("time.sleep", come_back)
    (tmp_path / "a.parquet").rename(tmp_path / "away")
    (part,) = read_parts(root, parts, COLUMNS)
    assert isinstance(part, DecodedPart)
    assert part.passthrough.num_rows + len(part.reasons) == table.num_rows
    assert waited == [1, 2]
    (tmp_path / "a.parquet").unlink()
    monkeypatch.setattr("time.monotonic", iter(range(0, 1000, 20)).__next__)
    with pytest.raises(StorageError, match=r"a\.parquet: is not there any more, or not on this node"):
        list(read_parts(root, parts, COLUMNS))


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
    root, parts = planned(tmp_path, 8192)
    (decoded,) = read_parts(root, parts, COLUMNS)
    assert isinstance(decoded, DecodedPart), decoded
    assert list(decoded.reasons) == [0]
    assert decoded.passthrough["other"].to_pylist() == VIEWS[name].to_pylist()[1:]
    assert decoded.rejected["other"].to_pylist() == VIEWS[name].to_pylist()[:1]
    again = pq.ParquetFile(pa.BufferReader(to_parquet(decoded.passthrough))).read()
    assert again["other"].to_pylist() == VIEWS[name].to_pylist()[1:]


def test_images_in_a_binary_view_are_decoded(tmp_path: Path) -> None:
    images = [(np.arange(784) + row).astype(np.uint8).tobytes() for row in range(3)]
    pq.write_table(
        other_column(pa.array([1, 2, 3])).set_column(0, "image", pa.array(images, pa.binary_view())), tmp_path / "a.parquet"
    )
    root, parts = planned(tmp_path, 8192)
    (decoded,) = read_parts(root, parts, COLUMNS)
    assert isinstance(decoded, DecodedPart), decoded
    assert [image.tobytes() for image in decoded.images] == images[1:]


@pytest.mark.parametrize("year", [1500, 9999])
@pytest.mark.parametrize("nested", [False, True])
def test_a_file_with_an_int96_timestamp_out_of_range_is_unreadable(tmp_path: Path, year: int, nested: bool) -> None:
    days = pa.array([datetime(2020, 1, 1), datetime(year, 12, 31)], pa.timestamp("us"))
    column = pa.StructArray.from_arrays([days], ["day"]) if nested else days
    for name, values in (("a", column), ("b", column.take(pa.array([0, 0])))):
        pq.write_table(other_column(values), tmp_path / f"{name}.parquet", use_deprecated_int96_timestamps=True)
    root, parts = planned(tmp_path, 8192)
    unreadable, readable = read_parts(root, parts, COLUMNS)
    assert isinstance(unreadable, UnreadablePart)
    assert "column 'other' holds INT96 timestamps outside of the years 1677 to 2262" in unreadable.reason
    assert isinstance(readable, DecodedPart)


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
    root, parts = planned(tmp_path, 8192)
    (damaged,) = read_parts(root, parts, COLUMNS)
    assert isinstance(damaged, UnreadablePart)
    assert "CRC checksum verification failed" in damaged.reason
