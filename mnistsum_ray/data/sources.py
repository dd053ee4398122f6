"""Data sources: MNIST's IDX files, Parquet files or the bundled sample, and the rows of each split.

IDX files and the sample are read whole; of Parquet files only the footers are.
"""

import hashlib
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mnistsum_ray.data.idx import IDX_FILES, download_mnist, find_idx, read_idx
from mnistsum_ray.data.images import SIDE, Pixels, ReasonCounts, decode_labelled, image_type_error, number_type_error, one_chunk
from mnistsum_ray.data.inputs import list_inputs
from mnistsum_ray.data.order import RowIds, RowRanges
from mnistsum_ray.data.parquet import column_error, open_parquet, plain_table, read_footer, read_rows, read_table
from mnistsum_ray.errors import RequestError, RunError, StorageError, UnusableFileError, counted, one_line
from mnistsum_ray.storage.store import Entry, Location
from mnistsum_ray.storage.uri import locate, locate_existing

SAMPLE: Final = Path(__file__).parent / "sample" / "mnist_5k.parquet"

TRAINING_FILE_SCHEMA: Final = pa.schema(
    {
        "name": pa.string(),  # relative to the folder that was listed
        "size": pa.int64(),  # bytes
        "e_tag": pa.string(),
        "footer_sha256": pa.string(),
        "rows": pa.int64(),
        "group_rows": pa.list_(pa.int64()),  # rows of each row group
        "digit_column": pa.string(),
    }
)
"""One row per file, in the order of the row ids."""

_DIGIT_COLUMNS: Final = ("digit", "label")

_SPLITS: Final = {"train": "train", "training": "train", "test": "test", "testing": "test"} | dict.fromkeys(
    ("validation", "valid", "val"), "validation"
)
"""Words in the names of files and folders, in upper or lower case, that name the split of their rows."""

_MIN_TRAIN_ROWS: Final = 10
_MAX_HELD_OUT_ROWS: Final = 5000

_THREADS: Final = 32
"""Threads that read footers from an object store, which answers slowly but takes many requests at once."""

Digits = npt.NDArray[np.int8]


@dataclass(frozen=True)
class ImageArrays:
    """Images with digits in memory; row id i is index i."""

    images: Pixels
    digits: Digits

    @property
    def group_bounds(self) -> RowIds:
        """All rows are one group."""
        return np.array([0, len(self.images)])

    def fetch(self, ids: RowIds) -> tuple[Pixels, Digits]:
        """Rows int64[n] in any order as uint8[n, 28, 28] and int8[n]."""
        return self.images[ids], self.digits[ids]

    def content(self) -> Iterable[Any]:
        """Pixels and digits, as buffers."""
        return np.ascontiguousarray(self.images), np.ascontiguousarray(self.digits)


