"""Data sources: MNIST's IDX files, Parquet files or the bundled sample, and the rows of each split.

IDX files and the sample are read at once. Of Parquet files only the footers are; `FileGroup.blocks`
reads and decodes the rows of some.
"""

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mnistsum_ray.data.idx import IDX_FILES, download_mnist, find_idx, read_idx
from mnistsum_ray.data.images import (
    Pixels,
    ReasonCounts,
    decode_labelled,
    image_type_error,
    number_type_error,
    one_chunk,
)
from mnistsum_ray.data.inputs import list_inputs
from mnistsum_ray.data.order import BLOCK_ROWS, RowIds, hold_out
from mnistsum_ray.data.parquet import (
    column_error,
    open_parquet,
    plain_table,
    read_footer,
    read_rows,
    read_table,
)
from mnistsum_ray.errors import (
    RequestError,
    RunError,
    StorageError,
    UnusableFileError,
    counted,
    one_line,
)
from mnistsum_ray.storage.store import Entry, Location
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
"""Words in the names of files and folders, in upper or lower case, that name the split of their rows."""

_MIN_TRAIN_ROWS: Final = 10
_MAX_HELD_OUT_ROWS: Final = 5000

_THREADS: Final = 32
"""Threads that read footers from an object store, which answers slowly but takes many requests at once."""

Digits = npt.NDArray[np.int8]

BadRows = dict[int, tuple[str, int, str]]
"""Index of a row that cannot be used -> its file, its index there, and the reason."""


@dataclass(frozen=True)
class Block:
    """At most BLOCK_ROWS decoded rows: images uint8[n, 28, 28] and digits int8[n], zeros in bad rows."""

    images: Pixels
    digits: Digits
    bad: BadRows


@dataclass(frozen=True)
class LabelledFile:
    """A Parquet file with images and digits, as its footer describes it."""

    name: str
    """Relative to the folder that was listed."""
    entry: Entry
    rows: int
    digit_column: str


@dataclass(frozen=True)
class MemoryGroup:
    """Rows in memory that become one block."""

    block: Block

    @property
    def rows(self) -> int:
        return len(self.block.digits)

    def blocks(self) -> Iterator[Block]:
        yield self.block


@dataclass(frozen=True)
class FileGroup:
    """One Parquet file, or several that together have the rows of one block at most."""

    root: Location
    files: tuple[LabelledFile, ...]

    @property
    def rows(self) -> int:
        return sum(file.rows for file in self.files)

    def blocks(self) -> Iterator[Block]:
        """Read and decode the rows, in their order.

        Raises:
            RequestError: a file has changed, or cannot be read.
            StorageError: the storage does not give a file.
        """
        waiting: list[Block] = []
        for file in self.files:
            location = self.root / file.name
            try:
                for block in _decoded(location, file):
                    waiting.append(block)
                    if sum(len(part.digits) for part in waiting) == BLOCK_ROWS:
                        yield _joined(waiting)
                        waiting = []
            except UnusableFileError as error:
                raise RequestError(f"{location.display}: {error}") from None
        if waiting:
            yield _joined(waiting)


@dataclass(frozen=True)
class Source:
    """Images with digits. Row ids count from 0 in the order of the groups; each is in one split."""

    name: str
    """sample, mnist or parquet."""
    location: str
    groups: list[MemoryGroup | FileGroup]
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
        counts = ReasonCounts.of({(file, row): reason for file, row, reason in bad.values()})
        if not skip:
            raise RequestError(
                f"--data {self.location}: {len(bad):,} of {counted(self.rows, 'row')} cannot be used: "
                f"{counts.describe()}; a new run with --skip-bad-rows trains without them"
            )
        ids = np.array([*bad], np.int64)
        splits = [np.setdiff1d(split, ids, assume_unique=True) for split in (self.train, self.validation, self.test)]
        train, validation, test = splits
        if len(train) < _MIN_TRAIN_ROWS or not len(validation) or not len(test):
            left = f"{len(train):,} training, {len(validation):,} validation and {len(test):,} test rows"
            raise RequestError(f"--data {self.location}: without {len(bad):,} bad rows only {left} are left: {counts.describe()}")
        return replace(self, train=train, validation=validation, test=test, bad=counts)


Counter = Callable[[str, int], Callable[[int], None]]
"""Begins to count towards a number of items that a text names; what it returns gets the number of items since its last call."""


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
    images, digits, _ = decode_labelled(one_chunk(table["image"]), one_chunk(table["digit"]))
    return _with_splits("sample", str(SAMPLE), _in_memory(images, digits, {}), {"": np.arange(len(images))})


def _full_mnist(*, fall_back: bool) -> Source:
    """MNIST from ./data, from the cache in the home folder, or downloaded into it; with `fall_back` else the sample."""
    cache = Path.home() / ".cache" / "mnistsum_ray"
    folder = find_idx(Path("data").resolve()) or find_idx(cache)
    try:
        return _idx(folder or download_mnist(cache))
    except (OSError, RuntimeError) as error:
        missing = f"not in ./data or {cache}, and it cannot be downloaded ({one_line(error)})"
    if not fall_back:
        raise RequestError(f"--data mnist: {missing}; name its folder, or take --data sample")
    sample = _sample()
    rest = f"Going on with the bundled sample of {sample.rows:,} images; --data FOLDER names a copy of the full set."
    return replace(sample, notice=f"NOT the full MNIST: it is {missing}. {rest}")


