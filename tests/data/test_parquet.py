"""Parquet files: rows by their ids, messages about files that have changed, and Ray's Arrow types read as plain lists."""

import os
import shutil
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.data.extensions import ArrowPythonObjectArray, ArrowTensorArray

from mnistsum_ray.data.images import Pixels, decode_images, one_chunk, pixels_view
from mnistsum_ray.data.parquet import _WHOLE_BYTES, neutral_metadata, open_parquet, read_footer, read_table, to_parquet
from mnistsum_ray.data.sources import ParquetFiles, open_source
from mnistsum_ray.errors import RequestError, StorageError, UnusableFileError
from mnistsum_ray.storage.uri import locate
from tests.storage.conftest import s3

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
    """Also one that another takes the place of, of the same size and time."""
    files, path = files_of(folder), folder / "b.parquet"
    shutil.copy2(path, folder / "new")
    (folder / "new").rename(path)
    for _ in range(2):
        with pytest.raises(RequestError, match=r"b\.parquet: has changed since the run began"):
            files.fetch(np.array([5, 150]))
        files = files_of(folder)
        os.utime(path, (0, 0))
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


def test_int96_is_read_in_microseconds_and_named(tmp_path: Path) -> None:
    """Spark writes INT96. pyarrow would read nanoseconds, of distant years other dates."""
    place, days = locate(str(tmp_path / "rows.parquet"), "--input"), [datetime(1500, 12, 31), datetime(9999, 12, 31), None]
    pq.write_table(pa.table({"day": pa.array(days, pa.timestamp("s"))}), place.path, use_deprecated_int96_timestamps=True)
    listed = place.status()
    assert listed is not None
    assert read_footer(place, listed).recast == {"day": "INT96"}
    with open_parquet(place, listed) as parquet:
        assert parquet.read()["day"].to_pylist() == days


def test_metadata_that_describe_a_schema_for_one_engine_are_dropped(tmp_path: Path) -> None:
    """With Spark's own, Spark would not see the columns that scoring adds."""
    place = locate(str(tmp_path / "rows.parquet"), "--input")
    dropped = ("org.apache.spark.sql.parquet.row.metadata", "parquet.avro.schema", "huggingface", "mnistsum_ray.part")
    metadata = dict.fromkeys((*dropped, "pandas", "author"), "x")
    place.write(to_parquet(pa.table({"object": OBJECTS}).replace_schema_metadata(metadata)))
    assert neutral_metadata(read_table(place).schema.metadata) == {b"pandas": b"x", b"author": b"x"}
    assert neutral_metadata(None) == {}


def test_a_large_object_is_read_by_ranges_and_not_once_it_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pa.table({"noise": np.random.default_rng(0).integers(0, 2**62, 800_000)})
    with s3(monkeypatch, tmp_path) as uri:
        place = locate(uri, "--input") / "rows.parquet"
        place.write(to_parquet(table))
        listed = place.status()
        assert listed is not None
        assert listed.size > _WHOLE_BYTES
        with open_parquet(place, listed) as parquet:
            assert parquet.read().equals(table)
        place.write(to_parquet(table.slice(1)))
        with pytest.raises(UnusableFileError, match="has changed since the run began"), open_parquet(place, listed) as parquet:
            parquet.read()
