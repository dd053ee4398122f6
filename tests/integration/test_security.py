"""Datasets, models and checkpoints are data: no pickle in them is executed, no path in them is followed, no key is shown."""

import hashlib
import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mnistsum_ray.storage.object_store import options_of
from mnistsum_ray.storage.paths import locate
from tests.integration.conftest import Job, run_job, score_here

EVERY = 10

pytestmark = pytest.mark.usefixtures("cluster")


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self._mark,)


@pytest.fixture
def bomb(tmp_path: Path) -> bytes:
    """A pickle that is known to create its file; the file is deleted again."""
    mark = mark_of(tmp_path)
    planted = pickle.dumps(Bomb(mark))
    pickle.loads(planted)
    assert mark.exists()
    mark.unlink()
    return planted


def mark_of(folder: Path) -> Path:
    return folder / "the pickle was executed"


def disguised(table: pa.Table, name: str, extension: bytes, metadata: bytes) -> pa.Table:
    """The table with a column that is marked as an extension type, as in files that Ray wrote."""
    index = table.schema.get_field_index(name)
    marks = {b"ARROW:extension:name": extension, b"ARROW:extension:metadata": metadata}
    return table.cast(table.schema.set(index, table.schema.field(index).with_metadata(marks)))


@pytest.mark.slow
def test_pickles_in_a_dataset_are_never_executed(
    cluster: str, model: Path, tmp_path: Path, sample: pa.Table, bomb: bytes
) -> None:
    rows = sample[::500].append_column("number", pa.array([1] * 10, pa.int8()))
    objects = rows.append_column("note", pa.array([bomb] * 10, pa.binary()))
    images = rows.set_column(0, "image", pa.array([bomb] * 10, pa.binary()))
    lists = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(10 * 784, np.uint8)), 784)
    tensors = rows.set_column(0, "image", lists)
    files = {
        "objects": disguised(objects, "note", b"ray.data.arrow_pickled_object", b""),
        "images": disguised(images, "image", b"ray.data.arrow_pickled_object", b""),
        "tensors": disguised(tensors, "image", b"ray.data.arrow_tensor", bomb),
        "tensors2": disguised(tensors, "image", b"ray.data.arrow_tensor_v2", bomb),
    }
    (tmp_path / "in").mkdir()
    for name, table in files.items():
        pq.write_table(table, tmp_path / "in" / f"{name}.parquet")
    scored = run_job("score", "--model", model, "--input", tmp_path / "in", "--output", tmp_path / "out", address=cluster)
    assert not mark_of(tmp_path).exists()
    assert scored.code == 3, scored.err
    assert scored.last_line["files"] == 4
    for name in files:
        (tmp_path / name).mkdir()
        (tmp_path / "in" / f"{name}.parquet").rename(tmp_path / name / "rows.parquet")
        # Training reads rows in the same way.
        exported = run_job("export_pairs", "--data", tmp_path / name, "--output", tmp_path / f"{name}-pairs", "--rows", 10)
        assert not mark_of(tmp_path).exists(), name
        assert exported.code in (0, 2), exported.err


def test_a_pickle_for_a_model_is_refused(cluster: str, model: Path, tmp_path: Path, data: Path, bomb: bytes) -> None:
    planted = tmp_path / "model"
    planted.mkdir()
    (planted / "model.safetensors").write_bytes(bomb)
    flags = ["--model", planted, "--input", data, "--number-column", "digit", "--output", tmp_path / "out"]
    done = run_job("score", *flags, address=cluster)
    assert done.code == 2
    assert "model.safetensors cannot be used" in done.err
    assert not mark_of(tmp_path).exists()


@pytest.mark.slow
def test_a_pickle_for_a_checkpoint_is_passed_over(cluster: str, tmp_path: Path, data: Path, bomb: bytes) -> None:
    flags = ["--data", data, "--storage-path", tmp_path / "runs", "--name", "mine"]
    assert run_job("train", *flags, "--epochs", 1, "--sum-head-steps", 50, address=cluster).code == 0
    checkpoint = tmp_path / "runs" / "mine" / "epoch_00001_sum_head"  # the last
    (checkpoint / "trainer.safetensors").write_bytes(bomb)
    card = json.loads((checkpoint / "trainer.json").read_text())
    card["sha256"] = hashlib.sha256(bomb).hexdigest()
    (checkpoint / "trainer.json").write_text(json.dumps(card))
    done = run_job("train", *flags, "--resume", address=cluster)
    assert done.code == 0, done.err
    assert f"checkpoint {checkpoint} cannot be used: trainer.safetensors is incomplete or damaged" in done.err
    assert "going on after epoch 1, on 1 workers" in done.err, "from the checkpoint before it"
    assert not mark_of(tmp_path).exists()


def test_a_path_beside_an_image_is_not_followed(model: Path, tmp_path: Path) -> None:
    picture = io.BytesIO()
    Image.fromarray(np.zeros((28, 28), np.uint8)).save(picture, "PNG")
    (tmp_path / "secret.png").write_bytes(picture.getvalue())
    (tmp_path / "in").mkdir()
    images = [{"bytes": None, "path": "../secret.png"}, {"bytes": None, "path": str(tmp_path / "secret.png")}]
    pq.write_table(pa.table({"image": images, "number": [1, 2]}), tmp_path / "in" / "a.parquet")
    scored = score_here(model, tmp_path / "out", tmp_path / "in")
    assert (scored.line["scored_rows"], scored.line["rejected_rows"]) == (0, 2)


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
