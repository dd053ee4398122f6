"""Every source gives fixed, disjoint splits; what cannot be used is refused with the file's name."""

import functools
import gzip
import hashlib
import http.server
import os
import re
import shutil
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mnistsum_ray.data.idx import IDX_FILES
from mnistsum_ray.data.images import Pixels, pixels_view
from mnistsum_ray.data.sources import ImageArrays, Source, open_source
from mnistsum_ray.errors import RequestError


def write_idx(folder: Path, name: str, values: Pixels, *, zipped: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    data = bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()
    (folder / f"{name}{'.gz' if zipped else ''}").write_bytes(gzip.compress(data) if zipped else data)


@pytest.fixture
def idx(tmp_path: Path, sample: pa.Table) -> Path:
    """An IDX folder in torchvision's layout: 400 training and 100 test rows."""
    images = pixels_view(sample["image"].chunk(0))[::10]
    digits = sample["digit"].to_numpy()[::10].astype(np.uint8)
    folder = tmp_path / "MNIST" / "raw"
    write_idx(folder, "train-images-idx3-ubyte", images[:400])
    write_idx(folder, "train-labels-idx1-ubyte", digits[:400], zipped=True)
    write_idx(folder, "t10k-images-idx3-ubyte", images[400:], zipped=True)
    write_idx(folder, "t10k-labels-idx1-ubyte", digits[400:])
    return tmp_path


def check_splits(source: Source, train: int, validation: int, test: int) -> None:
    assert (len(source.train), len(source.validation), len(source.test)) == (train, validation, test)
    together = np.concatenate([split.ids() for split in source.splits])
    assert np.array_equal(np.sort(together), np.arange(train + validation + test))


def test_sample() -> None:
    source = open_source("sample")
    check_splits(source, 4000, 500, 500)
    assert np.bincount(source.data.fetch(np.arange(5000))[1]).tolist() == [500] * 10


@pytest.mark.parametrize("below", ["", "MNIST", "MNIST/raw"])
def test_idx_folder_gzipped_or_not(idx: Path, below: str, sample: pa.Table) -> None:
    source = open_source(str(idx / below))
    check_splits(source, 360, 40, 100)
    assert source.test.ids().tolist() == list(range(400, 500)), "the test files' rows are the test rows, whole"
    assert np.array_equal(source.data.fetch(np.arange(500))[0], pixels_view(sample["image"].chunk(0))[::10])


def to_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def other(values: Pixels) -> Callable[[Path], None]:
    return lambda path: write_idx(path.parent, path.name, values)


IMAGES, LABELS = "train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
DAMAGES: list[tuple[str, Callable[[Path], object], str]] = [
    (IMAGES, lambda path: path.write_bytes(path.read_bytes()[:-1]), "n x 28 x 28, or is damaged"),
    ("t10k-images-idx3-ubyte.gz", lambda path: path.write_bytes(path.read_bytes()[:-20]), ": cannot be read"),
    (IMAGES, other(np.zeros((9, 32, 32), np.uint8)), "is not an IDX file"),
    (LABELS, Path.unlink, " is missing"),
    (LABELS, lambda path: path.write_bytes(b"hello there"), "is not an IDX file of unsigned bytes, n,"),
    (LABELS, other(np.full(100, 12, np.uint8)), "the digit is 12, not"),
    (LABELS, other(np.zeros(99, np.uint8)), "not as many labels"),
    (LABELS, to_pipe, " is missing"),
]


@pytest.mark.parametrize(("name", "damage", "said"), DAMAGES, ids=[said for *_, said in DAMAGES])
def test_a_damaged_idx_folder_is_refused(idx: Path, name: str, damage: Callable[[Path], object], said: str) -> None:
    damage(idx / "MNIST" / "raw" / name)
    with pytest.raises(RequestError, match=rf"^(--data )?{idx}.*{re.escape(said)}"):
        open_source(str(idx))


def test_an_idx_folder_is_read_without_the_rows_of_its_bad_labels(idx: Path) -> None:
    before, labels = open_source(str(idx)), idx / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    labels.write_bytes(labels.read_bytes()[:-1] + bytes([12]))
    source = open_source(str(idx), skip_bad_rows=True)
    assert source.test.ids().tolist() == list(range(400, 499))
    assert source.train.ids().tolist() == before.train.ids().tolist()
    assert [*source.bad.examples.values()] == [[["t10k-labels-idx1-ubyte", 99]]]
    labels.write_bytes(labels.read_bytes()[:8] + bytes([12] * 100))
    with pytest.raises(RequestError, match=r"without 100 bad rows only 360 training, .* and 0 test rows are left: "):
        open_source(str(idx), skip_bad_rows=True)


REFUSED: list[tuple[dict[str, Callable[[pa.Table], pa.Table] | bytes], str]] = [
    ({}, "holds neither IDX files"),
    ({"a": b"cut off"}, "a.parquet: is not Parquet, or was cut off"),
    ({"a": lambda rows: rows.drop_columns(["digit"])}, "needs a column 'image' and a column 'digit' or 'label', has image"),
    ({"a": lambda rows: rows.set_column(0, "image", pa.array(["a"] * 100))}, "column 'image' has type string"),
    ({"a": lambda rows: rows.append_column("digit", rows["digit"])}, "a.parquet: has more than one column 'digit'"),
    ({"a": lambda rows: rows[:5]}, "has 5 training rows"),
    ({"a": lambda rows: rows, "test": lambda rows: rows}, "some files are named train or test and some are not"),
]


@pytest.mark.parametrize(("files", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_a_folder_that_will_not_do_is_refused_by_its_footers(tmp_path: Path, sample: pa.Table, files: Any, said: str) -> None:
    for name, change in files.items():
        path = tmp_path / f"{name}.parquet"
        path.write_bytes(change) if isinstance(change, bytes) else pq.write_table(change(sample[::50]), path)
    with pytest.raises(RequestError, match=re.escape(said)):
        open_source(str(tmp_path))


SPLITS = [
    ("train-00000-of-00001.parquet", "validation-0.parquet", "test-0.parquet"),
    ("training/a.parquet", "val/a.parquet", "testing/a.parquet"),
    ("mnist_Train.parquet", "VALID.pq", "TEST/a.PARQ"),
]


@pytest.mark.parametrize("names", SPLITS)
def test_files_and_folders_named_for_a_split_are_that_split(sample: pa.Table, tmp_path: Path, names: tuple[str, ...]) -> None:
    table = sample[::50].rename_columns({"digit": "label"})
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, tmp_path / name)
    source = open_source(str(tmp_path))
    at = {name: range(100 * place, 100 * place + 100) for place, name in enumerate(sorted(names))}
    assert [split.ids().tolist() for split in source.splits] == [list(at[name]) for name in names]
    images, digits = source.data.fetch(np.arange(100))
    assert np.array_equal(images, pixels_view(table["image"].combine_chunks()))
    assert digits.tolist() == table["label"].to_pylist()


def test_full_mnist_where_it_lies(monkeypatch: pytest.MonkeyPatch, idx: Path) -> None:
    """`auto` and `mnist` take ./data/MNIST/raw; here a small stand-in in the same layout."""
    (idx / "data").mkdir()
    (idx / "MNIST").rename(idx / "data" / "MNIST")
    monkeypatch.chdir(idx)
    for name in ("auto", "mnist"):
        source = open_source(name)
        assert (source.name, source.notice) == ("mnist", "")
        check_splits(source, 360, 40, 100)


def test_without_a_network_auto_says_so_and_mnist_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import MNIST

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])  # nobody listens there: a real refusal of the connection
    source = open_source("auto")
    assert source.name == "sample"
    assert source.notice.startswith("NOT the full MNIST")
    assert "Connection refused" in source.notice
    with pytest.raises(RequestError, match="cannot be downloaded"):
        open_source("mnist")


