"""Every source gives fixed, disjoint splits; what cannot be used is refused with the file's name."""

import functools
import gzip
import hashlib
import http.server
import io
import shutil
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mnistsum_ray.data.images import Pixels, pixels_array, pixels_view
from mnistsum_ray.data.sources import Source, open_source
from mnistsum_ray.errors import RequestError

Rows = Callable[[int], Path]


def write_idx(folder: Path, name: str, values: Pixels, *, zipped: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    data = bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()
    if zipped:
        (folder / f"{name}.gz").write_bytes(gzip.compress(data))
    else:
        (folder / name).write_bytes(data)


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


def table(source: Source) -> pa.Table:
    images, digits = source.data.fetch(np.arange(source.rows))
    return pa.table({"image": pixels_array(images), "digit": digits})


def check_splits(source: Source, train: int, validation: int, test: int) -> None:
    assert (len(source.train), len(source.validation), len(source.test)) == (train, validation, test)
    together = np.concatenate([split.ids() for split in source.splits])
    assert np.array_equal(np.sort(together), np.arange(train + validation + test))
    assert table(source).num_rows == len(together)


def test_sample() -> None:
    source = open_source("sample")
    check_splits(source, 4000, 500, 500)
    assert np.bincount(table(source)["digit"].to_numpy()).tolist() == [500] * 10
    assert np.array_equal(source.test.ids(), open_source("sample").test.ids())


@pytest.mark.parametrize("below", ["", "MNIST", "MNIST/raw"])
def test_idx_folder_gzipped_or_not(idx: Path, below: str, sample: pa.Table) -> None:
    source = open_source(str(idx / below))
    check_splits(source, 360, 40, 100)
    assert source.test.ids().tolist() == list(range(400, 500)), "the test files' rows are the test rows, whole"
    assert table(source)["image"].to_pylist() == sample["image"].to_pylist()[::10]


def test_hugging_face_layout(tmp_path: Path, sample: pa.Table) -> None:
    def png(pixels: Pixels) -> dict[str, bytes | None]:
        data = io.BytesIO()
        Image.fromarray(pixels).save(data, "PNG")
        return {"bytes": data.getvalue(), "path": None}

    images = pixels_view(sample["image"].chunk(0))[::10]
    digits = sample["digit"].to_pylist()[::10]
    for name, rows in (("train-00000-of-00001", slice(0, 400)), ("test-00000-of-00001", slice(400, 500))):
        columns = {"image": [png(image) for image in images[rows]], "label": digits[rows]}
        (tmp_path / "mnist").mkdir(exist_ok=True)
        pq.write_table(pa.table(columns), tmp_path / "mnist" / f"{name}.parquet")
    source = open_source(str(tmp_path))
    check_splits(source, 360, 40, 100)
    assert source.test.ids().tolist() == list(range(100)), "row ids follow the file names, and test sorts before train"
    assert sorted(table(source)["image"].to_pylist()) == sorted(sample["image"].to_pylist()[::10])


def damage_idx(folder: Path) -> str:
    path = folder / "MNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    return str(path)


def remove_idx(folder: Path) -> str:
    (folder / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").unlink()
    return "t10k-labels-idx1-ubyte is missing"


def wrong_magic(folder: Path) -> str:
    path = folder / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    path.write_bytes(b"hello there")
    return "is not an IDX file"


def wrong_digit(folder: Path) -> str:
    write_idx(folder / "MNIST" / "raw", "t10k-labels-idx1-ubyte", np.full(100, 12, np.uint8))
    return "the digit is 12, not one of 0..9"


def fewer_labels(folder: Path) -> str:
    write_idx(folder / "MNIST" / "raw", "t10k-labels-idx1-ubyte", np.zeros(99, np.uint8))
    return "has 100 images, but its label file has 99 labels"


def damaged_gzip(folder: Path) -> str:
    path = folder / "MNIST" / "raw" / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    return str(path)


@pytest.mark.parametrize("damage", [damage_idx, remove_idx, wrong_magic, wrong_digit, fewer_labels, damaged_gzip])
def test_a_damaged_idx_folder_is_refused(idx: Path, damage: Callable[[Path], str]) -> None:
    said = damage(idx)
    with pytest.raises(RequestError) as refused:
        open_source(str(idx))
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def no_label(path: Path, rows: pa.Table) -> str:
    pq.write_table(rows.drop_columns(["digit"]), path)
    return "needs a column 'image' and a column 'digit' or 'label', has image"


def text_images(path: Path, rows: pa.Table) -> str:
    pq.write_table(pa.table({"image": ["a"] * 20, "digit": [1] * 20}), path)
    return "column 'image' has type string"


def truncated(path: Path, rows: pa.Table) -> str:
    pq.write_table(rows, path)
    path.write_bytes(path.read_bytes()[:-10])
    return "is not Parquet, or was cut off"


def zero_bytes(path: Path, rows: pa.Table) -> str:
    path.write_bytes(b"")
    return "is empty (0 bytes); write it again"


def too_few(path: Path, rows: pa.Table) -> str:
    pq.write_table(rows[:5], path)
    return "has 5 training rows"


@pytest.mark.parametrize("write", [no_label, text_images, truncated, zero_bytes, too_few])
def test_a_parquet_file_that_will_not_do_is_refused_by_its_footer(
    tmp_path: Path, sample: pa.Table, write: Callable[[Path, pa.Table], str]
) -> None:
    path = tmp_path / "rows.parquet"
    said = write(path, sample[::50])
    with pytest.raises(RequestError) as refused:
        open_source(str(tmp_path))
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_nothing_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="there is no such file or folder"):
        open_source(str(tmp_path / "nowhere"))
    with pytest.raises(RequestError, match="holds neither IDX files"):
        open_source(str(tmp_path))


@pytest.mark.parametrize(
    "names",
    [
        ("train-0.parquet", "validation-0.parquet", "test-0.parquet"),
        ("train/a.parquet", "val/a.parquet", "test/a.parquet"),
        ("mnist_Train.parquet", "VALID.pq", "TEST/a.PARQ"),
        ("training/part-0.parquet", "validation/part-0.parquet", "testing/part-0.parquet"),
    ],
)
def test_files_and_folders_named_for_a_split_are_that_split_in_any_case(
    write_rows: Rows, tmp_path: Path, names: tuple[str, ...]
) -> None:
    path = write_rows(100)
    for name in names:
        (tmp_path / "named" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / "named" / name)
    source = open_source(str(tmp_path / "named"))
    at = {name: range(100 * place, 100 * place + 100) for place, name in enumerate(sorted(names))}
    assert [split.ids().tolist() for split in source.splits] == [list(at[name]) for name in names]


def test_half_named_splits_are_refused(write_rows: Rows) -> None:
    path = write_rows(100)
    shutil.copy(path, path.with_name("test.parquet"))
    with pytest.raises(RequestError, match="some files are named train or test and some are not"):
        open_source(str(path.parent))


def test_full_mnist_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, idx: Path) -> None:
    """`auto` and `mnist` take ./data/MNIST/raw; here a small stand-in in the same layout, written above."""
    (tmp_path / "work").mkdir()
    shutil.copytree(idx / "MNIST", tmp_path / "work" / "data" / "MNIST")
    monkeypatch.chdir(tmp_path / "work")
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


