"""Datasets and models are data: no pickle in them is executed; no key is shown. Checkpoints: test_checkpoints."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mnistsum_ray.storage.object_store import options_of
from mnistsum_ray.storage.paths import locate
from tests.integration.conftest import Bomb, Job, run_job

EVERY = 10

pytestmark = pytest.mark.usefixtures("cluster")


def disguised(table: pa.Table, name: str, extension: bytes, metadata: bytes) -> pa.Table:
    """The table with a column that is marked as an extension type, as in files that Ray wrote."""
    index = table.schema.get_field_index(name)
    marks = {b"ARROW:extension:name": extension, b"ARROW:extension:metadata": metadata}
    return table.cast(table.schema.set(index, table.schema.field(index).with_metadata(marks)))


@pytest.mark.slow
def test_pickles_in_a_dataset_are_never_executed(cluster: str, model: Path, tmp_path: Path, sample: pa.Table, bomb: Bomb) -> None:
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
    scored = run_job("score", "--model", model, "--input", tmp_path / "in", "--output", tmp_path / "out", address=cluster)
    assert not bomb.mark.exists()
    assert scored.code == 3, scored.err
    assert scored.last_line["files"] == 4
    for name in files:
        (tmp_path / name).mkdir()
        (tmp_path / "in" / f"{name}.parquet").rename(tmp_path / name / "rows.parquet")
        # Training reads rows in the same way.
        exported = run_job("export_pairs", "--data", tmp_path / name, "--output", tmp_path / f"{name}-pairs", "--rows", 10)
        assert not bomb.mark.exists(), name
        assert exported.code in (0, 2), exported.err


def test_a_pickle_for_a_model_is_refused(cluster: str, model: Path, tmp_path: Path, data: Path, bomb: Bomb) -> None:
    planted = tmp_path / "model"
    planted.mkdir()
    (planted / "model.safetensors").write_bytes(bomb.pickled)
    flags = ["--model", planted, "--input", data, "--number-column", "digit", "--output", tmp_path / "out"]
    done = run_job("score", *flags, address=cluster)
    assert done.code == 2
    assert "model.safetensors cannot be used" in done.err
    assert not bomb.mark.exists()


@pytest.mark.slow
def test_keys_in_a_uri_are_in_no_error_message(cluster: str, model: Path, data: Path) -> None:
    """No server is needed: every job fails at its first request."""
    uri = "s3://AKIAEXAMPLE:topsecret@bucket/pairs?endpoint_override=127.0.0.1:9&scheme=http"
    assert options_of(locate(uri, "--input").filesystem)["secret_key"] == "topsecret"
    jobs = [
        Job("score", "--model", model, "--input", uri, "--output", "out", address=cluster),
        Job("score", "--model", model, "--input", data, "--output", uri, address=cluster),
        Job("train", "--data", uri, address=cluster),
        Job("train", "--data", data, "--storage-path", uri, address=cluster),
    ]
    for job in jobs:
        done = job.wait()
        assert done.code == 2
        assert "topsecret" not in done.out + done.err
