"""What `--data` names: rows in memory or files, their splits; what cannot be used is refused."""

import gzip
import hashlib
import os
import re
import shutil
import socket
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from werkzeug import Response
from werkzeug.middleware.shared_data import SharedDataMiddleware

from mnistsum_ray.config import LabelledDataConfig
from mnistsum_ray.data.images import Pixels, decode_images, one_chunk, pixels_view
from mnistsum_ray.data.sources import (
    SPLITS,
    Source,
    check_unchanged,
    held_out_rows,
    open_source,
)
from mnistsum_ray.errors import RequestError
from tests.storage.conftest import serving


def opened(data: Path | str, **columns: str) -> Source:
    return open_source(LabelledDataConfig(data=str(data), **columns))


def check(source: Source, rows: pa.Table) -> list[int]:
    """A source in memory has these rows, in this order; return how many are of each split."""
    found = pa.concat_tables(source.tables.values())
    images, _ = decode_images(found["image"])
    assert np.array_equal(images, pixels_view(one_chunk(rows["image"])))
    assert found["digit"].to_pylist() == rows["digit"].to_pylist()
    assert found["row_hash"].to_pylist() == [*range(rows.num_rows)]
    return [source.rows_of(split) for split in SPLITS]


def write_idx(path: Path, values: Pixels) -> None:
    header = bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape)
    path.write_bytes(header + values.tobytes())


IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


@pytest.fixture
def idx(tmp_path: Path, sample: pa.Table) -> Path:
    """MNIST's files in torchvision's layout: 400 training and 100 test rows."""
    images = pixels_view(sample["image"].chunk(0))[::10]
    digits = sample["digit"].to_numpy()[::10].astype(np.uint8)
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    contents = (images[:400], digits[:400], images[400:], digits[400:])
    for name, values in zip(IDX_FILES, contents, strict=True):
        write_idx(folder / name, values)
    return tmp_path


