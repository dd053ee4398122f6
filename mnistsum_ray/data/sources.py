"""Data sources: full MNIST, an IDX folder, Parquet files or the bundled sample, and the rows of each split.

IDX files, MNIST's own, and the sample are read whole. Parquet files are only described by their footers.
"""

import gzip
import hashlib
import http.client
import struct
import tempfile
import urllib.request
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from mnistsum_ray.data.images import SIDE, Pixels, check_digits, decode_images, one_chunk
from mnistsum_ray.data.order import RowIds, RowRanges
from mnistsum_ray.data.parquet_source import ParquetFiles, read_parquet_source
from mnistsum_ray.errors import RequestError, RunError, StorageError, one_line
from mnistsum_ray.storage.listing import special_file_error
from mnistsum_ray.storage.location import Location
from mnistsum_ray.storage.paths import locate

SAMPLE: Final = Path(__file__).parent / "sample" / "mnist_5k.parquet"

_IDX_FILES: Final = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)

_DOWNLOAD_TIMEOUT_SECONDS: Final = 3
"""For the connection and for each read, so it does not limit the download as a whole."""

_MIN_TRAIN_ROWS: Final = 10
_MAX_HELD_OUT_ROWS: Final = 5000


@dataclass(frozen=True)
class ImageArrays:
    """Images with digits in memory; row id i is index i."""

    images: Pixels
    digits: npt.NDArray[np.int8]

    def fetch(self, ids: RowIds) -> tuple[Pixels, npt.NDArray[np.int8]]:
        """Rows int64[n] in any order as uint8[n, 28, 28] and int8[n]."""
        return self.images[ids], self.digits[ids]


@dataclass(frozen=True)
class Source:
    """Images with digits. Row ids count from 0 in the order of the images or files; each is in exactly one split."""

    name: str
    """sample, mnist or parquet."""
    location: str
    data: ImageArrays | ParquetFiles
    """Its method `fetch` reads rows."""
    train: RowRanges
    validation: RowRanges
    test: RowRanges
    notice: str = ""
    """Message for the console about the choice of source; empty where there is none."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Path -> reason of each file in the folder that is not used."""

    @property
    def files(self) -> ParquetFiles | None:
        """None for a source in memory."""
        return self.data if isinstance(self.data, ParquetFiles) else None

    @property
    def rows(self) -> int:
        """Rows of all splits together."""
        return sum(map(len, self.splits))

    @property
    def splits(self) -> tuple[RowRanges, RowRanges, RowRanges]:
        """Training, validation and test rows."""
        return self.train, self.validation, self.test

    def content_sha256(self, checksums: npt.NDArray[np.int64]) -> str:
        """SHA-256 of the data: over the checksums of each file's rows, int64[files], and over the rows of the splits."""
        digest = hashlib.sha256(checksums.tobytes())
        for split in self.splits:
            digest.update(f"{len(split)} rows".encode() + split.starts.tobytes() + split.ends.tobytes())
        return digest.hexdigest()


def open_source(data: str) -> Source:
    """Open the data source that `--data` names.

    Raises:
        RequestError: it is missing, cannot be used, or has no images with digits; one line that names the file.
        RunError: the storage does not give a file.
    """
    if data == "sample":
        return _sample()
    if data in ("auto", "mnist"):
        return _full_mnist(fall_back=data == "auto")
    place = locate(data, "--data")
    try:
        info = place.info()
        if info.type == pafs.FileType.NotFound:
            raise RequestError(f"--data {place.display}: there is no such file or folder")
        if place.is_local and info.type == pafs.FileType.Directory:
            folder = _find_idx(Path(place.path))
            if folder:
                return _idx(folder)
        special = special_file_error(place)
        if special:
            raise RequestError(f"--data {place.display}: {special}")
        return _parquet(place.with_retries(), info)
    except StorageError as error:
        raise RunError(f"--data {error}; nothing was begun") from None
    except OSError as error:
        raise RequestError(f"--data {place.display}: {one_line(error)}") from None


def _sample() -> Source:
    table = pq.read_table(SAMPLE)
    images, bad = decode_images(one_chunk(table["image"]))
    assert not bad
    digits = one_chunk(table["digit"]).to_numpy().astype(np.int8)
    return _with_splits("sample", str(SAMPLE), ImageArrays(images, digits), {"": RowRanges.of([0], [len(images)])})


def _full_mnist(*, fall_back: bool) -> Source:
    """MNIST from ./data, from the cache in the home folder, or downloaded into it; with `fall_back` else the sample."""
    cache = Path.home() / ".cache" / "mnistsum_ray"
    for root in (Path("data").resolve(), cache):
        folder = _find_idx(root)
        if folder:
            return _idx(folder)
    try:
        _download_mnist(cache)
    except (OSError, RuntimeError) as error:
        reason = one_line(error) or type(error).__name__
        if not fall_back:
            raise RequestError(
                f"--data mnist: not in ./data or {cache}, and it cannot be downloaded ({reason}); "
                "name its folder, or take --data sample"
            ) from None
        sample = _sample()
        notice = (
            f"NOT the full MNIST: it is not in ./data or {cache}, and it cannot be downloaded ({reason}). "
            f"Going on with the bundled sample of {sample.rows:,} images; --data FOLDER names a copy of the full set."
        )
        return replace(sample, notice=notice)
    folder = _find_idx(cache)
    if folder is None:
        raise RequestError(f"--data mnist: the download left no MNIST in {cache}")
    return _idx(folder)


def _idx(folder: Path) -> Source:
    images, digits, test_rows = _read_idx(folder)
    arrays = ImageArrays(images, check_digits(pa.array(digits), str(folder), range(len(digits))))
    end = len(images) - test_rows
    return _with_splits(
        "mnist", str(folder), arrays, {"train": RowRanges.of([0], [end]), "test": RowRanges.of([end], [len(images)])}
    )


