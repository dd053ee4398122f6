"""Data sources: full MNIST, an IDX folder, Parquet files or the bundled sample, and the rows of each split.

IDX files and the sample are read whole. Parquet files are only described by their footers.
"""

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from mnistsum_ray.data import idx
from mnistsum_ray.data.images import Pixels, check_digits, decode_images, one_chunk
from mnistsum_ray.data.order import RowIds, RowRanges
from mnistsum_ray.data.parquet_source import ParquetFiles, read_parquet_source
from mnistsum_ray.errors import RequestError, RunError, StorageError, one_line
from mnistsum_ray.storage.listing import special_file_error
from mnistsum_ray.storage.location import Location
from mnistsum_ray.storage.paths import locate

SAMPLE: Final = Path(__file__).parent / "sample" / "mnist_5k.parquet"

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
            folder = idx.find(Path(place.path))
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
        folder = idx.find(root)
        if folder:
            return _idx(folder)
    try:
        idx.download(cache)
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
    folder = idx.find(cache)
    if folder is None:
        raise RequestError(f"--data mnist: the download left no MNIST in {cache}")
    return _idx(folder)


def _idx(folder: Path) -> Source:
    images, digits, test_rows = idx.read(folder)
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
