"""Datasets and models are data: no pickle in them is executed; no key is shown. Checkpoints: test_checkpoints."""

import io
import os
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mnistsum_ray.config import ExportPairsConfig
from mnistsum_ray.errors import RequestError
from mnistsum_ray.export.pairs import export_pairs
from mnistsum_ray.storage.paths import locate
from tests.conftest import writable
from tests.integration.conftest import Bomb, Storage, run_warm, score_here

EVERY = 10

pytestmark = pytest.mark.usefixtures("cluster")


def disguised(table: pa.Table, name: str, extension: bytes, metadata: bytes) -> pa.Table:
    """The table with a column that is marked as an extension type, as in files that Ray wrote."""
    index = table.schema.get_field_index(name)
    marks = {b"ARROW:extension:name": extension, b"ARROW:extension:metadata": metadata}
    return table.cast(table.schema.set(index, table.schema.field(index).with_metadata(marks)))


def test_pickles_in_a_dataset_are_never_executed(model: Path, tmp_path: Path, sample: pa.Table, bomb: Bomb) -> None:
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


KEYS = "s3://AKIAEXAMPLE:topsecret@"
CLOSED = f"{KEYS}bucket/x?endpoint_override=127.0.0.1:9&scheme=http"
BAD = f"{KEYS}bucket/x?nonsense=topsecret"


@pytest.mark.slow
def test_keys_in_a_uri_are_written_nowhere(
    s3: Storage, cluster: str, model: Path, data: Path, sample: pa.Table, tmp_path: Path
) -> None:
    """Of every command, where it succeeds, where the storage does not answer, and where the request is refused. All that was
    written is searched for the key."""
    images, runs = writable("s3://images"), writable("s3://runs/keys")
    images.write("keys/rows.parquet", data.read_bytes())
    seven = io.BytesIO()
    Image.fromarray(np.frombuffer(sample["image"][3600].as_py(), np.uint8).reshape(28, 28)).save(seven, "png")
    images.write("seven.png", seven.getvalue())
    query = f"endpoint_override={quote(os.environ['AWS_ENDPOINT_URL'])}"
    run, pairs = f"{KEYS}runs/keys/one", f"{KEYS}runs/keys/pairs"
    train = ["train", "--data", f"{KEYS}images/keys", "--storage-path", f"{KEYS}runs/keys", "--name", "one", "--epochs", "1"]
    export = ["export-pairs", "--data", f"{KEYS}images/keys", "--output", pairs, "--rows", "20", "--files", "2"]
    score = ["score", "--model", run, "--input", f"{pairs}/*.parquet?{query}", "--output", f"{KEYS}runs/keys/scored?{query}"]
    works = [
        [*train, "--sum-head-steps", "1"],
        export,
        [*score, "--label-column", "digit"],
        ["export-model", "--model", f"{run}?{query}", "--output", f"{KEYS}runs/keys/exported"],
        ["predict", f"{KEYS}images/seven.png", "--number", "5", "--model", run],
    ]
    wrong = [[*train, "--mlflow", "https://me:topsecret@host"]]
    for command in works:
        places = [index for index, word in enumerate(command) if word.startswith(KEYS)]
        for uri in (CLOSED, BAD):
            wrong += [[*command[:index], uri, *command[index + 1 :]] for index in places]
    for command in works[:2]:  # the others read what they have written
        ((code, text),) = run_warm([command], tmp_path, RAY_ADDRESS=cluster)
        assert code == 0, text
    results = run_warm([*works[2:], *wrong], tmp_path, processes=6, RAY_ADDRESS=cluster)
    for code, text in results[:3]:
        assert code == 0, text
    assert '"scored_rows": 20' in results[0][1]
    for code, text in results[3:]:
        assert code in (1, 2, os.EX_TEMPFAIL), text
        assert "Traceback" not in text
    assert "topsecret" not in "".join(text for _, text in results)
    for root in (images.place, runs.place, locate(str(tmp_path), "here")):
        for file in root.files():
            assert b"topsecret" not in root.at(file.path).read_bytes(), file.path
