"""Data sources: full MNIST, an IDX folder, Parquet files or the bundled sample, and the rows of each split.

IDX files and the sample are read whole. Parquet files are only described by their footers; training reads them with Ray Data.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from mnistsum_ray.data import idx
from mnistsum_ray.data.decoding import decode_images
from mnistsum_ray.data.parquet_files import ParquetFiles
from mnistsum_ray.data.parquet_source import read_parquet_source
from mnistsum_ray.data.parts import PART_ROWS, ParquetPart, check_digits, image_table
from mnistsum_ray.data.pixels import Pixels, one_chunk
from mnistsum_ray.data.row_ranges import RowRanges
from mnistsum_ray.data.sampling import held_out
from mnistsum_ray.errors import RequestError, RunError, StorageError, one_line
from mnistsum_ray.storage.listing import special_file_error
from mnistsum_ray.storage.location import Location
from mnistsum_ray.storage.paths import locate

SAMPLE: Final = Path(__file__).parent / "sample" / "mnist_5k.parquet"

_MIN_TRAIN_ROWS: Final = 10
_MAX_HELD_OUT_ROWS: Final = 5000

_MAX_SCATTERED_ROWS: Final = 1_000_000
"""Largest number of rows of which single ones are held out."""


@dataclass(frozen=True)
class Source:
    """Images with digits. Row ids count from 0 in the order of the tables or files; each is in exactly one split."""

    name: str
    """sample, mnist or parquet."""
    location: str
    tables: tuple[pa.Table, ...]
    """Images and digits in memory; empty for a Parquet source."""
    files: ParquetFiles | None
    """None for a source in memory."""
    train: RowRanges
    validation: RowRanges
    test: RowRanges
    notice: str = ""
    """Message for the console about the choice of source; empty where there is none."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Path -> reason of each file in the folder that is not used."""

    @property
    def rows(self) -> int:
        """Rows of all splits together."""
        return len(self.train) + len(self.validation) + len(self.test)

    @property
    def splits(self) -> tuple[RowRanges, RowRanges, RowRanges]:
        """Training, validation and test rows."""
        return self.train, self.validation, self.test

    def parts(self) -> Iterator[pa.Table | ParquetPart]:
        """All rows in the order of their ids."""
        return iter(self.tables) if self.files is None else self.files.parts()


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
    return _in_memory("sample", str(SAMPLE), images, digits, test_rows=None)


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
    check_digits(pa.array(digits), str(folder), range(len(digits)))
    return _in_memory("mnist", str(folder), images, digits.astype(np.int8), test_rows=test_rows)


def _parquet(place: Location, info: pafs.FileInfo) -> Source:
    files, rows, skipped = read_parquet_source(place, info)
    return replace(source_of_files(files, rows, place.display), skipped=skipped)


def source_of_files(files: ParquetFiles, rows: dict[str, RowRanges], location: str) -> Source:
    """The source of Parquet files whose rows belong to these splits; "" for rows of which no name says a split.

    Raises:
        RequestError: a split has too few rows.
    """
    train = rows.get("train", rows.get(""))
    return _with_splits("parquet", location, (), files, train, rows.get("validation"), rows.get("test"))


def _in_memory(name: str, location: str, images: Pixels, digits: np.ndarray, *, test_rows: int | None) -> Source:
    """A source whose parts are tables. Its last `test_rows` rows are the test split; None holds some out."""
    tables = tuple(
        image_table(images[start : start + PART_ROWS], digits[start : start + PART_ROWS])
        for start in range(0, len(images), PART_ROWS)
    )
    train_rows = len(images) - (test_rows or 0)
    test = None if test_rows is None else RowRanges.of([train_rows], [len(images)])
    return _with_splits(name, location, tables, None, RowRanges.of([0], [train_rows]), None, test)


def _with_splits(
    name: str,
    location: str,
    tables: tuple[pa.Table, ...],
    files: ParquetFiles | None,
    train: RowRanges | None,
    validation: RowRanges | None,
    test: RowRanges | None,
) -> Source:
    """A source with all splits: a missing one is held out of the training rows, a tenth of them and at most 5,000 rows."""
    if train is None or len(train) < _MIN_TRAIN_ROWS:
        rows = 0 if train is None else len(train)
        raise RequestError(f"--data {location}: has {rows} training rows; at least {_MIN_TRAIN_ROWS} are needed")
    count = min(_MAX_HELD_OUT_ROWS, len(train) // 10)
    if test is None:
        train, test = _hold_out(train, count, files)
    if validation is None:
        train, validation = _hold_out(train, count, files)
    if not len(validation) or not len(test):
        raise RequestError(f"--data {location}: its validation or test files have no rows")
    return Source(name, location, tables, files, train, validation, test)


def _hold_out(rows: RowRanges, count: int, files: ParquetFiles | None) -> tuple[RowRanges, RowRanges]:
    """Split rows into (kept, held out), with `count` rows held out.

    The choice depends on the rows alone, so that runs with different seeds or another `--shuffle-rows` can be compared. Of many
    rows, whole stretches are held out: single ones would lie in as many row groups, all of which would have to be read for them.
    """
    if files is None or len(rows) <= _MAX_SCATTERED_ROWS:
        kept, held = held_out(rows.ids(), count)
        return RowRanges.from_ids(kept), RowRanges.from_ids(held)
    out = files.groups.held_out(rows, count)
    return rows.minus(out), out
