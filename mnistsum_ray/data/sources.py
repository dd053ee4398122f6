"""Data sources: MNIST's IDX files, Parquet files or the bundled sample, and the rows of each split.

IDX files and the sample are read at once, of Parquet files only the footers.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa

from mnistsum_ray.data.blocks import BadRows, Block, FileGroup, Groups, LabelledFile, joined
from mnistsum_ray.data.idx import IDX_FILES, download_mnist, find_idx, read_idx
from mnistsum_ray.data.images import (
    ReasonCounts,
    image_type_error,
    number_type_error,
    one_chunk,
    pixels_array,
)
from mnistsum_ray.data.inputs import list_inputs
from mnistsum_ray.data.order import BLOCK_ROWS, RowIds, hold_out
from mnistsum_ray.data.parquet import column_error, read_footer, read_table
from mnistsum_ray.errors import (
    RequestError,
    RunError,
    StorageError,
    UnusableFileError,
    counted,
    one_line,
)
from mnistsum_ray.storage.store import Entry, Location, in_threads
from mnistsum_ray.storage.uri import locate, locate_existing

SAMPLE: Final = Path(__file__).parent / "sample" / "mnist_5k.parquet"

_DIGIT_COLUMNS: Final = ("digit", "label")

_SPLITS: Final = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "test": "test",
    "testing": "test",
}
"""Words in names of files and folders, in upper or lower case, that name a split."""

_MIN_TRAIN_ROWS: Final = 10
_MAX_HELD_OUT_ROWS: Final = 5000


@dataclass(frozen=True)
class Source:
    """Images with digits. Row ids count from 0 in the order of the groups; each is in one split."""

    name: str
    """sample, mnist or parquet."""
    location: str
    groups: Groups
    train: RowIds
    validation: RowIds
    test: RowIds
    """Row ids of each split, ascending: int64[n]."""
    notice: str = ""
    """Message for the console about the choice of source."""
    skipped: list[str] = field(default_factory=list)
    """As of `Inputs`."""
    bad: ReasonCounts = field(default_factory=ReasonCounts)
    """Rows that are in no split, since they cannot be used."""

    @property
    def rows(self) -> int:
        """Rows of the data, bad ones included."""
        return sum(group.rows for group in self.groups)

    def without(self, bad: BadRows, *, skip: bool) -> "Source":
        """The source without bad rows, by their ids. Other rows stay in their splits.

        Raises:
            RequestError: there are bad rows, and they are not to be skipped; or too few others are
                left. It counts them, and names the first.
        """
        if not bad:
            return self
        counts = ReasonCounts.of([*bad.values()])
        if not skip:
            of = f"{len(bad):,} of {counted(self.rows, 'row')} cannot be used: {counts.describe()}"
            advice = "a new run with --skip-bad-rows trains without them"
            raise RequestError(f"--data {self.location}: {of}; {advice}")
        ids = np.array([*bad], np.int64)
        splits = (self.train, self.validation, self.test)
        train, validation, test = (np.setdiff1d(split, ids, assume_unique=True) for split in splits)
        if len(train) < _MIN_TRAIN_ROWS or not len(validation) or not len(test):
            left = f"{len(train):,} training, {len(validation):,} validation and {len(test):,} test"
            few = f"without {len(bad):,} bad rows only {left} rows are left: {counts.describe()}"
            raise RequestError(f"--data {self.location}: {few}")
        return replace(self, train=train, validation=validation, test=test, bad=counts)


Counter = Callable[[str, int], Callable[[int], None]]
"""Begins to count to a number of things that a text names; it returns what adds to the count."""


def open_source(data: str, counter: Counter = lambda *_: lambda _: None) -> Source:
    """Open the data source that `--data` names; `counter` counts the footers that have been read.

    Raises:
        RequestError: it is missing, cannot be used, or has no images with digits; names the file.
        RunError: the storage does not give a file.
    """
    if data == "sample":
        return _sample()
    if data in ("auto", "mnist"):
        return _full_mnist(fall_back=data == "auto")
    place = locate_existing(data, "--data")
    try:
        with place.answers("listed"):
            folder = find_idx(Path(place.path)) if place.is_local else None
        return _idx(folder) if folder else _parquet(data, place, counter)
    except StorageError as error:
        raise RunError(f"--data {error}; nothing was begun") from None


def _sample() -> Source:
    table = read_table(locate(str(SAMPLE), "--data"))
    rows = Block.decode(one_chunk(table["image"]), one_chunk(table["digit"]), SAMPLE.name)
    return _with_splits("sample", str(SAMPLE), [rows], {"": np.arange(rows.rows)})


def _full_mnist(*, fall_back: bool) -> Source:
    """MNIST from ./data, the cache or a download; with `fall_back` else the sample."""
    cache = Path.home() / ".cache" / "mnistsum_ray"
    folder = find_idx(Path("data").resolve()) or find_idx(cache)
    try:
        return _idx(folder or download_mnist(cache))
    except (OSError, RuntimeError) as error:
        missing = f"not in ./data or {cache}, and it cannot be downloaded ({one_line(error)})"
    if not fall_back:
        raise RequestError(f"--data mnist: {missing}; name its folder, or take --data sample")
    sample = _sample()
    rest = f"Going on with the bundled sample of {sample.rows:,} images"
    advice = "--data FOLDER names a copy of the full set"
    return replace(sample, notice=f"NOT the full MNIST: it is {missing}. {rest}; {advice}.")


def _idx(folder: Path) -> Source:
    parts = []
    for (images, labels), file in zip(read_idx(folder), (IDX_FILES[1], IDX_FILES[3]), strict=True):
        parts.append(Block.decode(pixels_array(images), pa.array(labels), file))
    rows = joined(parts)
    ids = {"train": np.arange(parts[0].rows), "test": np.arange(parts[0].rows, rows.rows)}
    return _with_splits("mnist", str(folder), [rows], ids)


def _parquet(data: str, place: Location, counter: Counter) -> Source:
    idx = f"IDX files ({IDX_FILES[0]}, …, not gzipped) on a local disk"
    found = list_inputs([data], flag="--data", none=f"holds neither {idx} nor Parquet files")
    root = found.root
    if found.unusable:
        name, reason = next(iter(found.unusable.items()))
        raise RequestError(f"--data {(root / name).display}: {reason}")
    count = counter("footers read", len(found.files))
    files = list(in_threads(root, partial(_describe, root), list(found.files.items()), count))
    names = np.array([_split_of_name(name) for name in found.files])
    if "" in names and len(set(names)) > 1:
        mixed = "some files are named train or test and some are not; rename them"
        raise RequestError(f"--data {place.display}: {mixed}")
    split_of_row = np.repeat(names, [file.rows for file in files])
    ids = {str(name): np.flatnonzero(split_of_row == name) for name in set(names)}
    source = _with_splits("parquet", place.display, _grouped(root, files), ids)
    return replace(source, skipped=found.skipped)


def _describe(root: Location, listed: tuple[str, Entry]) -> LabelledFile:
    """An input file, by its footer."""
    name, entry = listed
    file = root / name
    try:
        footer = read_footer(file, entry)
    except UnusableFileError as error:
        raise RequestError(f"{file.display}: {error}") from None
    names = footer.schema.names
    digit = next((name for name in _DIGIT_COLUMNS if name in names), None)
    if "image" not in names or digit is None:
        needed = "a column 'image' and a column 'digit' or 'label'"
        raise RequestError(f"{file.display}: needs {needed}, has {', '.join(names)}")
    for column, type_error in (("image", image_type_error), (digit, number_type_error)):
        wrong = column_error(footer.schema, column, type_error)
        if wrong:
            raise RequestError(f"{file.display}: {wrong}")
    return LabelledFile(name, entry, footer.metadata.num_rows, digit)


def _grouped(root: Location, files: list[LabelledFile]) -> Groups:
    """Small files that follow each other share a block, up to its rows."""
    groups: Groups = []
    waiting: list[LabelledFile] = []
    for file in files:
        if waiting and sum(small.rows for small in waiting) + file.rows > BLOCK_ROWS:
            groups.append(FileGroup(root, tuple(waiting)))
            waiting = []
        waiting.append(file)
    return [*groups, FileGroup(root, tuple(waiting))]


def _split_of_name(file: str) -> str:
    """The split that the file names or, failing that, its folder; "" where neither does."""
    for name in reversed(file.split("/")[-2:]):
        for word in re.findall("[a-z]+", name.lower()):
            if word in _SPLITS:
                return _SPLITS[word]
    return ""


def _with_splits(name: str, location: str, groups: Groups, ids: dict[str, RowIds]) -> Source:
    """A source whose rows belong to these splits, or to none: "".

    A missing split is held out of the training rows.
    """
    train = ids.get("train", ids.get("", np.empty(0, np.int64)))
    if len(train) < _MIN_TRAIN_ROWS:
        few = f"has {len(train)} training rows; at least {_MIN_TRAIN_ROWS} are needed"
        raise RequestError(f"--data {location}: {few}")
    count = min(_MAX_HELD_OUT_ROWS, len(train) // 10)
    test, validation = ids.get("test"), ids.get("validation")
    if test is None:
        train, test = hold_out(train, count)
    if validation is None:
        train, validation = hold_out(train, count)
    if not len(validation) or not len(test):
        raise RequestError(f"--data {location}: its validation or test files have no rows")
    return Source(name, location, groups, train, validation, test)
