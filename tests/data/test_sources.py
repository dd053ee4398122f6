"""Every source gives whole rows and disjoint splits; what cannot be used is refused by name."""

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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mnistsum_ray.data.blocks import BadRows, Block
from mnistsum_ray.data.idx import IDX_FILES
from mnistsum_ray.data.images import Pixels, one_chunk, pixels_view
from mnistsum_ray.data.sources import Source, open_source
from mnistsum_ray.errors import RequestError, StorageError


def blocks_of(source: Source) -> list[Block]:
    return [block for group in source.groups for block in group.blocks()]


def splits_of(source: Source) -> list[list[int]]:
    return [split.tolist() for split in (source.train, source.validation, source.test)]


def check(source: Source, rows: pa.Table, *splits: int) -> None:
    """The blocks hold these rows, `image` and digit, in order; the splits have so many of them."""
    blocks = blocks_of(source)
    images = np.concatenate([block.images for block in blocks])
    assert np.array_equal(images, pixels_view(one_chunk(rows["image"])))
    assert np.concatenate([block.digits for block in blocks]).tolist() == rows[1].to_pylist()
    found = splits_of(source)
    assert [*map(len, found)] == [*splits]
    assert found == [sorted(split) for split in found]
    assert sorted(np.concatenate(found).tolist()) == list(range(rows.num_rows))


def write_idx(folder: Path, name: str, values: Pixels) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    data = bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()
    (folder / name).write_bytes(data)


@pytest.fixture
def idx(tmp_path: Path, sample: pa.Table) -> Path:
    """An IDX folder in torchvision's layout: 400 training and 100 test rows."""
    images = pixels_view(sample["image"].chunk(0))[::10]
    digits = sample["digit"].to_numpy()[::10].astype(np.uint8)
    folder = tmp_path / "MNIST" / "raw"
    write_idx(folder, "train-images-idx3-ubyte", images[:400])
    write_idx(folder, "train-labels-idx1-ubyte", digits[:400])
    write_idx(folder, "t10k-images-idx3-ubyte", images[400:])
    write_idx(folder, "t10k-labels-idx1-ubyte", digits[400:])
    return tmp_path


