"""Parts are read where they begin and end, in one pass where they share a row group."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mnistsum_ray.scoring.footers import Columns, read_footers
from mnistsum_ray.scoring.inputs import list_inputs
from mnistsum_ray.scoring.plan import Part, parts_of, plan
from mnistsum_ray.scoring.read import Rows, Unreadable, read_parts, read_together
from mnistsum_ray.storage import Location, locate

COLUMNS = Columns("image", "number", "label")


def write(path: Path, rows: int, group: int) -> pa.Table:
    images = [(np.arange(784) + row).astype(np.uint8).tobytes() for row in range(rows)]
    labels = [None if row % 3 == 0 else row % 10 for row in range(rows)]
    table = pa.table({"id": range(rows), "image": images, "number": [row % 11 for row in range(rows)], "label": labels})
    pq.write_table(table, path, row_group_size=group)
    return table


def planned(folder: Path, unit_rows: int) -> tuple[Location, list[Part]]:
    inputs = list_inputs((str(folder),), locate("/nowhere", "--output"))
    files = inputs.files
    footers = read_footers(inputs.root, files, COLUMNS)
    for name in footers.column_names:
        files = files.append_column(name, footers[name])
    return inputs.root, parts_of(plan(files, unit_rows)[0])


@pytest.mark.parametrize("unit_rows", [7, 100, 2500, 9000])
@pytest.mark.parametrize("group", [90, 5000])
def test_every_row_comes_out_once_in_order_and_decoded(tmp_path: Path, unit_rows: int, group: int) -> None:
    table = write(tmp_path / "a.parquet", 5000, group)
    root, parts = planned(tmp_path, unit_rows)
    position = 0
    for rows in read_parts(root, parts, COLUMNS):
        assert isinstance(rows, Rows)
        assert rows.part.first_row == position
        ids = np.arange(position, position + rows.part.rows)
        good, bad = ids[ids % 11 != 10], ids[ids % 11 == 10]
        assert rows.kept["id"].to_pylist() == good.tolist()
        assert rows.kept.column_names == ["id", "number", "label"]
        assert rows.numbers.tolist() == (good % 11).tolist()
        assert rows.labels is not None
        assert rows.labels.tolist() == [-1 if row % 3 == 0 else row % 10 for row in good]
        assert [image.tobytes() for image in rows.images] == table["image"].take(pa.array(good)).to_pylist()
        assert rows.rejected["id"].to_pylist() == bad.tolist()
        assert rows.rejected.column_names == table.column_names
        assert list(rows.reasons) == (bad - position).tolist()
        position += rows.part.rows
    assert position == 5000


def test_any_slice_of_a_row_group_can_be_read_alone(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", 5000, 5000)
    root, parts = planned(tmp_path, 700)
    for part in parts[::-1]:
        (rows,) = read_parts(root, [part], COLUMNS)
        assert isinstance(rows, Rows)
        assert rows.kept["id"][0].as_py() in (part.first_row, part.first_row + 1)
        assert len(rows.numbers) + len(rows.reasons) == part.rows


def test_small_parts_are_read_together_and_large_ones_one_by_one(tmp_path: Path) -> None:
    for index in range(30):
        write(tmp_path / f"{index:02}.parquet", 100, 100)
    root, parts = planned(tmp_path, 8192)
    assert [len(together) for together in read_together(root, parts, COLUMNS)] == [21, 9]
    root, parts = planned(tmp_path, 10)
    assert sum(len(together) for together in read_together(root, parts, COLUMNS)) == 300


def test_a_file_that_changes_under_the_run_is_unreadable_and_its_neighbour_is_not(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", 50, 50)
    write(tmp_path / "b.parquet", 50, 50)
    root, parts = planned(tmp_path, 8192)
    write(tmp_path / "a.parquet", 60, 50)
    changed, whole = read_parts(root, parts, COLUMNS)
    assert isinstance(changed, Unreadable)
    assert "has changed since it was listed" in changed.reason
    assert isinstance(whole, Rows)
    (tmp_path / "b.parquet").unlink()
    assert all(isinstance(part, Unreadable) for part in read_parts(root, parts, COLUMNS))
