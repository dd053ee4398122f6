"""MNIST and the bundled sample: where they are found, and what is damaged is refused."""

import gzip
import hashlib
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from werkzeug import Response
from werkzeug.middleware.shared_data import SharedDataMiddleware

from mnistsum_ray.data.columns import Images
from mnistsum_ray.data.columns.base import Array, one_chunk
from mnistsum_ray.data.sources import SPLITS, Source
from mnistsum_ray.errors import RequestError
from tests.storage.conftest import serving
from tests.training import open_data as opened


def check(source: Source, rows: pa.Table) -> list[int]:
    """A source in memory has these rows, in this order; return how many are of each split."""
    found = pa.concat_tables(source.tables.values())
    images, _ = Images(28, 28).decode(found["image"], "image")
    assert np.array_equal(images, Images(28, 28).view(one_chunk(rows["image"])))
    assert found["digit"].to_pylist() == rows["digit"].to_pylist()
    return [source.rows_of(split) for split in SPLITS]


def write_idx(path: Path, values: Array) -> None:
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
    images = Images(28, 28).view(sample["image"].chunk(0))[::10]
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
    assert {*source.ranges("train")} == {*SPLITS}
    assert source.train_rows == 4000
    (idx / "data").symlink_to(idx)
    monkeypatch.chdir(idx)
    for name in ("MNIST", "MNIST/raw", "auto", "mnist"):
        source = opened(name)
        assert check(source, sample[::10]) == [400, 0, 100]
        assert (source.name, source.notice, source.train_rows) == ("mnist", "", 360)


IMAGES, LABELS = IDX_FILES[2:]
DAMAGES: list[tuple[str, Callable[[Path], object]]] = [
    (IMAGES, lambda path: os.truncate(path, 5000)),
    (LABELS, Path.unlink),
    (LABELS, lambda path: write_idx(path, np.zeros(9, np.uint8))),
]


@pytest.mark.parametrize(("name", "damage"), DAMAGES)
def test_damaged_files_of_mnist_are_refused(idx: Path, name: str, damage: Any) -> None:
    damage(idx / "MNIST" / "raw" / name)
    said = rf"^--data {idx}/MNIST/raw/{name}: is no whole file of MNIST \(.*\); get it again$"
    with pytest.raises(RequestError, match=said):
        opened(idx)


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
