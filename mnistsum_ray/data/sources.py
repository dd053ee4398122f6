"""What `--data` names: rows that the task finds by itself, or Parquet files; their splits.

Rows that a task finds are in memory at once, of Parquet files only the footers. Ray Data reads and
decodes both later.
"""

import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

import pyarrow as pa

from mnistsum_ray.data.columns.base import Column, ColumnError
from mnistsum_ray.data.inputs import list_inputs
from mnistsum_ray.data.parquet import read_footer, real_schema
from mnistsum_ray.errors import RequestError, UnusableFileError
from mnistsum_ray.storage.store import Entry, Location, in_threads
from mnistsum_ray.storage.uri import as_request_error, check_ray_reaches, locate, locate_existing

if TYPE_CHECKING:  # a task is made of columns, and not the other way round
    from mnistsum_ray.task import NamedData, Task

SPLITS: Final = ("train", "validation", "test")

Ranges: TypeAlias = dict[str, tuple[float, float]]
"""Which rows are whose: by split, a range of the rows' `positions`."""

_MOST_HELD_OUT: Final = 5000
"""Maximum of training rows, about, that are held out for a split without a file."""

_WORD_BEGINS: Final = re.compile(r"(?<=[a-z])(?=[A-Z])|(?=[A-Z][a-z])")
"""Where a word begins by its capital, as in `dayTrain`."""

_SPLIT_WORD: Final = re.compile(r"(?<![a-z])(train|val|test)(ing|id|idation)?(set|data)?(?![a-z])")
"""A word in the name of a file or folder, in lower case, that names a split."""


class DataFile(NamedTuple):
    """A Parquet file of a training, as its footer describes it."""

    path: Location
    name: str  # relative to the folder that was listed
    listed: Entry  # before its footer was read
    rows: int
    columns: dict[str, str]  # by the columns' names in the task, the names in the file
    schema: pa.Schema  # of these columns; Ray Data reads files together where they agree


@dataclass(frozen=True)
class Source:
    """Where the rows of a run are from, by the split that a file is named for.

    Either the rows are in memory (`tables`), or they are in `files`.
    """

    name: str  # a name that the task knows, or parquet
    data: str  # the value of `--data` that finds the same rows again
    location: str
    # By split: the task's columns, and `path`, which says where a row is from.
    tables: dict[str, pa.Table] = field(default_factory=dict)
    files: dict[str, list[DataFile]] = field(default_factory=dict)  # by split
    notice: str = ""  # message for the console about the choice of source
    skipped: list[str] = field(default_factory=list)  # as of `Inputs`
    max_rows: int | None = None  # about this many rows per split; None: all

    def __str__(self) -> str:
        return self.name if self.name == self.data else f"{self.name} ({self.location})"

    @property
    def all_files(self) -> list[DataFile]:
        return [*itertools.chain(*self.files.values())]

    def limited(self, max_rows: int | None) -> "Source":
        """Return a source of about this many rows per split, and no more files than these need."""
        if max_rows is None:
            return self
        files: dict[str, list[DataFile]] = {}
        for split, of_split in self.files.items():
            rows = 0
            for file in of_split:
                if rows < 1.25 * max_rows:  # a fifth may be held out
                    files.setdefault(split, []).append(file)
                rows += file.rows
        return replace(self, files=files, max_rows=max_rows)

    def rows_of(self, split: str) -> int:
        """Return rows in memory, or in files, that are named for this split."""
        if split in self.tables:
            return int(self.tables[split].num_rows)
        return sum(file.rows for file in self.files.get(split, []))

    def ranges(self, named_split: str) -> Ranges:
        """Return which of the rows that are named for a split are whose.

        Of training rows a tenth, and some 5,000 at most, are held out for each split that no file
        is named for.
        """
        rows = self.rows_of(named_split)
        ranges: Ranges = {}
        start = 0.0
        if named_split == "train":
            for split in ("test", "validation"):
                if rows and not self.rows_of(split):
                    stop = start + min(1 / 10, _MOST_HELD_OUT / rows)
                    ranges[split] = (start, stop)
                    start = stop
        ranges[named_split] = (start, 1.0)
        share = 1.0 if self.max_rows is None else self.max_rows / max(1, rows)
        return {split: (start, min(stop, start + share)) for split, (start, stop) in ranges.items()}

    def stored_bytes(self, columns: Mapping[str, Column]) -> int:
        """Return about how many bytes the decoded training rows take."""
        row_bytes = sum(of.row_bytes for of in columns.values() if not of.stays_encoded)
        stored = self.rows_of("train") * row_bytes
        if any(of.stays_encoded for of in columns.values()):
            table = self.tables.get("train")
            stored += sum(file.listed.size for file in self.files.get("train", []))
            stored += table.nbytes if table else 0
        return stored

    @property
    def train_rows(self) -> int:
        """About the number of training rows."""
        start, stop = self.ranges("train")["train"]
        return round(self.rows_of("train") * (stop - start))