def test_sample_idx_folder_and_full_mnist_where_it_lies(idx: Path, sample: pa.Table, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` and `mnist` take ./data/MNIST/raw, here a small stand-in in the same layout."""
    source = open_source("sample")
    check(source, sample, 4000, 500, 500)
    assert (source.validation[:4].tolist(), source.test[:4].tolist()) == ([5, 16, 21, 37], [0, 8, 29, 33])
    (idx / "data").symlink_to(idx)
    monkeypatch.chdir(idx)
    for name in (str(idx), "MNIST", "MNIST/raw", "auto", "mnist"):
        source = open_source(name)
        check(source, sample[::10], 360, 40, 100)
        assert source.test.tolist() == list(range(400, 500)), "those of the test files"
        assert (source.name, source.notice) == ("mnist", "")


IMAGES, LABELS = "train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
DAMAGES: list[tuple[str, Callable[[Path], object], str]] = [
    (IMAGES, lambda path: path.write_bytes(path.read_bytes()[:-1]), "n x 28 x 28, or is damaged"),
    (IMAGES, lambda path: write_idx(path.parent, path.name, np.zeros((9, 32, 32), np.uint8)), "is not an IDX file"),
    (LABELS, Path.unlink, " is missing"),
    (LABELS, lambda path: path.write_bytes(b"hello there"), "is not an IDX file of unsigned bytes, n,"),
    (
        LABELS,
        lambda path: write_idx(path.parent, path.name, np.zeros(99, np.uint8)),
        "has 99 labels, and t10k-images-idx3-ubyte 100 images",
    ),
]


@pytest.mark.parametrize(("name", "damage", "said"), DAMAGES, ids=[said for *_, said in DAMAGES])
def test_a_damaged_idx_folder_is_refused(idx: Path, name: str, damage: Callable[[Path], object], said: str) -> None:
    damage(idx / "MNIST" / "raw" / name)
    with pytest.raises(RequestError, match=rf"^{idx}.*{re.escape(said)}"):
        open_source(str(idx))


REFUSED: list[tuple[dict[str, Callable[[pa.Table], pa.Table] | bytes], str]] = [
    ({}, "holds neither IDX files"),
    ({"a": b"cut off"}, "a.parquet: is not Parquet, or was cut off"),
    ({"a": lambda rows: rows.drop_columns(["digit"])}, "needs a column 'image' and a column 'digit' or 'label', has image"),
    ({"a": lambda rows: rows.set_column(0, "image", pa.array(["a"] * 100))}, "column 'image' has type string"),
    ({"a": lambda rows: rows.append_column("digit", rows["digit"])}, "a.parquet: has more than one column 'digit'"),
    ({"a": lambda rows: rows[:5]}, "has 5 training rows"),
    ({"a": lambda rows: rows, "test": lambda rows: rows}, "some files are named train or test and some are not"),
    ({"train": lambda rows: rows, "test": lambda rows: rows[:0]}, "its validation or test files have no rows"),
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
def test_files_and_folders_named_for_a_split_are_that_split(sample: pa.Table, tmp_path: Path, names: Sequence[str]) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(sample[::50].rename_columns({"digit": "label"}), tmp_path / name)
    at = {name: [*range(100 * place, 100 * place + 100)] for place, name in enumerate(sorted(names))}
    assert splits_of(open_source(str(tmp_path))) == [at[name] for name in names]


def write_files(folder: Path, rows: pa.Table, sizes: Sequence[int], group_rows: int) -> Source:
    """Files of so many rows each, with row groups of so many at most."""
    for index, end in enumerate(np.cumsum(sizes)):
        part = rows.slice(end - sizes[index], sizes[index])
        pq.write_table(part, folder / f"{index:03}.parquet", row_group_size=group_rows)
    return open_source(str(folder))


LAYOUTS = [
    ([20_000], 777, [8192, 8192, 3616]),
    ([8191, 8193, 16_385], 100_000, [8191, 8192, 1, 8192, 8192, 1]),
    ([*range(0, 300, 7), 0, 8192, 1, 8191, 2], 100, [6321, 8192, 8192, 2]),
]


@pytest.mark.parametrize(("sizes", "group_rows", "blocks"), LAYOUTS)
def test_a_block_has_8192_rows_of_a_file_or_those_of_many_small_files(
    tmp_path: Path, sample: pa.Table, sizes: list[int], group_rows: int, blocks: list[int]
) -> None:
    rows = sample.take(np.random.default_rng(0).integers(0, 5000, sum(sizes)))
    source = write_files(tmp_path, rows, sizes, group_rows)
    held_out = min(5000, len(rows) // 10)
    check(source, rows, len(rows) - 2 * held_out, held_out, held_out)
    assert [len(block.digits) for block in blocks_of(source)] == blocks
    for split in (source.validation, source.test):
        digits = rows["digit"].to_numpy()[split]
        assert np.bincount(digits, minlength=10).min() > held_out / 20, "all digits"


def test_a_bad_label_of_an_idx_folder_is_named_and_some_rows_must_be_left(idx: Path) -> None:
    """Those of Parquet files: tests/integration/test_rows.py."""
    write_idx(idx / "MNIST" / "raw", LABELS, np.arange(100, dtype=np.uint8) // 9)
    source = open_source(str(idx))
    (block,) = blocks_of(source)
    places = {row: place[:2] for row, place in block.bad.items()}
    assert places == {row: (LABELS, row - 400) for row in range(490, 500)}
    assert splits_of(source.without(block.bad, skip=True))[2] == [*range(400, 490)]
    bad: BadRows = {row: ("a", row, "bad") for row in source.test.tolist()}
    with pytest.raises(RequestError, match="without 100 bad rows only 360 training, 40 validation and 0 test rows are left"):
        source.without(bad, skip=True)


def test_a_file_that_changed_since_it_was_listed_or_is_gone_is_named(tmp_path: Path, sample: pa.Table) -> None:
    """Also one that another takes the place of, of the same size and time."""
    path, copy = tmp_path / "001.parquet", tmp_path / "copy"
    source = write_files(tmp_path, sample[::50], [30, 30, 40], 20)
    shutil.copy2(path, copy)
    changes: list[Callable[[], object]] = [lambda: copy.rename(path), lambda: os.utime(path, (0, 0))]
    for change in changes:
        change()
        with pytest.raises(RequestError, match=r"001\.parquet: has changed since the run began"):
            blocks_of(source)
        source = open_source(str(tmp_path))
    path.unlink()
    with pytest.raises(StorageError, match=r"001\.parquet: is not there"):
        blocks_of(source)


def test_mnist_is_downloaded_whole_and_without_a_network_auto_takes_the_sample_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, idx: Path, sample: pa.Table
) -> None:
    """From a web server on this machine."""
    from torchvision.datasets import MNIST

    raw, cache = idx / "MNIST" / "raw", tmp_path / "home" / ".cache" / "mnistsum_ray"
    for name in IDX_FILES:
        (raw / f"{name}.gz").write_bytes(gzip.compress((raw / name).read_bytes()))
    files = [raw / f"{name}.gz" for name in IDX_FILES]
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(MNIST, "resources", [(path.name, hashlib.md5(path.read_bytes()).hexdigest()) for path in files])
    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])  # nobody listens there
    source = open_source("auto")
    assert (source.name, source.notice[:18]) == ("sample", "NOT the full MNIST")
    assert "Connection refused" in source.notice
    with pytest.raises(RequestError, match="cannot be downloaded"):
        open_source("mnist")
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
        check(open_source("mnist"), sample[::10], 360, 40, 100)
        server.shutdown()
    assert socket.getdefaulttimeout() is None