@dataclass(frozen=True)
class ParquetFiles:
    """Parquet files with images and digits below one folder."""

    root: Location
    table: pa.Table
    """TRAINING_FILE_SCHEMA."""

    @cached_property
    def group_bounds(self) -> RowIds:
        """int64[n + 1]: of the n row groups that have rows, group i holds the ids bounds[i]..bounds[i + 1]-1."""
        rows = self.table["group_rows"].combine_chunks().flatten().to_numpy().astype(np.int64)
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(rows[rows > 0])])

    @cached_property
    def end_ids(self) -> RowIds:
        """Row id after the last row of each file."""
        return np.cumsum(self.table["rows"].to_numpy())

    def location(self, index: int) -> Location:
        """The file with this index in `table`."""
        name: str = self.table["name"][index].as_py()
        return self.root / name

    def fetch(self, ids: RowIds) -> tuple[Pixels, Digits]:
        """Read and decode rows int64[n], distinct and in any order, as uint8[n, 28, 28] and int8[n].

        Raises:
            RequestError: a file has changed, or rows are not images with digits; counts them, and names the first.
            StorageError: the storage does not give a file.
        """
        images, digits, bad = self.decode(ids)
        if bad:
            raise _bad_rows_error(self.root.display, self.count_bad(bad), len(ids), "; others may follow")
        return images, digits

    def decode(self, ids: RowIds) -> tuple[Pixels, Digits, dict[int, str]]:
        """As `fetch`, with zeros in place of what cannot be used; and row id -> reason of each bad row, ascending."""
        images, digits = np.empty((len(ids), SIDE, SIDE), np.uint8), np.empty(len(ids), np.int8)
        bad: dict[int, str] = {}
        order = np.argsort(ids)
        files, starts = np.unique(np.searchsorted(self.end_ids, ids[order], side="right"), return_index=True)
        for index, places in zip(files.tolist(), np.split(order, starts[1:]), strict=False):
            images[places], digits[places], reasons = self._read(index, ids[places])
            bad |= {int(ids[places[row]]): reason for row, reason in reasons.items()}
        return images, digits, bad

    def _read(self, index: int, ids: RowIds) -> tuple[Pixels, Digits, dict[int, str]]:
        """Rows of one file, in ascending order, as of `decode_labelled`."""
        file = self.location(index)
        known = self.table.slice(index, 1).to_pylist()[0]
        rows = ids - (self.end_ids[index] - known["rows"])
        try:
            with open_parquet(file, Entry(file.path, known["size"], known["e_tag"])) as parquet:
                table = plain_table(pa.Table.from_batches(read_rows(parquet, rows, ["image", known["digit_column"]])))
                return decode_labelled(one_chunk(table["image"]), one_chunk(table[known["digit_column"]]))
        except UnusableFileError as error:
            raise RequestError(f"{file.display}: {error}") from None

    def count_bad(self, bad: dict[int, str]) -> ReasonCounts:
        """Count bad rows, row id -> reason, ascending, with the names of their files."""
        files = np.searchsorted(self.end_ids, [*bad], side="right")
        rows = np.array([*bad], np.int64) - (self.end_ids - self.table["rows"].to_numpy())[files]
        places = zip(self.table["name"].take(pa.array(files)).to_pylist(), rows.tolist(), strict=True)
        return ReasonCounts.of(dict(zip(places, bad.values(), strict=True)))

    def content(self) -> Iterable[Any]:
        """Names, sizes and footers of the files, as bytes: their rows are not read."""
        return (f"{row}\n".encode() for row in self.table.select(["name", "size", "footer_sha256"]).to_pylist())


@dataclass(frozen=True)
class Source:
    """Images with digits. Row ids count from 0 in the order of the images or files; each is in one split."""

    name: str
    """sample, mnist or parquet."""
    location: str
    data: ImageArrays | ParquetFiles
    train: RowRanges
    validation: RowRanges
    test: RowRanges
    notice: str = ""
    """Message for the console about the choice of source."""
    skipped: list[str] = field(default_factory=list)
    """As of `Inputs`."""
    bad: ReasonCounts = field(default_factory=ReasonCounts)
    """Rows that are in no split, since they cannot be used."""

    @property
    def files(self) -> ParquetFiles | None:
        """None for a source in memory."""
        return self.data if isinstance(self.data, ParquetFiles) else None

    @property
    def rows(self) -> int:
        """Rows of the data, bad ones included."""
        return int(self.data.group_bounds[-1])

    @property
    def splits(self) -> tuple[RowRanges, RowRanges, RowRanges]:
        """Training, validation and test rows."""
        return self.train, self.validation, self.test

    def without(self, ids: RowIds, bad: ReasonCounts, *, skip: bool) -> "Source":
        """The source without the bad rows of these ids, int64[n] in ascending order. Other rows stay in their splits.

        Raises:
            RequestError: there are bad rows, and they are not to be skipped; or too few others are left.
        """
        if bad.total and not skip:
            raise _bad_rows_error(f"--data {self.location}", bad, self.rows)
        train, validation, test = (split.without(ids) for split in self.splits)
        if len(train) < _MIN_TRAIN_ROWS or not len(validation) or not len(test):
            left = f"{len(train):,} training, {len(validation):,} validation and {len(test):,} test rows"
            raise RequestError(f"--data {self.location}: without {bad.total:,} bad rows only {left} are left: {bad.describe()}")
        return replace(self, train=train, validation=validation, test=test, bad=bad)

    def fingerprint(self, data: "ImageArrays | ParquetFiles") -> str:
        """SHA-256 of the `content` of the data, as the workers get them, and of the splits."""
        digest = hashlib.sha256()
        for part in data.content():
            digest.update(part)
        for split in self.splits:
            digest.update(f"{len(split)} rows".encode() + split.starts.tobytes() + split.ends.tobytes())
        return digest.hexdigest()