def test_mnist_is_downloaded_whole_and_a_damaged_file_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, idx: Path
) -> None:
    """From a web server on this machine."""
    from torchvision.datasets import MNIST

    raw, cache = idx / "MNIST" / "raw", tmp_path / "home" / ".cache" / "mnistsum_ray"
    for path in raw.iterdir():
        if path.suffix != ".gz":
            Path(f"{path}.gz").write_bytes(gzip.compress(path.read_bytes()))
    files = [raw / f"{name}.gz" for name in IDX_FILES]
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(MNIST, "resources", [(path.name, hashlib.md5(path.read_bytes()).hexdigest()) for path in files])
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(raw))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
        whole = files[3].read_bytes()
        files[3].write_bytes(gzip.compress(b"other"))
        with pytest.raises(RequestError, match=r"cannot be downloaded \(.*corrupted"):
            open_source("mnist")
        assert not list(cache.iterdir())
        files[3].write_bytes(whole)
        check_splits(open_source("mnist"), 360, 40, 100)
        server.shutdown()
    assert socket.getdefaulttimeout() is None


def test_the_fingerprint_of_data_is_that_of_a_copy_and_not_of_other_files_rows_or_splits(
    write_rows: Callable[[int], Path], tmp_path: Path, sample: pa.Table
) -> None:
    def fingerprint(folder: Path) -> str:
        source = open_source(str(folder))
        return source.fingerprint(source.data)

    folder, copy = tmp_path / "data", tmp_path / "copy"
    folder.mkdir()
    write_rows(500).rename(folder / "rows.parquet")
    shutil.copytree(folder, copy)
    assert fingerprint(folder) == fingerprint(copy)
    (copy / "rows.parquet").rename(copy / "others.parquet")
    pq.write_table(sample[1:501], tmp_path / "changed.parquet")
    assert len({fingerprint(path) for path in (folder, copy, tmp_path / "changed.parquet")}) == 3
    arrays, source = ImageArrays(*open_source(str(folder)).data.fetch(np.arange(500))), open_source(str(folder))
    changed = [
        source.fingerprint(arrays),
        source.fingerprint(replace(arrays, images=np.bitwise_xor(arrays.images, np.uint8(128)))),
        source.fingerprint(replace(arrays, digits=(arrays.digits + 1) % 10)),
        replace(source, test=source.validation).fingerprint(arrays),
    ]
    assert len(set(changed)) == len(changed)