FindColumns = Callable[[pa.Schema], dict[str, str]]
"""`find_columns` with the task's columns and the flags that name them."""

StartProgress = Callable[[str, int], Callable[[int], None]]
"""From what is counted, and its total, to the function that adds to the count."""


def open_source(
    task: "Task",
    data: str,
    find: FindColumns,
    start_progress: StartProgress | None = None,
) -> Source:
    """Find what `--data` names; `start_progress` shows how many footers have been read.

    `find` says which columns of a file are the task's.

    RequestError: the data is missing or unusable. TryAgainError: the storage does not answer.
    """
    found = task.named_data(data)
    if found is not None:
        return _in_memory(task, found)
    with as_request_error("--data"):
        check_ray_reaches(locate(data, "--data"))
    location = locate_existing(data, "--data")
    with as_request_error("--data"):
        return _parquet(data, find, location, start_progress)


def _in_memory(task: "Task", found: "NamedData") -> Source:
    """Return a source of rows that a task has found."""
    tables = {}
    for split, arrays in found.splits.items():
        columns = {key: of.to_arrow(arrays[key]) for key, of in task.training_columns.items()}
        rows = len(next(iter(columns.values())))
        tables[split] = pa.table(columns | {"path": pa.repeat(f"{found.name} ({split})", rows)})
    return Source(
        name=found.name,
        data=found.data,
        location=found.location,
        tables=tables,
        notice=found.notice,
    )


def _parquet(
    data: str,
    find: FindColumns,
    location: Location,
    start_progress: StartProgress | None,
) -> Source:
    found = list_inputs([data], flag="--data")
    describe = partial(_describe, find, found.root)
    count = start_progress("footers read", len(found.files)) if start_progress else None
    files: dict[str, list[DataFile]] = {}
    for file in in_threads(found.root, describe, list(found.files.items()), count):
        files.setdefault(_split_of_name(file.name), []).append(file)
    unnamed = files.pop("", [])
    if unnamed and files:
        mixed = "some files are named train or test and some are not; rename them"
        raise RequestError(f"--data {location.display}: {mixed} ({unnamed[0].name})")
    return Source(
        name="parquet",
        data=location.display,
        location=location.display,
        files=files or {"train": unnamed},
        skipped=found.skipped,
    )


def check_unchanged(source: Source) -> None:
    """Raise RequestError if a file has changed since its footer was read."""
    now = list_inputs([source.data], flag="--data").files if source.files else {}
    for file in source.all_files:
        if now.get(file.name) != file.listed:
            changed = "has changed while it was read; run the command again"
            raise RequestError(f"--data {file.path.display}: {changed}")


def _describe(find: FindColumns, root: Location, listed: tuple[str, Entry]) -> DataFile:
    """Return what the footer of an input file says. RequestError: the file cannot be used."""
    name, entry = listed
    file = root / name
    try:
        footer = read_footer(file, entry)
        names = find(real_schema(footer.schema_arrow))
    except (UnusableFileError, ColumnError) as error:
        raise RequestError(f"{file.display}: {error}") from None
    return DataFile(
        path=file,
        name=name,
        listed=entry,
        rows=footer.metadata.num_rows,
        columns=names,
        schema=pa.schema([footer.schema_arrow.field(one) for one in names.values()]),
    )


def _split_of_name(file: str) -> str:
    """Return the split in the name of a file, or else of its folder; "" if neither has one."""
    for name in reversed(file.split("/")[-2:]):
        found = _SPLIT_WORD.search(_WORD_BEGINS.sub("-", name).lower())
        if found:
            return "validation" if found[1] == "val" else found[1]
    return ""
