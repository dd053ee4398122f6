"""Parquet files: rows by their ids, messages about files that have changed, and Ray's Arrow types read as plain lists."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.data.extensions import ArrowPythonObjectArray, ArrowTensorArray, ArrowVariableShapedTensorArray

from mnistsum_ray.data.images import Pixels, decode_images, one_chunk, pixels_view
from mnistsum_ray.data.parquet import open_parquet, plain_arrow_types, plain_table
from mnistsum_ray.data.sources import ParquetFiles, open_source
from mnistsum_ray.errors import RequestError, StorageError
from mnistsum_ray.storage.paths import locate

IMAGES: Pixels = np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8)


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


def test_a_file_that_changes_or_goes_is_named(folder: Path) -> None:
    files = files_of(folder)
    os.utime(folder / "b.parquet", (0, 0))
    with pytest.raises(RequestError, match=r"b\.parquet: has changed since the run began"):
        files.fetch(np.array([5, 150]))
    (folder / "b.parquet").unlink()
    with pytest.raises(StorageError, match=r"b\.parquet: is not there"):
        files.fetch(np.array([5, 150]))
    assert len(files.fetch(np.array([5, 250]))[1]) == 2


def test_all_bad_rows_are_counted_and_the_first_five_named(folder: Path, sample: pa.Table) -> None:
    schema = pa.schema({"image": pa.binary(), "digit": pa.int8()})
    for name, rows, change in (("a", range(90, 100), {"digit": 11}), ("b", range(2), {"image": None, "digit": None})):
        values = [value | (change if row in rows else {}) for row, value in enumerate(sample[::50].to_pylist())]
        pq.write_table(pa.Table.from_pylist(values, schema), folder / f"{name}.parquet", row_group_size=30)
    digit = "the digit is 11, not one of 0..9; correct it or drop the row"
    both = "the image is null; fill it in or drop the row; the digit is null; fill it in or drop the row"
    named = " | ".join(f"a.parquet: row {row}: {digit}" for row in range(90, 95))
    with pytest.raises(RequestError) as error:
        files_of(folder).fetch(np.arange(300)[::-1])
    assert str(error.value) == (
        f"{folder}: 12 of 300 rows cannot be used; others may follow: {named} | …; most often: 10 x {digit} | 2 x {both}; "
        "a new run with --skip-bad-rows trains without them"
    )


def test_an_int96_timestamp_of_another_column_is_no_matter_in_training(folder: Path, sample: pa.Table) -> None:
    rows = sample[::50]
    days = pa.array([datetime(9999, 12, 31)] * rows.num_rows, pa.timestamp("us"))
    pq.write_table(rows.append_column("day", days), folder / "b.parquet", use_deprecated_int96_timestamps=True)
    assert files_of(folder).fetch(np.arange(100, 200))[1].tolist() == rows["digit"].to_pylist()


def test_a_page_whose_checksum_is_wrong_is_refused(tmp_path: Path, sample: pa.Table) -> None:
    path, rows = tmp_path / "rows.parquet", sample[::50]
    pq.write_table(rows, path, write_page_checksum=True, compression="none", use_dictionary=False, write_statistics=False)
    data = bytearray(path.read_bytes())
    data[data.index(rows["image"][50].as_py()) + 300] ^= 1
    path.write_bytes(data)
    with pytest.raises(RequestError, match=r"cannot be read: .*CRC checksum verification failed"):
        files_of(path).fetch(np.arange(100))


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
    copy = replace(before, table=before.table.set_column(2, before.table.schema.field("modified"), pa.array([1, 2, 3])))
    assert copy.changed_file(before.table, same_place=False) is None, "a copy has other times"
    assert "a.parquet: has changed" in str(copy.changed_file(before.table, same_place=True))


@pytest.fixture
def ray_file(tmp_path: Path) -> Path:
    """A Parquet file with columns of Ray's types, as `Dataset.write_parquet` writes it."""
    ragged = np.empty(3, object)
    ragged[:] = [np.ones((2, 2)), np.ones((1, 3)), np.ones((4, 1))]
    columns = {
        "image": ArrowTensorArray.from_numpy(IMAGES),
        "ragged": ArrowVariableShapedTensorArray.from_numpy(ragged),
        "object": ArrowPythonObjectArray.from_objects([{1}, {2}, {3}]),
    }
    pq.write_table(pa.table(columns), tmp_path / "ray.parquet")
    return tmp_path / "ray.parquet"


def extension_columns(path: Path) -> list[str]:
    """Columns that a reader with the types of this process sees as extension types."""
    return [field.name for field in pq.read_schema(path) if isinstance(field.type, pa.ExtensionType)]


def test_ray_tensors_are_read_as_lists_and_written_without_marks(ray_file: Path, tmp_path: Path) -> None:
    with open_parquet(locate(str(ray_file), "--input")) as file:
        table = plain_table(file.read())
    images, bad = decode_images(one_chunk(table["image"]))
    assert not bad
    assert np.array_equal(images, IMAGES)
    pq.write_table(table, tmp_path / "plain.parquet")
    assert extension_columns(tmp_path / "plain.parquet") == []


def test_types_are_registered_afterwards_as_before(ray_file: Path) -> None:
    """Also where several threads read, and after an error."""
    before = pq.read_schema(ray_file)
    assert extension_columns(ray_file) == ["image", "ragged", "object"], "ray: its names of Arrow types have changed"

    def read(_: int) -> list[str]:
        with plain_arrow_types():
            return extension_columns(ray_file)

    with ThreadPoolExecutor(4) as pool:
        assert [*pool.map(read, range(80))] == [[]] * 80
    assert pq.read_schema(ray_file) == before
    with pytest.raises(RuntimeError, match="in the block"), plain_arrow_types():
        raise RuntimeError("in the block")
    assert pq.read_schema(ray_file) == before
