"""Types of Arrow and Ray become plain ones. What is damaged: tests/integration/test_score.py."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from ray.data.extensions import ArrowPythonObjectArray, ArrowTensorArray

from mnistsum_ray.data.images import Pixels, decode_images, one_chunk
from mnistsum_ray.data.parquet import read_table, to_parquet
from mnistsum_ray.storage.uri import locate


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
