"""Where images come from: full MNIST, an IDX folder, Parquet files, or the bundled sample; which rows are held out.

A source is a list of parts in the order of their row ids. Small sources are read here, whole; Parquet files stay where
they are and are described by their footers, for Ray Data to read. Nothing of Ray.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from mnistsum_ray.data import idx
from mnistsum_ray.data.decoding import Pixels, decode_images, one_chunk
from mnistsum_ray.data.parquet_parts import (
    BLOCK_ROWS,
    ParquetPart,
    check_digits,
    file_location,
    image_table,
    list_parquet_files,
    parts_of_file,
    split_of_path,
)
from mnistsum_ray.data.sampling import RowIds, held_out
from mnistsum_ray.errors import RequestError, one_line
from mnistsum_ray.storage.location import Location, locate

SAMPLE: Final = Path(__file__).parent / "sample" / "mnist_5k.parquet"


@dataclass(frozen=True)
class Source:
    """Images with digits, numbered by row id in the order of `parts`, and the ids of each split: disjoint, together all."""

    name: str
    location: str
    parts: tuple[pa.Table | ParquetPart, ...]
    train: RowIds
    validation: RowIds
    test: RowIds
    notice: str = ""
    """What a person must be told about the choice of source."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Path and reason of files in the folder that are not taken."""

    @property
    def rows(self) -> int:
        """Of all splits together."""
        return len(self.train) + len(self.validation) + len(self.test)


def open_source(data: str) -> Source:
    """Find what `--data` names.

    Raises:
        RequestError: it is not there, cannot be read, or is not images with digits; one line that names the file.
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
        if isinstance(place.filesystem, pafs.LocalFileSystem) and info.type == pafs.FileType.Directory:
            folder = idx.find(Path(place.path))
            if folder:
                return _idx(folder)
        return _parquet(place.with_retries(), info)
    except OSError as error:
        raise RequestError(f"--data {place.display}: {one_line(error)}") from None


def _sample() -> Source:
    table = pq.read_table(SAMPLE)
    images, bad = decode_images(one_chunk(table["image"]))
    assert not bad
    digits = one_chunk(table["digit"]).to_numpy().astype(np.int8)
    return _in_memory("sample", str(SAMPLE), images, digits, test_rows=None)


def _full_mnist(*, fall_back: bool) -> Source:
    cache = Path.home() / ".cache" / "mnistsum_ray"
    for root in (Path("data"), cache):
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
    check_digits(pa.array(digits), str(folder), 0)
    return _in_memory("mnist", str(folder), images, digits.astype(np.int8), test_rows=test_rows)


def _parquet(place: Location, info: pafs.FileInfo) -> Source:
    skipped: dict[str, str] = {}
    files = [info] if info.type == pafs.FileType.File else list_parquet_files(place, skipped)
    parts: list[ParquetPart] = []
    counts: dict[str, list[tuple[int, int]]] = {}
    total = 0
    for file in files:
        of_file = parts_of_file(file_location(place, file.path), file.size)
        rows = sum(part.rows for part in of_file)
        counts.setdefault(split_of_path(file.path, place.path), []).append((total, total + rows))
        parts += of_file
        total += rows
    ids = {split: np.concatenate([np.arange(*span) for span in spans]) for split, spans in counts.items()}
    if "" in ids and len(ids) > 1:
        raise RequestError(
            f"--data {place.display}: some files are named train or test and some are not, so the test rows are unclear"
        )
    source = _with_splits(
        "parquet", place.display, tuple(parts), ids.get("train", ids.get("")), ids.get("validation"), ids.get("test")
    )
    return replace(source, skipped=skipped)


def _in_memory(name: str, location: str, images: Pixels, digits: np.ndarray, *, test_rows: int | None) -> Source:
    """A source that is held in memory; its last `test_rows` rows are the test rows (None: hold some out)."""
    parts = tuple(
        image_table(images[start : start + BLOCK_ROWS], digits[start : start + BLOCK_ROWS])
        for start in range(0, len(images), BLOCK_ROWS)
    )
    ids = np.arange(len(images))
    if test_rows is None:
        return _with_splits(name, location, parts, ids, None, None)
    return _with_splits(name, location, parts, ids[: len(ids) - test_rows], None, ids[len(ids) - test_rows :])


def _with_splits(
    name: str,
    location: str,
    parts: tuple[pa.Table | ParquetPart, ...],
    train: RowIds | None,
    validation: RowIds | None,
    test: RowIds | None,
) -> Source:
    """Hold out of the training rows what the source does not itself set apart: a tenth, at most 5,000 rows each."""
    if train is None or len(train) < 10:
        raise RequestError(f"--data {location}: has {0 if train is None else len(train)} training rows; at least 10 are needed")
    portion = min(5000, len(train) // 10)
    if test is None:
        train, test = held_out(train, portion)
    if validation is None:
        train, validation = held_out(train, portion)
    if not len(validation) or not len(test):
        raise RequestError(f"--data {location}: its validation or test files have no rows")
    return Source(name, location, parts, train, validation, test)