Counter = Callable[[str, int], Callable[[int], None]]
"""Begins to count towards a number of items that a text names; what it returns gets the number of items since its last call."""


def _bad_rows_error(where: str, bad: ReasonCounts, rows: int, then: str = "") -> RequestError:
    """The error that some of so many rows cannot be used; `then` follows their number."""
    text = f"{where}: {bad.total:,} of {counted(rows, 'row')} cannot be used{then}: {bad.describe()}"
    return RequestError(f"{text}; a new run with --skip-bad-rows trains without them")


def open_source(data: str, counter: Counter = lambda *_: lambda _: None, *, skip_bad_rows: bool = False) -> Source:
    """Open the data source that `--data` names; `counter` counts the footers that have been read.

    Bad rows of IDX files are left out with `skip_bad_rows`. Rows of Parquet are not read.

    Raises:
        RequestError: it is missing, cannot be used, or has no images with digits; names the file.
        RunError: the storage does not give a file.
    """
    if data == "sample":
        return _sample()
    if data in ("auto", "mnist"):
        return _full_mnist(fall_back=data == "auto", skip_bad_rows=skip_bad_rows)
    place = locate_existing(data, "--data")
    try:
        with place.answers("listed"):
            folder = find_idx(Path(place.path)) if place.is_local else None
        return _idx(folder, skip_bad_rows=skip_bad_rows) if folder else _parquet(data, place, counter)
    except StorageError as error:
        raise RunError(f"--data {error}; nothing was begun") from None


def _sample() -> Source:
    table = read_table(locate(str(SAMPLE), "--data"))
    images, digits, _ = decode_labelled(one_chunk(table["image"]), one_chunk(table["digit"]))
    return _with_splits("sample", str(SAMPLE), ImageArrays(images, digits), {"": RowRanges.of([0], [len(images)])})


def _full_mnist(*, fall_back: bool, skip_bad_rows: bool) -> Source:
    """MNIST from ./data, from the cache in the home folder, or downloaded into it; with `fall_back` else the sample."""
    cache = Path.home() / ".cache" / "mnistsum_ray"
    folder = find_idx(Path("data").resolve()) or find_idx(cache)
    try:
        return _idx(folder or download_mnist(cache), skip_bad_rows=skip_bad_rows)
    except (OSError, RuntimeError) as error:
        missing = f"not in ./data or {cache}, and it cannot be downloaded ({one_line(error)})"
    if not fall_back:
        raise RequestError(f"--data mnist: {missing}; name its folder, or take --data sample")
    sample = _sample()
    rest = f"Going on with the bundled sample of {sample.rows:,} images; --data FOLDER names a copy of the full set."
    return replace(sample, notice=f"NOT the full MNIST: it is {missing}. {rest}")