def test_sample_and_mnist(idx: Path, sample: pa.Table, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` and `mnist` take ./data/MNIST/raw, here a small stand-in in the same layout."""
    source = opened("sample")
    assert check(source, sample) == [5000, 0, 0]
    assert (source.held_out_splits, source.train_rows) == (["test", "validation"], 4000)
    (idx / "data").symlink_to(idx)
    monkeypatch.chdir(idx)
    for name in ("MNIST", "MNIST/raw", "auto", "mnist"):
        source = opened(name)
        assert check(source, sample[::10]) == [400, 0, 100]
        assert (source.name, source.notice, source.train_rows) == ("mnist", "", 360)
    with pytest.raises(RequestError, match=r"^--data nist: there is no .*; did you mean mnist\?$"):
        opened("nist")


IMAGES, LABELS = IDX_FILES[2:]
DAMAGES: list[tuple[str, Callable[[Path], object]]] = [
    (IMAGES, lambda path: os.truncate(path, 5000)),
    (LABELS, Path.unlink),
    (LABELS, lambda path: write_idx(path, np.zeros(9, np.uint8))),
]


@pytest.mark.parametrize(("name", "damage"), DAMAGES)
def test_damaged_files_of_mnist_are_refused(idx: Path, name: str, damage: Any) -> None:
    damage(idx / "MNIST" / "raw" / name)
    said = rf"^--data {idx}/MNIST/raw: holds no whole MNIST \(.*\); get its four files again$"
    with pytest.raises(RequestError, match=said):
        opened(idx)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, "holds neither MNIST's files"),
    ({"a?b": {}}, "a?b.parquet: its name must end in .parquet, .pq, .parq, and hold no question"),
    ({"a": b"cut off"}, "a.parquet: is not Parquet, or was cut off"),
    ({"a": {"image": 0}}, "a.parquet: has no column 'digit' but image; --label-column names an"),
    ({"a": {"digit": 1, "x": 1}}, "a.parquet: has no column 'image' but digit, x; --image-column"),
    ({"a": {"image": 1, "digit": 1}}, "a.parquet: column 'image' has type int8, which holds no im"),
    ({"a": {"image": 0, "digit": 0}}, "column 'digit' has type "),
    ({"day": {"image": 0, "label": 1}, "test": {"image": 0, "label": 1}}, "some files are named"),
]
"""Columns of files by name: 0 is one of images, 1 one of digits."""


@pytest.mark.parametrize(("files", "said"), REFUSED)
def test_a_folder_that_will_not_do_is_refused_by_its_footers(
    tmp_path: Path, sample: pa.Table, files: dict[str, Any], said: str
) -> None:
    for name, content in files.items():
        path = tmp_path / f"{name}.parquet"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            pq.write_table(pa.table({name: sample[index] for name, index in content.items()}), path)
    with pytest.raises(RequestError, match=re.escape(said)):
        opened(tmp_path)


def test_a_column_of_a_name_that_ray_data_adds_is_refused(tmp_path: Path, sample: pa.Table) -> None:
    pq.write_table(sample.rename_columns({"digit": "path"}), tmp_path / "a.parquet")
    with pytest.raises(RequestError, match="column 'path' has the name of one that Ray Data adds"):
        open_source(LabelledDataConfig(data=str(tmp_path), label_column="path"))


NAMES = [
    ("train-00000-of-00001.parquet", "validation-0.parquet", "test-0.parquet"),
    ("training/a.parquet", "val/a.parquet", "testing/a.parquet"),
    ("mnist_Train.parquet", "VALID.pq", "TEST/a.PARQ"),
]


@pytest.mark.parametrize("names", NAMES)
def test_names_of_files_and_folders_tell_the_split(
    tmp_path: Path, sample: pa.Table, names: Sequence[str]
) -> None:
    for rows, name in enumerate(names, 20):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(sample[:rows].rename_columns({"digit": "label"}), tmp_path / name)
    source = opened(tmp_path)
    assert [source.rows_of(split) for split in SPLITS] == [20, 21, 22]
    assert (source.held_out_splits, source.train_rows) == ([], 20)


def test_a_tenth_is_held_out_and_5_000_rows_at_most() -> None:
    assert [held_out_rows(rows) for rows in (9, 1009, 60_000)] == [0, 100, 5_000]


def test_a_file_that_has_changed_since_its_footer_was_read_is_named(
    tmp_path: Path, sample: pa.Table
) -> None:
    for name in ("1.parquet", "2.parquet"):
        pq.write_table(sample[::50], tmp_path / name)
    config = LabelledDataConfig(data=str(tmp_path))
    source = open_source(config)
    check_unchanged(config, source)
    for change in (lambda path: pq.write_table(sample[1::50], path), Path.unlink):
        change(tmp_path / "2.parquet")
        with pytest.raises(RequestError, match=r"^--data \S*/2.parquet: has changed while it was"):
            check_unchanged(config, source)


def test_the_fingerprint_is_that_of_paths_and_versions_of_files_or_of_the_rows_in_memory(
    tmp_path: Path, sample: pa.Table, idx: Path
) -> None:
    path = tmp_path / "in" / "1.parquet"
    path.parent.mkdir()
    found = []
    for change in (
        lambda: pq.write_table(sample[::50], path),
        lambda: Path(shutil.copy2(path, tmp_path / "copy")).rename(path),  # same content and time
        lambda: pq.write_table(sample[1::50], path.with_name("2.parquet")),
        lambda: path.rename(path.with_name("3.parquet")),
    ):
        change()
        found.append(opened(path.parent).fingerprint)
        assert opened(path.parent).fingerprint == found[-1]
    found.append(opened(path.parent.rename(tmp_path / "moved")).fingerprint)
    found.append(opened(idx).fingerprint)
    shutil.copytree(idx / "MNIST", idx / "copied" / "MNIST")
    assert opened(idx / "copied").fingerprint == found[-1]
    write_idx(idx / "MNIST" / "raw" / LABELS, np.zeros(100, np.uint8))
    found.append(opened(idx).fingerprint)
    assert len(set(found)) == len(found)


def test_mnist_is_downloaded_and_without_a_network_auto_takes_the_sample_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, idx: Path, sample: pa.Table
) -> None:
    from torchvision.datasets import MNIST

    (tmp_path / "work").mkdir()
    served, resources = tmp_path / "work", []
    for name in IDX_FILES:
        data = gzip.compress((idx / "MNIST" / "raw" / name).read_bytes())
        (served / f"{name}.gz").write_bytes(data)
        resources.append((f"{name}.gz", hashlib.md5(data).hexdigest()))
    monkeypatch.chdir(served)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(MNIST, "resources", resources)
    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])  # nobody listens there
    source = opened("auto")
    assert (source.name, source.notice[:18]) == ("sample", "NOT the full MNIST")
    with pytest.raises(RequestError, match=r"cannot be downloaded \("):
        opened("mnist")
    assert not list((tmp_path / "home" / ".cache" / "mnistsum_ray").iterdir())
    with serving(SharedDataMiddleware(Response(status=404), {"/": str(served)})) as port:
        monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{port}/"])
        assert check(opened("mnist"), sample[::10]) == [400, 0, 100]
    assert socket.getdefaulttimeout() is None