def _idx(folder: Path) -> Source:
    images, digits, reasons, test_rows = read_idx(folder)
    end = len(images) - test_rows
    bad = {}
    for row, reason in reasons.items():
        bad[row] = (IDX_FILES[1], row, reason) if row < end else (IDX_FILES[3], row - end, reason)
    ids = {"train": np.arange(end), "test": np.arange(end, len(images))}
    return _with_splits("mnist", str(folder), _in_memory(images, digits, bad), ids)


def _in_memory(images: Pixels, digits: Digits, bad: BadRows) -> list[MemoryGroup | FileGroup]:
    groups: list[MemoryGroup | FileGroup] = []
    for start in range(0, len(images), BLOCK_ROWS):
        rows = range(start, min(start + BLOCK_ROWS, len(images)))
        of_block = {row - start: place for row, place in bad.items() if row in rows}
        groups.append(MemoryGroup(Block(images[start : rows.stop], digits[start : rows.stop], of_block)))
    return groups


def _parquet(data: str, place: Location, counter: Counter) -> Source:
    none = f"holds neither IDX files ({IDX_FILES[0]}, …) on a local disk nor Parquet files"
    found = list_inputs([data], flag="--data", none=none)
    root = found.root
    if found.unusable:
        name, reason = next(iter(found.unusable.items()))
        raise RequestError(f"--data {(root / name).display}: {reason}")
    count = counter("footers read", len(found.files))
    files = []
    # A local disk answers at once, and threads slow it down.
    with ThreadPoolExecutor(1 if root.is_local else _THREADS) as pool:
        for file in pool.map(partial(_describe, root), found.files.items()):
            files.append(file)
            count(1)
    names = np.array([_split_of_name(name) for name in found.files])
    if "" in names and len(set(names)) > 1:
        raise RequestError(f"--data {place.display}: some files are named train or test and some are not; rename them")
    split_of_row = np.repeat(names, [file.rows for file in files])
    ids = {str(name): np.flatnonzero(split_of_row == name) for name in set(names)}
    return replace(_with_splits("parquet", place.display, _grouped(root, files), ids), skipped=found.skipped)


def _grouped(root: Location, files: list[LabelledFile]) -> list[MemoryGroup | FileGroup]:
    """Small files that follow each other share a block, up to its rows."""
    groups: list[MemoryGroup | FileGroup] = []
    waiting: list[LabelledFile] = []
    for file in files:
        if waiting and sum(small.rows for small in waiting) + file.rows > BLOCK_ROWS:
            groups.append(FileGroup(root, tuple(waiting)))
            waiting = []
        waiting.append(file)
    return [*groups, FileGroup(root, tuple(waiting))]


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
        raise RequestError(f"{file.display}: needs a column 'image' and a column 'digit' or 'label', has {', '.join(names)}")
    wrong = column_error(footer.schema, "image", image_type_error) or column_error(footer.schema, digit, number_type_error)
    if wrong:
        raise RequestError(f"{file.display}: {wrong}")
    return LabelledFile(name, entry, sum(footer.group_rows), digit)


def _decoded(location: Location, file: LabelledFile) -> Iterator[Block]:
    """The rows of a file, BLOCK_ROWS at a time; errors as of `open_parquet`."""
    columns = ["image", file.digit_column]
    first = 0
    with open_parquet(location, file.entry) as parquet:
        batches = read_rows(parquet, np.arange(file.rows), columns)
        for table in _of_block_rows(batches):
            plain = plain_table(table)
            images, digits, reasons = decode_labelled(*(one_chunk(plain[column]) for column in columns))
            bad = {row: (file.name, first + row, reason) for row, reason in reasons.items()}
            yield Block(images, digits, bad)
            first += len(digits)


def _of_block_rows(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.Table]:
    """Tables of BLOCK_ROWS rows, the last of fewer: row groups may have any number."""
    waiting: list[pa.RecordBatch] = []
    for batch in batches:
        waiting.append(batch)
        if sum(part.num_rows for part in waiting) >= BLOCK_ROWS:
            table = pa.Table.from_batches(waiting)
            yield table.slice(0, BLOCK_ROWS)
            waiting = table.slice(BLOCK_ROWS).to_batches()
    if waiting:
        yield pa.Table.from_batches(waiting)


def _joined(blocks: list[Block]) -> Block:
    """Blocks that follow each other as one."""
    if len(blocks) == 1:
        return blocks[0]
    bad: BadRows = {}
    first = 0
    for block in blocks:
        bad |= {first + row: place for row, place in block.bad.items()}
        first += len(block.digits)
    images = np.concatenate([block.images for block in blocks])
    return Block(images, np.concatenate([block.digits for block in blocks]), bad)


def _split_of_name(file: str) -> str:
    """Split named by the file or, failing that, by its folder: train, validation or test; "" where neither does."""
    for name in reversed(file.split("/")[-2:]):
        for word in re.findall("[a-z]+", name.lower()):
            if word in _SPLITS:
                return _SPLITS[word]
    return ""


def _with_splits(name: str, location: str, groups: list[MemoryGroup | FileGroup], ids: dict[str, RowIds]) -> Source:
    """A source whose rows belong to these splits; "" is none. A missing one is held out of the training rows."""
    train = ids.get("train", ids.get("", np.empty(0, np.int64)))
    if len(train) < _MIN_TRAIN_ROWS:
        raise RequestError(f"--data {location}: has {len(train)} training rows; at least {_MIN_TRAIN_ROWS} are needed")
    count = min(_MAX_HELD_OUT_ROWS, len(train) // 10)
    test, validation = ids.get("test"), ids.get("validation")
    if test is None:
        train, test = hold_out(train, count)
    if validation is None:
        train, validation = hold_out(train, count)
    if not len(validation) or not len(test):
        raise RequestError(f"--data {location}: its validation or test files have no rows")
    return Source(name, location, groups, train, validation, test)