def _idx(folder: Path, *, skip_bad_rows: bool) -> Source:
    images, digits, bad, test_rows = read_idx(folder)
    end = len(images) - test_rows
    ranges = {"train": RowRanges.of([0], [end]), "test": RowRanges.of([end], [len(images)])}
    places = {(IDX_FILES[1], row) if row < end else (IDX_FILES[3], row - end): reason for row, reason in bad.items()}
    source = _with_splits("mnist", str(folder), ImageArrays(images, digits), ranges)
    return source.without(np.array([*bad], np.int64), ReasonCounts.of(places), skip=skip_bad_rows)


def _parquet(data: str, place: Location, counter: Counter) -> Source:
    none = f"holds neither IDX files ({IDX_FILES[0]}, …) on a local disk nor Parquet files"
    found = list_inputs([data], flag="--data", none=none)
    root = found.root
    if found.unusable:
        name, reason = next(iter(found.unusable.items()))
        raise RequestError(f"--data {(root / name).display}: {reason}")
    count, rows = counter("footers read", len(found.files)), []
    # A local disk answers at once, and threads slow it down.
    with ThreadPoolExecutor(1 if root.is_local else _THREADS) as pool:
        for row in pool.map(partial(_describe, root), found.files.items()):
            rows.append(row)
            count(1)
    files = ParquetFiles(root, pa.Table.from_pylist(rows, TRAINING_FILE_SCHEMA))
    splits = np.array([_split_of_name(name) for name in found.files])
    names = set(splits.tolist())
    if "" in names and len(names) > 1:
        raise RequestError(f"--data {place.display}: some files are named train or test and some are not; rename them")
    starts = files.end_ids - files.table["rows"].to_numpy()
    ranges = {name: RowRanges.of(starts[splits == name], files.end_ids[splits == name]) for name in names}
    return replace(_with_splits("parquet", place.display, files, ranges), skipped=found.skipped)


def _describe(root: Location, listed: tuple[str, Entry]) -> dict[str, Any]:
    """The TRAINING_FILE_SCHEMA row of an input file."""
    name, entry = listed
    file = root / name
    try:
        footer = read_footer(file, entry)
    except UnusableFileError as error:
        raise RequestError(f"{file.display}: {error}") from None
    names = footer.schema.names
    digit = next((name for name in _DIGIT_COLUMNS if name in names), None)
    if "image" not in names or digit is None:
        raise RequestError(f"{file.display}: needs a column 'image' and a column 'digit' or 'label', has {', '.join(names)}")
    wrong = column_error(footer.schema, "image", image_type_error) or column_error(footer.schema, digit, number_type_error)
    if wrong:
        raise RequestError(f"{file.display}: {wrong}")
    rows = {"rows": sum(footer.group_rows), "group_rows": footer.group_rows}
    return {"name": name, "size": entry.size, "e_tag": entry.e_tag, "footer_sha256": footer.sha256, "digit_column": digit} | rows


def _split_of_name(file: str) -> str:
    """Split named by the file or, failing that, by its folder: train, validation or test; "" where neither does."""
    for name in reversed(file.split("/")[-2:]):
        for word in re.findall("[a-z]+", name.lower()):
            if word in _SPLITS:
                return _SPLITS[word]
    return ""


def _with_splits(name: str, location: str, data: ImageArrays | ParquetFiles, rows: dict[str, RowRanges]) -> Source:
    """A source whose rows belong to these splits; "" is none. A missing one is held out of the training rows."""
    train, validation, test = rows.get("train", rows.get("")), rows.get("validation"), rows.get("test")
    if train is None or len(train) < _MIN_TRAIN_ROWS:
        count = 0 if train is None else len(train)
        raise RequestError(f"--data {location}: has {count} training rows; at least {_MIN_TRAIN_ROWS} are needed")
    count = min(_MAX_HELD_OUT_ROWS, len(train) // 10)
    if test is None:
        train, test = train.hold_out(count, data.group_bounds)
    if validation is None:
        train, validation = train.hold_out(count, data.group_bounds)
    if not len(validation) or not len(test):
        raise RequestError(f"--data {location}: its validation or test files have no rows")
    return Source(name, location, data, train, validation, test)