def _parquet(place: Location, info: pafs.FileInfo) -> Source:
    files, rows, skipped = read_parquet_source(place, info)
    return replace(_with_splits("parquet", place.display, files, rows), skipped=skipped)


def _with_splits(name: str, location: str, data: ImageArrays | ParquetFiles, rows: dict[str, RowRanges]) -> Source:
    """A source whose rows belong to these splits, "" for rows of which no name says a split.

    A missing split is held out of the training rows: a tenth of them, and at most 5,000 rows.
    """
    train, validation, test = rows.get("train", rows.get("")), rows.get("validation"), rows.get("test")
    if train is None or len(train) < _MIN_TRAIN_ROWS:
        count = 0 if train is None else len(train)
        raise RequestError(f"--data {location}: has {count} training rows; at least {_MIN_TRAIN_ROWS} are needed")
    count = min(_MAX_HELD_OUT_ROWS, len(train) // 10)
    bounds = data.group_bounds if isinstance(data, ParquetFiles) else np.array([0, len(data.images)])
    if test is None:
        train, test = train.hold_out(count, bounds)
    if validation is None:
        train, validation = train.hold_out(count, bounds)
    if not len(validation) or not len(test):
        raise RequestError(f"--data {location}: its validation or test files have no rows")
    return Source(name, location, data, train, validation, test)


def _find_idx(root: Path) -> Path | None:
    """The folder with IDX files: `root`/MNIST/raw or `root`/raw, as in torchvision, or `root`; None where there is none."""
    for folder in (root / "MNIST" / "raw", root / "raw", root):
        if any((folder / (name + suffix)).exists() for name in _IDX_FILES for suffix in ("", ".gz")):
            return folder
    return None


def _read_idx(folder: Path) -> tuple[Pixels, npt.NDArray[np.uint8], int]:
    """Read the training files and then the test files of a folder.

    Returns:
        Images uint8[n, 28, 28], labels uint8[n], and the number of test rows, which are the last.

    Raises:
        RequestError: a file is missing, is not IDX, or does not match the others; names the file.
    """
    train_images, train_digits, test_images, test_digits = (_read_idx_file(folder, name) for name in _IDX_FILES)
    for name, images, digits in (
        (_IDX_FILES[0], train_images, train_digits),
        (_IDX_FILES[2], test_images, test_digits),
    ):
        if images.shape[1:] != (SIDE, SIDE):
            raise RequestError(f"{folder / name}: images are {images.shape[1]} x {images.shape[2]} pixels, not 28 x 28")
        if len(images) != len(digits):
            raise RequestError(f"{folder / name}: has {len(images):,} images, but its label file has {len(digits):,} labels")
    return np.concatenate([train_images, test_images]), np.concatenate([train_digits, test_digits]), len(test_images)


def _read_idx_file(folder: Path, name: str) -> Pixels:
    """Read one IDX file of unsigned bytes, gzip-compressed or not: uint8[n, 28, 28] or uint8[n].

    Format: https://yann.lecun.com/exdb/mnist/
    """
    path = folder / name
    if not path.exists():
        path = folder / (name + ".gz")
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except FileNotFoundError:
        raise RequestError(f"{folder}: {name} is missing, gzipped or not") from None
    except (OSError, EOFError, zlib.error) as error:
        raise RequestError(f"{path}: cannot be read: {error}") from None
    dimensions = 3 if "idx3" in name else 1
    header = 4 + 4 * dimensions
    if len(data) < header or data[:4] != bytes((0, 0, 8, dimensions)):
        raise RequestError(f"{path}: is not an IDX file of unsigned bytes with {dimensions} dimension(s)")
    shape = struct.unpack(f">{dimensions}I", data[4:header])
    expected = int(np.prod(shape, dtype=np.int64))
    if len(data) - header != expected:
        raise RequestError(f"{path}: holds {len(data) - header:,} bytes of data where its header says {expected:,}")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def _download_mnist(root: Path) -> None:
    """Download MNIST to `root`/MNIST/raw from the mirrors that torchvision lists, and check torchvision's MD5 sums.

    The folder appears only when it is complete, so an interrupted download is repeated the next time. Without a network this
    fails within seconds.

    Raises:
        OSError: no mirror has all files, or they cannot be written.
    """
    from torchvision.datasets import MNIST  # takes seconds to import, and most runs do not download

    errors = []
    for mirror in MNIST.mirrors:
        try:
            files = {name.removesuffix(".gz"): _download_file(f"{mirror}{name}", md5) for name, md5 in MNIST.resources}
            break
        except (OSError, EOFError, zlib.error, http.client.HTTPException) as error:
            errors.append(f"{mirror}: {one_line(error)}")
    else:
        raise OSError("; ".join(errors))
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root) as temporary:
        raw = Path(temporary, "MNIST", "raw")
        raw.mkdir(parents=True)
        for name, data in files.items():
            (raw / name).write_bytes(data)
        try:
            raw.parent.rename(root / "MNIST")
        except OSError:
            if _find_idx(root) is None:  # otherwise another run was faster
                raise


def _download_file(url: str, md5: str) -> bytes:
    # urlopen's own timeout: socket.setdefaulttimeout would also change the sockets of the caller's other threads.
    with urllib.request.urlopen(url, timeout=_DOWNLOAD_TIMEOUT_SECONDS) as response:
        data: bytes = response.read()
    if hashlib.md5(data, usedforsecurity=False).hexdigest() != md5:
        raise OSError(f"{url} does not have the MD5 sum {md5}")
    return gzip.decompress(data)
