"""Ray's Arrow types: read and written as plain lists, and registered afterwards as before."""

import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.data.extensions import ArrowPythonObjectArray, ArrowTensorArray, ArrowVariableShapedTensorArray

from mnistsum_ray.data.images import Pixels, decode_images, one_chunk
from mnistsum_ray.data.parquet import open_parquet
from mnistsum_ray.data.parquet_types import plain_arrow_types, plain_table
from mnistsum_ray.storage.paths import locate

IMAGES: Pixels = np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8)


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


def test_types_are_registered_afterwards_as_before(ray_file: Path) -> None:
    before = pq.read_schema(ray_file)
    assert extension_columns(ray_file) == ["image", "ragged", "object"], "ray: its names of Arrow types have changed"
    with plain_arrow_types():
        assert extension_columns(ray_file) == []
        with plain_arrow_types():
            pass
        assert extension_columns(ray_file) == [], "the outer block goes on"
    assert pq.read_schema(ray_file) == before
    with pytest.raises(RuntimeError, match="in the block"), plain_arrow_types():
        raise RuntimeError("in the block")
    assert pq.read_schema(ray_file) == before


def test_ray_tensors_are_read_as_lists_and_written_without_marks(ray_file: Path, tmp_path: Path) -> None:
    with open_parquet(locate(str(ray_file), "--input")) as file:
        table = plain_table(file.read())
    images, bad = decode_images(one_chunk(table["image"]))
    assert not bad
    assert np.array_equal(images, IMAGES)
    pq.write_table(table, tmp_path / "plain.parquet")
    assert extension_columns(tmp_path / "plain.parquet") == []


def test_threads_share_the_block(ray_file: Path) -> None:
    """Each sees plain types until its own block ends, and the last one to leave restores Ray's."""
    before, seen = pq.read_schema(ray_file), list[list[str]]()
    inside = threading.Barrier(4)

    def read() -> None:
        for _ in range(20):
            with plain_arrow_types():
                inside.wait(timeout=30)
                seen.append(extension_columns(ray_file))
            inside.wait(timeout=30)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [[]] * 80
    assert pq.read_schema(ray_file) == before
