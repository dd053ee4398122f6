"""Every source gives whole rows and disjoint splits; what cannot be used is refused by name."""

import gzip
import hashlib
import os
import re
import shutil
import socket
import struct
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mnistsum_ray.data.idx import IDX_FILES
from werkzeug import Response
from werkzeug.middleware.shared_data import SharedDataMiddleware

from mnistsum_ray.data.images import Pixels, one_chunk, pixels_view
from mnistsum_ray.data.parquet import to_parquet
from mnistsum_ray.data.sources import Block, Source, open_source
from mnistsum_ray.errors import RequestError, StorageError
from mnistsum_ray.storage.uri import locate
from tests.storage.conftest import serve_s3, serving


def blocks_of(source: Source) -> list[Block]:
    return [block for group in source.groups for block in group.blocks()]


def splits_of(source: Source) -> list[list[int]]:
    return [split.tolist() for split in (source.train, source.validation, source.test)]


def check(source: Source, rows: pa.Table, *splits: int) -> None:
    """The blocks hold these rows, image and digit, in order; the splits have so many of them."""
    blocks = blocks_of(source)
    images = np.concatenate([block.images for block in blocks])
    assert np.array_equal(images, pixels_view(one_chunk(rows["image"])))
    assert np.concatenate([block.digits for block in blocks]).tolist() == rows[1].to_pylist()
    found = splits_of(source)
    assert [*map(len, found)] == [*splits]
    assert found == [sorted(split) for split in found]
    assert sorted(np.concatenate(found).tolist()) == list(range(rows.num_rows))


def write_idx(path: Path, values: Pixels) -> None:
    header = bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape)
    path.write_bytes(header + values.tobytes())


@pytest.fixture
def idx(tmp_path: Path, sample: pa.Table) -> Path:
    """An IDX folder in torchvision's layout: 400 training and 100 test rows."""
    images = pixels_view(sample["image"].chunk(0))[::10]
    digits = sample["digit"].to_numpy()[::10].astype(np.uint8)
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    contents = (images[:400], digits[:400], images[400:], digits[400:])
    for name, values in zip(chain(*IDX_FILES), contents, strict=True):
        write_idx(folder / name, values)
    return tmp_path


