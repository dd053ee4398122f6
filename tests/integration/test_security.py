"""Datasets, models and checkpoints are data: no pickle in them is executed."""

import hashlib
import pickle
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.data

from mnistsum_ray import RequestError, load_model
from mnistsum_ray.storage.store import Location
from mnistsum_ray.training.checkpoint import STATE_DIGEST, STATE_FILE, read_checkpoint
from tests.integration.conftest import score_here
from tests.integration.test_rows import read


class Bomb:
    """Its pickle creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.fixture
def bomb(tmp_path: Path) -> Iterator[bytes]:
    """A pickle that must not be executed during the test."""
    mark = tmp_path / "executed"
    pickled = pickle.dumps(Bomb(mark))
    pickle.loads(pickled)
    mark.unlink()  # it was there: the pickle works
    yield pickled
    assert not mark.exists()


def disguised(table: pa.Table, name: str, extension: str, metadata: bytes = b"") -> pa.Table:
    """The table with a column that is marked as an extension type, as in files that Ray wrote."""
    index = table.schema.get_field_index(name)
    marks = {"ARROW:extension:name": f"ray.data.{extension}", "ARROW:extension:metadata": metadata}
    return table.cast(table.schema.set(index, table.schema.field(index).with_metadata(marks)))


@pytest.fixture
def files(tmp_path: Path, sample: pa.Table, bomb: bytes) -> Path:
    """A folder of files that hold pickles, in types of Ray."""
    rows = sample[::500].append_column("number", pa.array([1] * 10, pa.int8()))
    pickles = pa.array([bomb] * 10, pa.binary())
    lists = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(10 * 784, np.uint8)), 784)
    images, tensors = (rows.set_column(0, "image", column) for column in (pickles, lists))
    objects = rows.append_column("note", pickles)
    tables = {
        "objects": disguised(objects, "note", "arrow_pickled_object"),
        "images": disguised(images, "image", "arrow_pickled_object"),
        "tensors": disguised(tensors, "image", "arrow_tensor", bomb),
        "tensors2": disguised(tensors, "image", "arrow_tensor_v2", bomb),
    }
    (tmp_path / "in").mkdir()
    for name, table in tables.items():
        pq.write_table(table, tmp_path / "in" / f"{name}.parquet")
    return tmp_path / "in"


@pytest.mark.slow  # tests/data/test_parquet.py reads such types without a cluster
@pytest.mark.usefixtures("cluster")
def test_pickles_in_a_dataset_are_never_executed(model: Path, tmp_path: Path, files: Path) -> None:
    """Neither when it is scored, nor by a reader of what is scored, who has imported Ray Data."""
    scored = score_here(model, tmp_path / "out", files)
    assert (scored.line["files"], scored.line["failed_files"]) == (4, 0)
    assert scored.line["rejected_rows"] == 10, "a pickle is no image"
    found = {path.stem: pq.read_table(path) for path in tmp_path.glob("out/predictions/*")}
    assert found.keys() == {"objects", "images", "tensors", "tensors2"}
    assert found["objects"]["note"].type == pa.binary(), "passed through as bytes"
    for table in found.values():
        table.to_pylist()


OF_TRAINING = [
    ("objects", ""),  # in a column that it does not read
    ("images", "bytes are neither 784 pixels nor a readable PNG or JPEG"),
    ("tensors", "Unable to deserialize shape"),
]


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(("name", "said"), OF_TRAINING)
def test_ray_data_refuses_pickles_by_itself(files: Path, name: str, said: str) -> None:
    """Training reads with it. One that executes them has to be kept from this project."""
    file = str(files / f"{name}.parquet")
    with pytest.raises(Exception, match=r"arrow_pickled_object|Unable to deserialize"):
        ray.data.read_parquet(file).take_all()
    with pytest.raises(RequestError, match=said) if said else nullcontext():
        read(file)


def test_pickles_in_place_of_weights_are_never_executed(tmp_path: Path, bomb: bytes) -> None:
    for name in ("model.safetensors", STATE_FILE):
        (tmp_path / name).write_bytes(bomb)
    (tmp_path / STATE_DIGEST).write_text(hashlib.sha256(bomb).hexdigest())
    with pytest.raises(RequestError, match="cannot be used"):
        load_model(str(tmp_path))
    with pytest.raises(ValueError, match=r"."):
        read_checkpoint(Location(str(tmp_path)))
