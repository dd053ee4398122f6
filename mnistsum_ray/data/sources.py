"""Data sources: MNIST's IDX files, Parquet files or the bundled sample, and the rows of each split.

IDX files and the sample are read at once, of Parquet files only the footers: their rows are read
and decoded block by block.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mnistsum_ray.data.idx import IDX_FILES, download_mnist, find_idx, read_idx
from mnistsum_ray.data.images import (
    DIGITS,
    BadRow,
    Pixels,
    ReasonCounts,
    decode_images,
    decode_numbers,
    image_type_error,
    join_reasons,
    number_type_error,
    one_chunk,
    pixels_array,
)
from mnistsum_ray.data.inputs import list_inputs
from mnistsum_ray.data.randomness import BLOCK_ROWS, RowIds, hold_out
from mnistsum_ray.data.parquet import (
    column_error,
    open_parquet,
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
from mnistsum_ray.storage.store import Entry, Location, in_threads
from mnistsum_ray.storage.uri import locate, locate_existing

SAMPLE: Final = Path(__file__).parent / "sample" / "mnist_5k.parquet"

_DIGIT_COLUMNS: Final = ("digit", "label")

_SPLIT: Final = re.compile(r"(?<![a-z])(train|val|test)(ing|id|idation)?(?![a-z])")
"""A word in the name of a file or folder, in lower case, that names a split."""

_MAX_HELD_OUT_ROWS: Final = 5000

Digits = npt.NDArray[np.int8]

BadRows = dict[int, BadRow]
"""Rows that cannot be used, by their index."""


@dataclass(frozen=True)
class Block:
    """Decoded rows: images uint8[n, 28, 28] and digits int8[n], zeros in bad rows."""

    images: Pixels
    digits: Digits
    bad: BadRows

    @classmethod
    def decode(cls, images: pa.Array, digits: pa.Array, file: str, first: int = 0) -> "Block":
        """Decode the rows of a file from its row `first` on."""
        pixels, bad_images = decode_images(images)
        values, bad_digits = decode_numbers(digits, DIGITS)
        reasons = join_reasons(bad_images, bad_digits, "digit")
        bad = {row: (file, first + row, reason) for row, reason in reasons.items()}
        return cls(pixels, values.astype(np.int8), bad)

    @property
    def rows(self) -> int:
        return len(self.digits)

    def blocks(self) -> Iterator["Block"]:
        """The rows in blocks of BLOCK_ROWS, the last of fewer."""
        for start in range(0, self.rows, BLOCK_ROWS):
            stop = start + BLOCK_ROWS
            bad = {row - start: why for row, why in self.bad.items() if start <= row < stop}
            yield Block(self.images[start:stop], self.digits[start:stop], bad)


@dataclass(frozen=True)
class LabelledFile:
    """A Parquet file with images and digits, as its footer describes it."""

    path: Location
    entry: Entry
    name: str
    """Relative to the folder that was listed."""
    rows: int
    digit_column: str


@dataclass(frozen=True)
class FileGroup:
    """One Parquet file, or several that together have the rows of one block at most."""

    files: list[LabelledFile]

    @property
    def rows(self) -> int:
        return sum(file.rows for file in self.files)

    def blocks(self) -> Iterator[Block]:
        """Read and decode the rows, in their order, in blocks of BLOCK_ROWS, the last of fewer.

        Raises:
            RequestError: a file has changed, or cannot be read.
            StorageError: the storage does not give a file.
        """
        if len(self.files) == 1:
            yield from _read_blocks(self.files[0])
        elif self.rows:
            yield _join_blocks([block for file in self.files for block in _read_blocks(file)])


Groups = list[Block | FileGroup]
"""What a source consists of: rows in memory, or in files."""


def _read_blocks(file: LabelledFile) -> Iterator[Block]:
    """The rows of a file in blocks; errors as of `FileGroup.blocks`."""
    edges = [*range(0, file.rows, BLOCK_ROWS), file.rows]
    ranges = [range(start, end) for start, end in pairwise(edges)]
    try:
        with open_parquet(file.path, file.entry) as parquet:
            tables = read_rows(parquet, ranges, ["image", file.digit_column])
            for rows, table in zip(ranges, tables, strict=True):
                images, digits = one_chunk(table["image"]), one_chunk(table[file.digit_column])
                yield Block.decode(images, digits, file.name, rows.start)
    except UnusableFileError as error:
        raise RequestError(f"{file.path.display}: {error}") from None


def _join_blocks(blocks: list[Block]) -> Block:
    """The rows of blocks that follow each other."""
    bad: BadRows = {}
    first = 0
    for block in blocks:
        bad |= {first + row: why for row, why in block.bad.items()}
        first += block.rows
    images = np.concatenate([block.images for block in blocks])
    return Block(images, np.concatenate([block.digits for block in blocks]), bad)


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

    def refuse(self, bad: BadRows) -> None:
        """RequestError, which counts bad rows and names the first, if there are any."""
        if bad:
            first = ReasonCounts.of([*bad.values()]).describe()
            of = f"{len(bad):,} of {counted(self.rows, 'row')} cannot be used: {first}"
            advice = "a new run with --skip-bad-rows trains without them"
            raise RequestError(f"--data {self.location}: {of}; {advice}")

    def without(self, bad: BadRows) -> "Source":
        """The source without bad rows, by their ids. Other rows stay in their splits.

        RequestError: too few are left.
        """
        if not bad:
            return self
        ids = np.array([*bad], np.int64)
        counts = ReasonCounts.of([*bad.values()])
        splits = (self.train, self.validation, self.test)
        train, validation, test = (np.setdiff1d(split, ids, assume_unique=True) for split in splits)
        rest = replace(self, train=train, validation=validation, test=test, bad=counts)
        return rest.checked()

    def checked(self) -> "Source":
        """The source itself. RequestError: it has too few rows."""
        train, validation, test = map(len, (self.train, self.validation, self.test))
        if not (train and validation and test):
            has = f"has {train:,} training, {validation:,} validation and {test:,} test rows"
            if self.bad.total:
                has += f" beside {self.bad.total:,} bad ones: {self.bad.describe()}"
            raise RequestError(f"--data {self.location}: {has}; each split needs some")
        return self


StartProgress = Callable[[str, int], Callable[[int], None]]
"""Gets the name and number of the things that will be counted; returns what adds to the count."""


def no_progress(what: str, total: int) -> Callable[[int], None]:
    """A StartProgress that shows nothing."""
    return lambda count: None


def open_source(data: str, progress: StartProgress = no_progress) -> Source:
    """Open the data source that `--data` names; `progress` counts the footers that have been read.

    Raises:
        RequestError: it is missing, cannot be used, or has no images with digits; names the file.
        RunError: the storage does not give a file.
    """
    if data == "sample":
        return _sample()
    if data in ("auto", "mnist"):
        return _full_mnist(fall_back=data == "auto")
    location = locate_existing(data, "--data")
    try:
        with location.storage_errors("listed"):
            folder = find_idx(Path(location.path)) if location.is_local else None
        return _idx(folder) if folder else _parquet(data, location, progress)
    except StorageError as error:
        raise RunError(f"--data {error}; nothing was begun") from None


def _sample() -> Source:
    table = read_table(locate(str(SAMPLE), "--data"))
    block = Block.decode(one_chunk(table["image"]), one_chunk(table["digit"]), SAMPLE.name)
    return _with_splits("sample", str(SAMPLE), [block], {"train": np.arange(block.rows)})


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
    train, test = (
        Block.decode(pixels_array(images), pa.array(labels), labels_file)
        for images, labels, labels_file in read_idx(folder)
    )
    block = _join_blocks([train, test])
    ids = {"train": np.arange(train.rows), "test": np.arange(train.rows, block.rows)}
    return _with_splits("mnist", str(folder), [block], ids)


def _parquet(data: str, location: Location, progress: StartProgress) -> Source:
    idx = f"IDX files ({IDX_FILES[0][0]}, …, not gzipped) on a local disk"
    found = list_inputs([data], flag="--data", none=f"holds neither {idx} nor Parquet files")
    root = found.root
    if found.unusable:
        name, reason = next(iter(found.unusable.items()))
        raise RequestError(f"--data {(root / name).display}: {reason}")
    count = progress("footers read", len(found.files))
    files = list(in_threads(root, partial(_describe, root), list(found.files.items()), count))
    names = [_split_of_name(name) for name in found.files]
    if None in names and any(names):
        mixed = "some files are named train or test and some are not; rename them"
        raise RequestError(f"--data {location.display}: {mixed}")
    splits = [name or "train" for name in names]
    ids = {}
    for split in set(splits):
        is_in_split = [name == split for name in splits]
        ids[split] = np.flatnonzero(np.repeat(is_in_split, [file.rows for file in files]))
    source = _with_splits("parquet", location.display, _grouped(files), ids)
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
    return LabelledFile(file, entry, name, footer.metadata.num_rows, digit)


def _grouped(files: list[LabelledFile]) -> Groups:
    """Small files that follow each other share a block, up to its rows."""
    groups: list[list[LabelledFile]] = []
    rows = 0  # of the last group
    for file in files:
        if not groups or rows + file.rows > BLOCK_ROWS:
            groups.append([])
            rows = 0
        groups[-1].append(file)
        rows += file.rows
    return [FileGroup(group) for group in groups]


def _split_of_name(file: str) -> str | None:
    """The split that the file names or, failing that, its folder; None where neither does."""
    for name in reversed(file.split("/")[-2:]):
        found = _SPLIT.search(name.lower())
        if found:
            return found[1]
    return None


def _with_splits(name: str, location: str, groups: Groups, ids: dict[str, RowIds]) -> Source:
    """A source with the rows of these splits: train, val and test.

    A missing val or test is held out of the training rows. RequestError: there are too few rows.
    """
    train = ids.get("train", np.empty(0, np.int64))
    count = min(_MAX_HELD_OUT_ROWS, len(train) // 10)
    test, validation = ids.get("test"), ids.get("val")
    if test is None:
        train, test = hold_out(train, count)
    if validation is None:
        train, validation = hold_out(train, count)
    return Source(name, location, groups, train, validation, test).checked()
