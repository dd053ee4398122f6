"""Types of Arrow and Ray become plain ones; a file whose end is wrong is unusable."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.data.extensions import ArrowPythonObjectArray, ArrowTensorArray

from mnistsum_ray.data.columns import Images, Numbers
from mnistsum_ray.data.parquet import (
    open_parquet,
    read_footer,
    read_ranges,
    real_schema,
    to_parquet,
)
from mnistsum_ray.errors import StorageError, UnusableFileError
from mnistsum_ray.storage.uri import locate


def read(path: Path, *ranges: range) -> list[pa.Table]:
    """The rows of these ranges of a file, or all."""
    with open_parquet(locate(str(path), "--input")) as parquet:
        return list(read_ranges(parquet, ranges or [range(parquet.metadata.num_rows)], 8192))


def test_types_of_arrow_ray_and_parquet_are_read_as_plain_ones(tmp_path: Path) -> None:
    """One of Ray's holds pickles. Rows of views pyarrow can neither take nor filter.

    A file with a null in a list of fixed size Arrow by itself refuses, though it has written it.
    """
    path, again = tmp_path / "in.parquet", tmp_path / "again.parquet"
    images = np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8)
    objects = ArrowPythonObjectArray.from_objects([{1}, {2}, {3}])
    ids = pa.array([b"1" * 16] * 3, pa.binary(16))
    columns = {
        "image": ArrowTensorArray.from_numpy(images),
        "fixed": pa.array([[1] * 784, None, [2] * 784], pa.list_(pa.uint8(), 784)),
        "object": objects,
        "nested": pa.StructArray.from_arrays([objects], ["object"]),
        "view": pa.nulls(3, pa.list_(pa.string_view())),
        "category": pa.array(["a", "b", "a"]).dictionary_encode(),
        "time": pa.nulls(3, pa.timestamp("ns", "Europe/Berlin")),
        "id": pa.ExtensionArray.from_storage(pa.uuid(), ids),
        "json": pa.ExtensionArray.from_storage(pa.json_(), pa.array(["{}"] * 3)),
    }
    data = to_parquet(pa.table(columns, metadata={"OTHER:schema": "x"})).to_pybytes()
    path.write_bytes(data)
    assert isinstance(pq.read_schema(path).field("object").type, pa.ExtensionType)
    (table,) = read(path)
    plain = [pa.binary(), pa.struct([("object", pa.binary())]), pa.list_(pa.string())]
    plain += [pa.string(), pa.timestamp("ns", "UTC"), pa.binary(16), pa.string()]
    assert table.schema.types[2:] == plain
    found, reasons = Images(28, 28).decode(table["image"], "image")
    assert not reasons
    assert np.array_equal(found, images)
    found, reasons = Images(28, 28).decode(table["fixed"], "image")
    assert found[:, 0, 0].tolist() == [1, 0, 2]
    assert reasons == {1: "the image is null; fill it in or drop the row"}
    again.write_bytes(to_parquet(table))
    assert pq.read_schema(again) == table.schema
    # A second schema of Arrow does not bring Ray's types back.
    path.write_bytes(data.replace(b"OTHER:schema", b"ARROW:schema"))
    assert read(path)[0].schema.types[2:] == plain


PIXELS = np.zeros((3, 28, 28), np.uint8)
of_arrow = pa.FixedShapeTensorArray.from_numpy_ndarray
TENSORS: list[tuple[Any, bool]] = [
    (of_arrow(PIXELS), True),
    (of_arrow(PIXELS.reshape(3, 1, 28, 28)), True),
    (of_arrow(PIXELS.reshape(3, 784)), True),
    (ArrowTensorArray.from_numpy(PIXELS), True),
    (of_arrow(PIXELS.transpose(0, 2, 1)), False),
    (of_arrow(PIXELS.reshape(3, 14, 56)), False),
    (ArrowTensorArray.from_numpy(PIXELS.reshape(3, 14, 56)), False),
]


@pytest.mark.parametrize(("column", "is_right"), TENSORS)
def test_a_tensor_of_another_order_or_shape_is_refused_in_memory_and_in_a_file(
    tmp_path: Path, column: Any, is_right: bool
) -> None:
    file = locate(str(tmp_path / "in.parquet"), "--input")
    file.write(to_parquet(pa.table({"image": column})))
    listed = file.file_entry()
    assert listed
    schema = read_footer(file, listed).schema_arrow
    said = "which is transposed or not 28 x 28"
    types = [column.type, real_schema(schema).field("image").type]
    errors = [Images(28, 28).type_error(kind) for kind in types]
    assert [said in str(error) for error in errors] == [not is_right] * 2
    is_flat = len(column.type.shape) == 1
    assert (Numbers(784).type_error(column.type) is None) == is_flat


def test_ranges_of_rows_are_read_whatever_groups_and_batches_they_lie_in(tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    table = pa.table({"id": range(30_000)}, metadata={"in the footer": "x" * 100_000})
    pq.write_table(table, path, row_group_size=10_000)
    for ranges in (
        [range(1), range(1, 9_000), range(9_000, 30_000)],
        [range(5, 5), range(8_191, 8_193), range(20_000, 20_001)],
    ):
        found = [table["id"].to_pylist() for table in read(path, *ranges)]
        assert found == [[*rows] for rows in ranges]


def test_of_a_large_row_group_a_buffer_is_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    table = pa.table({"image": [bytes(1024)] * 40_000})
    pq.write_table(table, path, compression="none", use_dictionary=False)
    with open_parquet(locate(str(path), "--input")) as parquet:
        before = pa.total_allocated_bytes()
        tables = read_ranges(parquet, [range(2), range(2, 40_000)], 1)
        assert next(tables).num_rows == 2
        assert pa.total_allocated_bytes() - before < 2**24


def one_row_more(places: int) -> Callable[[bytes], bytes]:
    """A footer that says so in the file's rows or, of three places, in its column and group too."""

    def change(data: bytes) -> bytes:
        length = int.from_bytes(data[-8:-4], "little") + 8
        rows_300, rows_301 = b"\x16\xd8\x04", b"\x16\xda\x04"  # of Thrift's compact protocol
        return data[:-length] + data[-length:].replace(rows_300, rows_301, places)

    return change


DAMAGES: list[tuple[Callable[[bytes], bytes], str]] = [
    (lambda data: data[:4], "is not Parquet, or was cut off"),
    (lambda data: data[:-8] + b"\xff\xff\xff\x7fPAR1", "is not Parquet, or was cut off"),
    (lambda data: data[:-4] + b"PARE", "is not Parquet, or was cut off"),  # encrypted
    (one_row_more(1), "has a damaged footer"),
    (one_row_more(3), "its rows differ from its footer"),
]


@pytest.mark.parametrize(("damage", "reason"), DAMAGES)
def test_a_file_whose_end_is_wrong_is_unusable(tmp_path: Path, damage: Any, reason: str) -> None:
    path = tmp_path / "in.parquet"
    path.write_bytes(damage(to_parquet(pa.table({"id": range(300)})).to_pybytes()))
    with pytest.raises(UnusableFileError, match=reason):
        read(path, range(301))


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), MemoryError()])
def test_a_disk_or_memory_that_fails_is_no_fault_of_the_file(
    tmp_path: Path, error: Exception
) -> None:
    path = tmp_path / "in.parquet"
    path.write_bytes(to_parquet(pa.table({"id": range(3)})))
    with pytest.raises(StorageError), open_parquet(locate(str(path), "--input")):
        raise error
