"""Datasets and models are data: no pickle in them is executed; no key is shown. Checkpoints: test_checkpoints."""

import io
import multiprocessing
import os
import sys
import tempfile
import traceback
from contextlib import suppress
from pathlib import Path
from typing import get_args
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mnistsum_ray import cli, config
from mnistsum_ray.cli import COMMANDS
from mnistsum_ray.config import ExportPairsConfig, JobConfig, PathText
from mnistsum_ray.errors import RequestError
from mnistsum_ray.export.pairs import export_pairs
from mnistsum_ray.storage.paths import locate
from tests.conftest import writable
from tests.integration.conftest import Bomb, Storage, score_here

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
    assert not bomb.mark.exists()

    for name in files:  # training reads rows in the same way
        data, output = tmp_path / "in" / f"{name}.parquet", str(tmp_path / f"{name}-pairs")
        with suppress(RequestError):
            export_pairs(ExportPairsConfig(data=str(data), output=output, rows=10), print)
        assert not bomb.mark.exists(), name


def config_of(command: str) -> type[JobConfig]:
    found: type[JobConfig] = getattr(config, f"{command.title().replace('-', '')}Config")
    return found


KEYS = "s3://AKIAEXAMPLE:topsecret@"

URI_FIELDS = {
    (name, field)
    for name in COMMANDS
    for field, info in config_of(name).model_fields.items()
    if PathText in (info.rebuild_annotation(), *get_args(info.annotation))
}
"""Each command and each of its flags that takes a path or URI."""


def flags_of(values: dict[str, object]) -> list[str]:
    """The command line of a command; the picture has no flag, and a switch no value."""
    given = [str(value) for field, value in values.items() if field == "picture"]
    for field, value in values.items():
        if field != "picture":
            given += [f"--{field.replace('_', '-')}", *([] if value is True else [str(value)])]
    return given


def run_command(name: str, flags: list[str], environment: dict[str, str], folder: Path) -> tuple[int, str]:
    """Run a command in this process, a fork of one that has imported the packages; its exit code and all that it wrote.

    That one may be a test's that came before, with another environment.
    """
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    with tempfile.TemporaryFile() as written:
        for stream in (1, 2):
            os.dup2(written.fileno(), stream)
        try:
            code = cli.main([name, *flags])
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
            code = -1
        sys.stdout.flush()
        sys.stderr.flush()
        written.seek(0)
        return code, written.read().decode()


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
    train: dict[str, object] = {"data": f"{KEYS}images/keys", "storage_path": f"{KEYS}runs/keys"}
    train |= {"epochs": 1, "sum_head_steps": 1}
    scored: dict[str, object] = {"model": f"{KEYS}runs/keys/one", "input": f"{KEYS}runs/keys/pairs/*.parquet?{query}"}
    works: list[tuple[str, dict[str, object]]] = [
        ("train", train | {"name": "one"}),
        ("export-pairs", {"data": f"{KEYS}images/keys", "output": f"{KEYS}runs/keys/pairs", "rows": 20, "files": 2}),
        ("train", train | {"name": "two", "from_run": f"{KEYS}runs/keys/one"}),
        ("score", scored | {"output": f"{KEYS}runs/keys/scored?{query}", "label_column": "digit"}),
        ("export-model", {"model": f"{KEYS}runs/keys/one?{query}", "output": f"{KEYS}runs/keys/exported"}),
        ("predict", {"picture": f"{KEYS}images/seven.png", "number": 5, "model": f"{KEYS}runs/keys/one"}),
    ]
    closed, bad = f"{KEYS}bucket/x?endpoint_override=127.0.0.1:9&scheme=http", f"{KEYS}bucket/x?nonsense=topsecret"
    wrong = [("train", train | {"mlflow": "https://me:topsecret@host"})]
    for name, values in dict(works).items():
        uris = [field for field in values if (name, field) in URI_FIELDS]
        wrong += [(name, values | {field: closed}) for field in uris]
        wrong += [(name, values | dict.fromkeys(uris, bad)), (name, values | {"print_config": True})]
    assert {(name, field) for name, values in wrong for field in values} >= URI_FIELDS, "a new flag that takes a URI"

    fork = multiprocessing.get_context("forkserver")
    fork.set_forkserver_preload(["mnistsum_ray.api", "mnistsum_ray.predicting", "mnistsum_ray.export.model", "ray.train.torch"])
    with fork.Pool(6, maxtasksperchild=1) as pool:

        def run(requests: list[tuple[str, dict[str, object]]]) -> list[tuple[int, str]]:
            done = [(name, flags_of(values), os.environ | {"RAY_ADDRESS": cluster}, tmp_path) for name, values in requests]
            return pool.starmap(run_command, done, chunksize=1)

        results = [*run(works[:1]), *run(works[1:2])]
        results += run([*works[2:], *wrong])  # they take what the first two have written
    for code, text in results:
        assert code in (0, 1, 2), text
        assert "Traceback" not in text
    for code, text in results[: len(works)]:
        assert code == 0, text
    said = "".join(text for _, text in results)
    assert '"scored_rows": 20' in said
    assert "topsecret" not in said
    for root in (images.place, runs.place, locate(str(tmp_path), "here")):
        for file in root.files():
            assert b"topsecret" not in root.at(file.path).read_bytes(), file.path
