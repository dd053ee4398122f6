"""Parquet files of a source: rows by their ids, and the messages about files that have changed."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mnistsum_ray.data.images import pixels_view
from mnistsum_ray.data.parquet_source import ParquetFiles
from mnistsum_ray.data.sources import open_source
from mnistsum_ray.errors import RequestError, StorageError


@pytest.fixture
def folder(tmp_path: Path, sample: pa.Table) -> Path:
    for name in "abc":
        pq.write_table(sample[::50], tmp_path / f"{name}.parquet", row_group_size=30)
    return tmp_path


def files_of(folder: Path) -> ParquetFiles:
    files = open_source(str(folder)).files
    assert files is not None
    return files


def test_rows_are_read_by_their_ids_in_any_order(folder: Path, sample: pa.Table) -> None:
    files, rows = files_of(folder), sample[::50]
    pixels, digits = np.tile(pixels_view(rows["image"].combine_chunks()), (3, 1, 1)), np.tile(rows["digit"].to_numpy(), 3)
    for ids in (np.arange(300), np.array([299, 0, 31, 29, 30, 150]), np.arange(95, 235)[::-1], np.empty(0, np.int64)):
        images, found = files.fetch(ids)
        assert np.array_equal(images, pixels[ids])
        assert np.array_equal(found, digits[ids])


def test_a_file_that_changes_or_goes_is_named(folder: Path, sample: pa.Table) -> None:
    files = files_of(folder)
    os.utime(folder / "b.parquet", (0, 0))
    with pytest.raises(RequestError, match=r"b\.parquet: has changed since the run began"):
        files.fetch(np.array([5, 150]))
    (folder / "b.parquet").unlink()
    with pytest.raises(StorageError, match=r"b\.parquet: is not there any more"):
        files.fetch(np.array([5, 150]))
    assert len(files.fetch(np.array([5, 250]))[1]) == 2


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("image", b"\x89PNG", "4 bytes are neither 784 pixels nor a readable PNG or JPEG"),
        ("digit", 11, "the digit is 11, not one of 0..9"),
        ("digit", None, "the digit is null"),
    ],
)
def test_a_bad_row_is_named(folder: Path, sample: pa.Table, column: str, value: object, said: str) -> None:
    rows = sample[::50].to_pylist()
    rows[77][column] = value
    schema = pa.schema({"image": pa.binary(), "digit": pa.int8()})
    pq.write_table(pa.Table.from_pylist(rows, schema), folder / "b.parquet", row_group_size=30)
    files = files_of(folder)
    assert len(files.fetch(np.arange(100, 175))[1]) == 75
    with pytest.raises(RequestError, match=rf"b\.parquet: row 77: {said}"):
        files.fetch(np.array([178, 177, 176]))


def test_a_changed_file_is_told_from_its_table(folder: Path, sample: pa.Table) -> None:
    before = files_of(folder)
    assert before.changed_file(before.table, same_place=True) is None
    pq.write_table(sample[1::50], folder / "b.parquet", row_group_size=30)
    pq.write_table(sample[1::50], folder / "d.parquet", row_group_size=30)
    after = files_of(folder)
    assert after.changed_file(before.table, same_place=False) == f"{folder}/b.parquet: has changed since the run began"
    without = replace(after, table=pa.concat_tables([before.table, after.table.slice(3)]))
    assert without.changed_file(before.table, same_place=True) == f"{folder}/d.parquet: is new since the run began"
    gone = replace(before, table=before.table.slice(1))
    assert gone.changed_file(before.table, same_place=True) == f"{folder}/a.parquet: is missing since the run began"


def test_a_copy_has_other_times_and_is_the_same_elsewhere(folder: Path) -> None:
    before = files_of(folder)
    times = pa.array([1, 2, 3])
    copy = replace(before, table=before.table.set_column(2, before.table.schema.field("modified"), times))
    assert copy.changed_file(before.table, same_place=False) is None
    assert "a.parquet: has changed" in str(copy.changed_file(before.table, same_place=True))
