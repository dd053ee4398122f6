"""Datasets and models are data: no pickle in them is executed; no key is shown. Checkpoints: test_checkpoints."""

import io
import os
import time
from pathlib import Path
from typing import get_args
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mnistsum_ray import config
from mnistsum_ray.cli import COMMANDS
from mnistsum_ray.config import JobConfig, PathText
from mnistsum_ray.storage.paths import locate
from tests.conftest import writable
from tests.integration.conftest import Bomb, Job, Storage, run_job, score_here

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
def test_pickles_in_our_own_tables_are_never_executed(
    cluster: str, model: Path, tmp_path: Path, sample: pa.Table, bomb: Bomb
) -> None:
    """A planted `files.parquet` of a finished output, and `data_files.parquet` of a run that is trained again."""

    def plant(path: Path, column: str) -> None:
        table = pq.read_table(path)
        planted = pa.array([bomb.pickled] * table.num_rows, pa.binary())
        table = table.set_column(table.schema.get_field_index(column), column, planted)
        pq.write_table(disguised(table, column, b"ray.data.arrow_pickled_object", b""), path)

    rows = tmp_path / "rows.parquet"
    pq.write_table(sample[::50].append_column("number", pa.array([1] * 100, pa.int8())), rows)
    score_here(model, tmp_path / "out", rows)
    plant(tmp_path / "out" / "files.parquet", "status")
    assert score_here(model, tmp_path / "out", rows).complete
    assert not bomb.mark.exists()

    flags = ["--data", rows, "--storage-path", tmp_path, "--epochs", 1, "--sum-head-steps", 1]
    assert run_job("train", *flags, "--name", "mine", address=cluster).code == 0
    plant(tmp_path / "mine" / "data_files.parquet", "footer_sha256")
    run_job("train", *flags, "--name", "again", "--from-run", tmp_path / "mine", address=cluster)
    assert not bomb.mark.exists()


def config_of(command: str) -> type[JobConfig]:
    found: type[JobConfig] = getattr(config, f"{command.title().replace('-', '')}Config")
    return found


KEYS = "s3://AKIAEXAMPLE:topsecret@"

URI_FIELDS = {
    (name, field)
    for name, config_class in ((name.replace("-", "_"), config_of(name)) for name in COMMANDS)
    for field, info in config_class.model_fields.items()
    if PathText in (info.rebuild_annotation(), *get_args(info.annotation))
}
"""Each command and each of its flags that takes a path or URI."""


def flags_of(name: str, values: dict[str, object]) -> list[object]:
    """The command line of a command; the picture has no flag."""
    given = [value for field, value in values.items() if field == "picture"]
    return given + [
        word for field, value in values.items() if field != "picture" for word in (f"--{field.replace('_', '-')}", value)
    ]


@pytest.mark.slow
def test_keys_in_a_uri_are_written_nowhere(
    s3: Storage, cluster: str, model: Path, data: Path, sample: pa.Table, tmp_path: Path
) -> None:
    """Every flag that takes a URI, of every command, with keys: where it succeeds, where the storage does not answer, where the
    request is refused, and where the settings are printed. All that was written is searched for the key."""
    images, runs = writable("s3://images"), writable("s3://runs/keys")
    images.write("keys/rows.parquet", data.read_bytes())
    seven = io.BytesIO()
    Image.fromarray(np.frombuffer(sample["image"][3600].as_py(), np.uint8).reshape(28, 28)).save(seven, "png")
    images.write("seven.png", seven.getvalue())
    runs.write("model/model.safetensors", (model / "model.safetensors").read_bytes())
    query = f"endpoint_override={quote(os.environ['AWS_ENDPOINT_URL'])}"
    train: dict[str, object] = {
        "data": f"{KEYS}images/keys",
        "storage_path": f"{KEYS}runs/keys",
        "epochs": 1,
        "sum_head_steps": 1,
    }
    scored: dict[str, object] = {"model": f"{KEYS}runs/keys/one", "input": f"{KEYS}runs/keys/pairs/*.parquet?{query}"}
    works: list[tuple[str, dict[str, object]]] = [
        ("train", train | {"name": "one"}),
        ("train", train | {"name": "two", "from_run": f"{KEYS}runs/keys/one"}),
        ("export_pairs", {"data": f"{KEYS}images/keys", "output": f"{KEYS}runs/keys/pairs", "rows": 20, "files": 2}),
        ("score", scored | {"output": f"{KEYS}runs/keys/scored?{query}", "label_column": "digit"}),
        ("export_model", {"model": f"{KEYS}runs/keys/one?{query}", "output": f"{KEYS}runs/keys/exported"}),
        ("predict", {"picture": f"{KEYS}images/seven.png", "number": 5, "model": f"{KEYS}runs/keys/one"}),
    ]
    tried, said = set(), ""
    for name, values in works:
        done = run_job(name, *flags_of(name, values), address=cluster, cwd=tmp_path)
        assert done.code == 0, done.err
        tried |= {(name, field) for field in values}
        said += done.out + done.err
    assert '"scored_rows": 20' in said

    closed, bad = f"{KEYS}bucket/x?endpoint_override=127.0.0.1:9&scheme=http", f"{KEYS}bucket/x?nonsense=topsecret"
    commands, jobs = dict(works), list[Job]()
    wrong = [("train", train | {"mlflow": "https://me:topsecret@host"})]
    for name, values in commands.items():
        uris = [field for field in values if (name, field) in URI_FIELDS]
        wrong += [(name, values | {field: closed}) for field in uris]
        wrong += [(name, values | dict.fromkeys(uris, bad)), (name, values | {"print_config": True})]
    for name, values in wrong:
        tried |= {(name, field) for field in values}
        flags = flags_of(name, {field: value for field, value in values.items() if field != "print_config"})
        jobs.append(Job(name, *flags, *(["--print-config"] if "print_config" in values else []), address=cluster, cwd=tmp_path))
        while sum(job.process.poll() is None for job in jobs) > 3:
            time.sleep(0.1)
    for job in jobs:
        done = job.wait()
        assert done.code in (0, 1, 2), done.err
        assert "Traceback" not in done.err
        said += done.out + done.err
    assert tried >= URI_FIELDS, "a new flag that takes a URI"
    assert "topsecret" not in said
    for root in (images.place, runs.place, locate(str(tmp_path), "here")):
        for file in root.files():
            assert b"topsecret" not in root.at(file.path).read_bytes(), file.path
