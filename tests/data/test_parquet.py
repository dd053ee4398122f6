"""Parquet files: rows by their ids, messages about files that have changed, and Ray's Arrow types read as plain lists."""

import os
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.data.extensions import ArrowPythonObjectArray, ArrowTensorArray

from mnistsum_ray.data.images import Pixels, decode_images, one_chunk, pixels_view
from mnistsum_ray.data.parquet import open_parquet, read_footer, read_table, to_parquet, without_odd_years
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


def test_all_bad_rows_are_counted_and_the_first_named(folder: Path, sample: pa.Table) -> None:
    table = sample[::50]
    digits = pa.array([11] * 7 + [None], table.schema.field("digit").type)
    pq.write_table(table[:8].set_column(1, "digit", digits), folder / "b.parquet")
    with pytest.raises(RequestError, match=r": 8 of 208 rows cannot be used.*b.parquet: row 0: the digit is 11.*7 x the digit"):
        files_of(folder).fetch(np.arange(208)[::-1])


def test_a_page_whose_checksum_is_wrong_is_refused(tmp_path: Path, sample: pa.Table) -> None:
    path, rows = tmp_path / "rows.parquet", sample[::50]
    pq.write_table(rows, path, write_page_checksum=True, compression="none", use_dictionary=False, write_statistics=False)
    data = bytearray(path.read_bytes())
    data[data.index(rows["image"][50].as_py()) + 300] ^= 1
    path.write_bytes(data)
    with pytest.raises(RequestError, match=r"cannot be read: .*CRC checksum verification failed"):
        files_of(path).fetch(np.arange(100))


OBJECTS = ArrowPythonObjectArray.from_objects([{1}, {2}, {3}])
RAY_COLUMNS = {
    "image": ArrowTensorArray.from_numpy(IMAGES),
    "object": OBJECTS,
    "nested": pa.StructArray.from_arrays([OBJECTS], ["object"]),
}


def test_rays_types_are_read_as_plain_ones_and_written_without_marks(tmp_path: Path) -> None:
    """One of them holds pickles."""
    path, again = tmp_path / "ray.parquet", tmp_path / "again.parquet"
    pq.write_table(pa.table(RAY_COLUMNS), path)
    assert isinstance(pq.read_schema(path).field("object").type, pa.ExtensionType)
    table = read_table(locate(str(path), "--input"))
    images, bad = decode_images(one_chunk(table["image"]))
    assert not bad
    assert np.array_equal(images, IMAGES)
    again.write_bytes(to_parquet(table))
    schema = pq.read_schema(again)
    assert schema == table.schema
    assert schema.types[1:] == [pa.binary(), pa.struct([("object", pa.binary())])]


def test_a_second_arrow_schema_does_not_bring_rays_types_back(tmp_path: Path) -> None:
    path = tmp_path / "ray.parquet"
    whole = to_parquet(pa.table({"object": OBJECTS}).replace_schema_metadata({"OTHER:schema": "x"})).to_pybytes()
    path.write_bytes(whole.replace(b"OTHER:schema", b"ARROW:schema"))
    assert read_table(locate(str(path), "--input")).schema.types == [pa.binary()]


YEARS = [datetime(1500, 12, 31), datetime(9999, 12, 31, 23, 59, 59, 999999), datetime.min, None]


def test_int96_is_read_in_microseconds_and_years_that_do_not_fit_are_null_and_counted(tmp_path: Path) -> None:
    """Spark writes INT96. pyarrow would read nanoseconds, of distant years other dates."""
    path = tmp_path / "rows.parquet"
    days = pa.array(
        [*((day - datetime(1970, 1, 1)) // timedelta(seconds=1) if day else None for day in YEARS), 2 * 10**13, 10**12]
    )
    table = pa.table({"day": days.cast(pa.timestamp("s")), "row": range(6)})
    pq.write_table(table, path, use_deprecated_int96_timestamps=True)
    footer = read_footer(locate(str(path), "--input"), path.stat().st_size)
    assert footer.recast == {"day": "INT96"}
    with open_parquet(locate(str(path), "--input")) as parquet:
        found, odd = without_odd_years(parquet, parquet.read())
    assert odd == 2
    whole = [day and day.replace(microsecond=0) for day in YEARS]
    assert found["day"].to_pylist() == [*whole, None, None]
    assert found.schema.field("day").type == pa.timestamp("us")
    assert found["row"].to_pylist() == [*range(6)]