@contextmanager
def mirror(folder: Path) -> Iterator[str]:
    """URL of a web server on this machine that serves the files of a folder."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_a_download_that_is_cut_off_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, idx: Path) -> None:
    """A mirror that has one of the four files."""
    from torchvision.datasets import MNIST

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with mirror(idx / "MNIST" / "raw") as url:
        monkeypatch.setattr(MNIST, "mirrors", [url])
        with pytest.raises(RequestError, match=rf"cannot be downloaded \({url}: HTTP Error 404"):
            open_source("mnist")
    assert not [path for path in (tmp_path / "home").rglob("*") if path.is_file()]


def test_a_mirror_whose_files_are_damaged_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, idx: Path) -> None:
    """The next one is taken; files appear under the names that torchvision uses, and this process keeps its socket timeout."""
    from torchvision.datasets import MNIST

    (tmp_path / "good").mkdir()
    for path in (idx / "MNIST" / "raw").iterdir():
        data = path.read_bytes()
        name = path.name.removesuffix(".gz")
        (tmp_path / "good" / f"{name}.gz").write_bytes(data if path.suffix == ".gz" else gzip.compress(data))
    shutil.copytree(tmp_path / "good", tmp_path / "damaged")
    (tmp_path / "damaged" / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"other"))
    sums = [(path.name, hashlib.md5(path.read_bytes()).hexdigest()) for path in (tmp_path / "good").iterdir()]
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(MNIST, "resources", sums)
    timeout = socket.getdefaulttimeout()
    with mirror(tmp_path / "damaged") as damaged, mirror(tmp_path / "good") as good:
        monkeypatch.setattr(MNIST, "mirrors", [damaged, good])
        check_splits(open_source("mnist"), 360, 40, 100)
    assert socket.getdefaulttimeout() == timeout
    cache = tmp_path / "home" / ".cache" / "mnistsum_ray"
    names = ["t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte", "train-images-idx3-ubyte", "train-labels-idx1-ubyte"]
    assert sorted(path.relative_to(cache).as_posix() for path in cache.rglob("*") if path.is_file()) == [
        f"MNIST/raw/{name}" for name in names
    ]


def test_a_word_that_only_holds_a_splits_name_says_nothing(write_rows: Rows, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write_rows(500).rename(folder / "latest-contest.parquet")
    check_splits(open_source(str(folder)), 400, 50, 50)


def test_a_link_to_a_parent_does_not_multiply_the_rows(write_rows: Rows, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write_rows(500).rename(folder / "rows.parquet")
    (folder / "up").symlink_to(folder)
    (folder / "again.parquet").symlink_to(folder / "rows.parquet")
    source = open_source(str(folder))
    assert source.rows == 500
    assert source.skipped == {
        str(folder / "up"): "a link to a folder",
        str(folder / "again.parquet"): "a link to a file that is listed anyway",
    }


def test_what_is_skipped_is_named(write_rows: Rows, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "_old").mkdir(parents=True)
    write_rows(500).rename(folder / "rows.Parquet")
    (folder / "notes.txt").write_text("")
    write_rows(100).rename(folder / "_old" / "rows.parquet")
    source = open_source(str(folder))
    assert source.rows == 500
    assert set(source.skipped) == {str(folder / "notes.txt"), str(folder / "_old")}


@pytest.mark.parametrize("column", ["image", "digit"])
def test_a_column_that_is_there_twice_is_refused(write_rows: Rows, column: str) -> None:
    path = write_rows(100)
    table = pq.read_table(path)
    pq.write_table(pa.Table.from_arrays([*table.columns, table[column]], [*table.column_names, column]), path)
    with pytest.raises(RequestError, match=rf"rows100\.parquet: has more than one column '{column}'"):
        open_source(str(path))


def test_a_page_whose_checksum_is_wrong_is_refused(write_rows: Rows) -> None:
    path = write_rows(100)
    table = pq.read_table(path)
    options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    pq.write_table(table, path, write_page_checksum=True, **options)
    data = bytearray(path.read_bytes())
    data[data.index(table["image"][50].as_py()) + 300] ^= 1
    path.write_bytes(data)
    source = open_source(str(path))
    with pytest.raises(RequestError, match=r"cannot be read: .*CRC checksum verification failed"):
        source.data.fetch(np.arange(100))