def test_sample_and_idx_files(idx: Path, sample: pa.Table, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` and `mnist` take ./data/MNIST/raw, here a small stand-in in the same layout."""
    source = open_source("sample")
    check(source, sample, 4000, 500, 500)
    assert source.validation[:4].tolist() == [5, 16, 21, 37]
    assert source.test[:4].tolist() == [0, 8, 29, 33]
    (idx / "data").symlink_to(idx)
    monkeypatch.chdir(idx)
    for name in (str(idx), "MNIST", "MNIST/raw", "auto", "mnist"):
        source = open_source(name)
        check(source, sample[::10], 360, 40, 100)
        assert source.test.tolist() == list(range(400, 500)), "those of the test files"
        assert (source.name, source.notice) == ("mnist", "")


IMAGES, LABELS = IDX_FILES[0][0], IDX_FILES[1][1]
DAMAGES: list[tuple[str, Callable[[Path], object], str]] = [
    (IMAGES, lambda path: os.truncate(path, 5000), "n x 28 x 28, or is damaged"),
    (LABELS, Path.unlink, ": cannot be read: No such file"),
    (LABELS, lambda path: path.write_bytes(b"hello there"), "is not an IDX file of unsigned"),
    (LABELS, lambda path: write_idx(path, np.zeros(9, np.uint8)), "has 9 labels, and t10k-images"),
]


@pytest.mark.parametrize(("name", "damage", "said"), DAMAGES)
def test_a_damaged_idx_folder_is_refused(idx: Path, name: str, damage: Any, said: str) -> None:
    damage(idx / "MNIST" / "raw" / name)
    with pytest.raises(RequestError, match=rf"^{idx}.*{re.escape(said)}"):
        open_source(str(idx))


REFUSED: list[tuple[dict[str, Callable[[pa.Table], pa.Table] | bytes], str]] = [
    ({}, "holds neither IDX files"),
    ({"a": b"cut off"}, "a.parquet: is not Parquet, or was cut off"),
    ({"a": lambda rows: rows.drop_columns(["digit"])}, "a column 'digit' or 'label', has image"),
    ({"a": lambda rows: pa.table({"image": rows[1], "digit": rows[1]})}, "'image' has type int8"),
    ({"a": lambda rows: rows[:5]}, "has 5 training, 0 validation and 0 test rows; each split"),
    ({"a": lambda rows: rows, "test": lambda rows: rows}, "some files are named train or test"),
    ({"train": lambda rows: rows, "test": lambda rows: rows[:0]}, "validation and 0 test rows;"),
]


@pytest.mark.parametrize(("files", "said"), REFUSED)
def test_a_folder_that_will_not_do_is_refused_by_its_footers(
    tmp_path: Path, sample: pa.Table, files: dict[str, Any], said: str
) -> None:
    for name, change in files.items():
        path = tmp_path / f"{name}.parquet"
        if isinstance(change, bytes):
            path.write_bytes(change)
        else:
            pq.write_table(change(sample[::50]), path)
    with pytest.raises(RequestError, match=re.escape(said)):
        open_source(str(tmp_path))


SPLITS = [
    ("train-00000-of-00001.parquet", "validation-0.parquet", "test-0.parquet"),
    ("training/a.parquet", "val/a.parquet", "testing/a.parquet"),
    ("mnist_Train.parquet", "VALID.pq", "TEST/a.PARQ"),
]


@pytest.mark.parametrize("names", SPLITS)
def test_names_of_files_and_folders_tell_the_split(
    tmp_path: Path, sample: pa.Table, names: Sequence[str]
) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(sample[::50].rename_columns({"digit": "label"}), tmp_path / name)
    starts = [100 * sorted(names).index(name) for name in names]
    expected = [[*range(start, start + 100)] for start in starts]
    assert splits_of(open_source(str(tmp_path))) == expected


def test_files_in_an_object_store_are_read(
    sample: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve_s3(monkeypatch) as uri:
        for name in ("train", "test"):
            (locate(uri, "--data") / "data" / f"{name}.parquet").write(to_parquet(sample[::50]))
        source = open_source(uri.replace("?", "/data?"))
        check(source, pa.concat_tables([sample[::50]] * 2), 90, 10, 100)


LAYOUTS = [
    ([8191, 8193, 16_385], 100_000, [8191, 8192, 1, 8192, 8192, 1]),
    ([*range(0, 300, 7), 0, 8192, 1, 8191, 8193], 777, [6321, 8192, 8192, 8192, 1]),
]


@pytest.mark.parametrize(("sizes", "group", "blocks"), LAYOUTS)
def test_a_block_has_8192_rows_of_a_file_or_those_of_many_small_files(
    tmp_path: Path, sample: pa.Table, sizes: list[int], group: int, blocks: list[int]
) -> None:
    rows = sample.take(np.random.default_rng(0).integers(0, 5000, sum(sizes)))
    for index, end in enumerate(np.cumsum(sizes)):
        some = rows.slice(end - sizes[index], sizes[index])
        pq.write_table(some, tmp_path / f"{index:03}.parquet", row_group_size=group)
    source = open_source(str(tmp_path))
    held_out = min(5000, len(rows) // 10)
    check(source, rows, len(rows) - 2 * held_out, held_out, held_out)
    assert [block.rows for block in blocks_of(source)] == blocks
    for split in (source.validation, source.test):
        digits = rows["digit"].to_numpy()[split]
        assert np.bincount(digits, minlength=10).min() > held_out / 20, "all digits"


def test_a_bad_label_of_an_idx_folder_is_named_and_some_rows_must_be_left(idx: Path) -> None:
    write_idx(idx / "MNIST" / "raw" / LABELS, np.arange(100, dtype=np.uint8) // 9)
    source = open_source(str(idx))
    (block,) = blocks_of(source)
    places = {row: place[:2] for row, place in block.bad.items()}
    assert places == {row: (LABELS, row - 400) for row in range(490, 500)}
    assert splits_of(source.without(block.bad))[2] == [*range(400, 490)]
    bad = {row: ("a", row, "bad") for row in source.test.tolist()}
    left = "360 training, 40 validation and 0 test rows beside 100 bad ones: a: row 400: bad"
    with pytest.raises(RequestError, match=left):
        source.without(bad)


def test_a_file_that_has_changed_or_is_gone_is_named(tmp_path: Path, sample: pa.Table) -> None:
    """Also one that another takes the place of, of the same size and time."""
    path, copy = tmp_path / "1.parquet", tmp_path / "copy"
    pq.write_table(sample[::50], path)
    source = open_source(str(tmp_path))
    shutil.copy2(path, copy)
    copy.rename(path)
    with pytest.raises(RequestError, match=r"1\.parquet: has changed since the run began"):
        blocks_of(source)
    path.unlink()
    with pytest.raises(StorageError, match=r"1\.parquet: is not there"):
        blocks_of(source)


def test_mnist_is_downloaded_and_without_a_network_auto_takes_the_sample_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, idx: Path, sample: pa.Table
) -> None:
    from torchvision.datasets import MNIST

    (tmp_path / "work").mkdir()
    served, resources = tmp_path / "work", []
    for name in chain(*IDX_FILES):
        data = gzip.compress((idx / "MNIST" / "raw" / name).read_bytes())
        (served / f"{name}.gz").write_bytes(data)
        resources.append((f"{name}.gz", hashlib.md5(data).hexdigest()))
    monkeypatch.chdir(served)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(MNIST, "resources", resources)
    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])  # nobody listens there
    source = open_source("auto")
    assert (source.name, source.notice[:18]) == ("sample", "NOT the full MNIST")
    with pytest.raises(RequestError, match=r"cannot be downloaded \(.*Connection refused"):
        open_source("mnist")
    assert not list((tmp_path / "home" / ".cache" / "mnistsum_ray").iterdir())
    with serving(SharedDataMiddleware(Response(status=404), {"/": str(served)})) as port:
        monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{port}/"])
        check(open_source("mnist"), sample[::10], 360, 40, 100)
    assert socket.getdefaulttimeout() is None
