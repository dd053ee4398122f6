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


def test_types_of_arrow_and_ray_are_read_as_plain_ones(tmp_path: Path) -> None:
    """One of Ray's holds pickles. Rows of views pyarrow can neither take nor filter."""
    path, again = tmp_path / "in.parquet", tmp_path / "again.parquet"
    images: Pixels = np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8)
    objects = ArrowPythonObjectArray.from_objects([{1}, {2}, {3}])
    columns = {
        "image": ArrowTensorArray.from_numpy(images),
        "object": objects,
        "nested": pa.StructArray.from_arrays([objects], ["object"]),
        "view": pa.nulls(3, pa.list_(pa.string_view())),
        "category": pa.array(["a", "b", "a"]).dictionary_encode(),
        "time": pa.nulls(3, pa.timestamp("ns", "Europe/Berlin")),
    }
    data = to_parquet(pa.table(columns, metadata={"OTHER:schema": "x"})).to_pybytes()
    path.write_bytes(data)
    assert isinstance(pq.read_schema(path).field("object").type, pa.ExtensionType)
    table = read_table(locate(str(path), "--input"))
    plain = [pa.binary(), pa.struct([("object", pa.binary())]), pa.list_(pa.string())]
    plain += [pa.string(), pa.timestamp("ns", "UTC")]
    assert table.schema.types[1:] == plain
    found, bad = decode_images(one_chunk(table["image"]))
    assert not bad
    assert np.array_equal(found, images)
    again.write_bytes(to_parquet(table))
    assert pq.read_schema(again) == table.schema
    # A second schema of Arrow does not bring Ray's types back.
    path.write_bytes(data.replace(b"OTHER:schema", b"ARROW:schema"))
    assert read_table(locate(str(path), "--input")).schema.types[1:] == plain


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


def test_an_object_of_a_store_is_read_as_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = pa.table({"noise": np.random.default_rng(0).integers(0, 2**62, 20_000)})
    table = table.append_column("number", table["noise"])
    with s3(monkeypatch, tmp_path) as uri:
        place = locate(uri, "--input") / "rows.parquet"
        place.write(to_parquet(table, row_group_size=9000))
        assert read_table(place).equals(table)
