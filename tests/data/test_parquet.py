"""Parquet files: what is damaged or has changed is refused, and Ray's Arrow types become plain."""

from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.data.extensions import ArrowPythonObjectArray, ArrowTensorArray

from mnistsum_ray.data.images import Pixels, decode_images, one_chunk
from mnistsum_ray.data.parquet import open_parquet, read_footer, read_table, to_parquet
from mnistsum_ray.errors import UnusableFileError
from mnistsum_ray.storage.uri import locate
from tests.storage.conftest import s3


def test_a_page_whose_checksum_is_wrong_is_refused(tmp_path: Path, sample: pa.Table) -> None:
    place, rows = locate(str(tmp_path / "rows.parquet"), "--input"), sample[::50]
    options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    pq.write_table(rows, place.path, write_page_checksum=True, **options)
    data = bytearray(place.read_bytes())
    data[data.index(rows["image"][50].as_py()) + 300] ^= 1
    place.write(bytes(data))
    with pytest.raises(UnusableFileError, match=r"cannot be read: .*CRC checksum"):
        read_table(place)


OBJECTS = ArrowPythonObjectArray.from_objects([{1}, {2}, {3}])


def test_rays_types_are_read_as_plain_ones_and_written_without_marks(tmp_path: Path) -> None:
    """One of them holds pickles."""
    path, again = tmp_path / "ray.parquet", tmp_path / "again.parquet"
    images: Pixels = np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8)
    nested = pa.StructArray.from_arrays([OBJECTS], ["object"])
    columns = {"image": ArrowTensorArray.from_numpy(images), "object": OBJECTS, "nested": nested}
    pq.write_table(pa.table(columns), path)
    assert isinstance(pq.read_schema(path).field("object").type, pa.ExtensionType)
    table = read_table(locate(str(path), "--input"))
    found, bad = decode_images(one_chunk(table["image"]))
    assert not bad
    assert np.array_equal(found, images)
    again.write_bytes(to_parquet(table))
    assert pq.read_schema(again) == table.schema
    assert table.schema.types[1:] == [pa.binary(), pa.struct([("object", pa.binary())])]


def test_a_second_arrow_schema_does_not_bring_rays_types_back(tmp_path: Path) -> None:
    path = tmp_path / "ray.parquet"
    table = pa.table({"object": OBJECTS}, metadata={"OTHER:schema": "x"})
    path.write_bytes(to_parquet(table).to_pybytes().replace(b"OTHER:schema", b"ARROW:schema"))
    assert read_table(locate(str(path), "--input")).schema.types == [pa.binary()]


def test_int96_is_read_in_microseconds_and_named(tmp_path: Path) -> None:
    """Spark writes INT96. pyarrow would read nanoseconds, of distant years other dates."""
    place = locate(str(tmp_path / "rows.parquet"), "--input")
    days = [datetime(1500, 12, 31), datetime(9999, 12, 31), None]
    table = pa.table({"day": pa.array(days, pa.timestamp("s"))})
    pq.write_table(table, place.path, use_deprecated_int96_timestamps=True)
    listed = place.status()
    assert listed is not None
    assert read_footer(place, listed).int96 == ["day"]
    with open_parquet(place, listed) as parquet:
        assert parquet.read()["day"].to_pylist() == days


def test_files_with_views_are_read_as_plain_types(tmp_path: Path) -> None:
    """pyarrow can neither take nor filter rows of views."""
    place = locate(str(tmp_path / "rows.parquet"), "--input")
    kinds = [pa.string_view(), pa.list_(pa.binary_view()), pa.struct([("a_view", pa.int8())])]
    place.write(to_parquet(pa.table([pa.nulls(3, kind) for kind in kinds], ["a", "b", "c"])))
    assert read_table(place).schema.types == [pa.string(), pa.list_(pa.binary()), kinds[2]]


def test_a_large_object_is_read_by_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pa.table({"noise": np.random.default_rng(0).integers(0, 2**62, 800_000)})
    with s3(monkeypatch, tmp_path) as uri:
        place = locate(uri, "--input") / "rows.parquet"
        place.write(to_parquet(table))
        assert len(place.read_bytes()) > 4 * 2**20, "a smaller one is read whole"
        assert read_table(place).equals(table)
