"""Datasets and models are data: no pickle in them is executed. Checkpoints: test_checkpoints."""

from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mnistsum_ray.config import ExportPairsConfig
from mnistsum_ray.errors import RequestError
from mnistsum_ray.export.pairs import export_pairs
from tests.integration.conftest import Bomb, score_here

pytestmark = pytest.mark.usefixtures("cluster")


def disguised(table: pa.Table, name: str, extension: bytes, metadata: bytes) -> pa.Table:
    """The table with a column that is marked as an extension type, as in files that Ray wrote."""
    index = table.schema.get_field_index(name)
    marks = {b"ARROW:extension:name": extension, b"ARROW:extension:metadata": metadata}
    return table.cast(table.schema.set(index, table.schema.field(index).with_metadata(marks)))


def test_pickles_in_a_dataset_are_never_executed(
    model: Path,
    tmp_path: Path,
    sample: pa.Table,
    bomb: Bomb,
) -> None:
    rows = sample[::500].append_column("number", pa.array([1] * 10, pa.int8()))
    objects = rows.append_column("note", pa.array([bomb.pickled] * 10, pa.binary()))
    images = rows.set_column(0, "image", pa.array([bomb.pickled] * 10, pa.binary()))
    lists = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(10 * 784, np.uint8)), 784)
    tensors = rows.set_column(0, "image", lists)
    files = {
        "objects": disguised(objects, "note", b"ray.data.arrow_pickled_object", b""),
        "images": disguised(images, "image", b"ray.data.arrow_pickled_object", b""),
        "tensors": disguised(tensors, "image", b"ray.data.arrow_tensor", bomb.pickled),
        "tensors2": disguised(tensors, "image", b"ray.data.arrow_tensor_v2", bomb.pickled),
    }
    (tmp_path / "in").mkdir()
    for name, table in files.items():
        pq.write_table(table, tmp_path / "in" / f"{name}.parquet")
    scored = score_here(model, tmp_path / "out", tmp_path / "in")
    assert scored.line["files"] == 4
    assert scored.line["rejected_rows"] + scored.line["failed_files"] > 0
    assert not bomb.mark.exists()
    for name in files:  # training reads rows in the same way
        data, output = tmp_path / "in" / f"{name}.parquet", str(tmp_path / f"{name}-pairs")
        with suppress(RequestError):
            export_pairs(ExportPairsConfig(data=str(data), output=output, rows=10), print)
        assert not bomb.mark.exists(), name
