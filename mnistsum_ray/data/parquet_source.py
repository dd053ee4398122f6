"""Parquet files of a data source: find them, read their footers, divide their rows into splits, and read rows by their ids.

A million files take some hundred megabytes, and none of it grows with their rows.
"""

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.fs as pafs

from mnistsum_ray.data.images import SIDE, Pixels, check_digits, decode_images, image_type_error, one_chunk
from mnistsum_ray.data.order import RowIds, RowRanges, row_checksums
from mnistsum_ray.data.parquet import SUFFIXES, check_unchanged, is_data_file, open_parquet, read_footer, read_rows
from mnistsum_ray.data.parquet_types import plain_table, without_views
from mnistsum_ray.errors import RequestError, UnusableFileError
from mnistsum_ray.storage.listing import DUPLICATE, duplicate_paths, escape_non_utf8, list_folder
from mnistsum_ray.storage.location import Location, is_utf8, retried

FILE_SCHEMA: Final = pa.schema(
    {
        "name": pa.string(),  # relative to the folder; "" for a source of one file
        "size": pa.int64(),  # bytes
        "modified": pa.int64(),  # nanoseconds since 1970
        "footer_sha256": pa.string(),
        "rows": pa.int64(),
        "group_rows": pa.list_(pa.int64()),  # rows of each row group
        "digit_column": pa.string(),
    }
)
"""One row per file, in the order of the row ids."""

_DIGIT_COLUMNS: Final = ("digit", "label")

_THREADS: Final = 32

_SPLITS: Final = {"train": "train", "training": "train", "test": "test", "testing": "test"} | dict.fromkeys(
    ("validation", "valid", "val"), "validation"
)
"""Words in the names of files and folders, in upper or lower case, that name the split of their rows."""


@dataclass(frozen=True)
class ParquetFiles:
    """Files with images and digits below one folder, or one file."""

    root: Location
    table: pa.Table
    """FILE_SCHEMA."""

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
        name = self.table["name"][index].as_py()
        return self.root / name if name else self.root

    def fetch(self, ids: RowIds) -> tuple[Pixels, npt.NDArray[np.int8]]:
        """Read and decode rows int64[n], distinct and in any order, as uint8[n, 28, 28] and int8[n].

        Raises:
            RequestError: a file has changed, or a row is not an image with a digit; names the file and the row.
            StorageError: the storage does not give a file.
        """
        images, digits = np.empty((len(ids), SIDE, SIDE), np.uint8), np.empty(len(ids), np.int8)
        order = np.argsort(ids)
        files, starts = np.unique(np.searchsorted(self.end_ids, ids[order], side="right"), return_index=True)
        for index, places in zip(files.tolist(), np.split(order, starts[1:]), strict=False):
            images[places], digits[places] = self._read(index, ids[places])
        return images, digits

    def _read(self, index: int, ids: RowIds) -> tuple[Pixels, npt.NDArray[np.int8]]:
        """Rows of one file, in ascending order."""
        (entry,), file = self.table.slice(index, 1).to_pylist(), self.location(index)
        rows = ids - (self.end_ids[index] - entry["rows"])
        try:
            check_unchanged(file, entry["size"], entry["modified"])
            with open_parquet(file) as parquet:
                table = plain_table(pa.Table.from_batches(read_rows(parquet, rows, ["image", entry["digit_column"]])))
        except UnusableFileError as error:
            raise RequestError(f"{file.display}: {error}") from None
        images, bad = decode_images(one_chunk(table["image"]))
        for row, reason in sorted(bad.items()):
            raise RequestError(f"{file.display}: row {rows[row]}: {reason}")
        return images, check_digits(one_chunk(table[entry["digit_column"]]), file.display, rows)

    def add_checksums(
        self, checksums: npt.NDArray[np.int64], ids: RowIds, images: Pixels, digits: npt.NDArray[np.integer[Any]]
    ) -> None:
        """Add the `row_checksums` of rows to those of their files, int64[files]."""
        np.add.at(checksums, np.searchsorted(self.end_ids, ids, side="right"), row_checksums(ids, images, digits))

    def changed_file(self, earlier: pa.Table, *, same_place: bool) -> str | None:
        """What differs from an earlier table of the files, as `FILE: reason`; None where nothing does.

        Args:
            earlier: FILE_SCHEMA.
            same_place: the earlier files lay in the same folder, so their times must be the same too. A copy has other times.
        """
        compared = ["name", "size", "footer_sha256"] + (["modified"] if same_place else [])
        now, then = ({row["name"]: row for row in table.select(compared).to_pylist()} for table in (self.table, earlier))
        for name in sorted(now.keys() | then.keys()):
            if now.get(name) != then.get(name):
                reason = "is new" if name not in then else "is missing" if name not in now else "has changed"
                return f"{(self.root / name if name else self.root).display}: {reason} since the run began"
        return None


def read_parquet_source(place: Location, info: pafs.FileInfo) -> tuple[ParquetFiles, dict[str, RowRanges], dict[str, str]]:
    """Read the footers of a Parquet file, or of all Parquet files in a folder.

    Returns:
        The files in the order of their row ids; split ("" where no name says one) -> its rows; path -> reason of each file that
        was skipped.

    Raises:
        RequestError: a file cannot be used, or only some files are named for a split; names the file or folder.
        StorageError: the storage does not give a file.
    """
    skipped: dict[str, str] = {}
    single = info.type == pafs.FileType.File
    entries = [("", info.size, place.modified(info))] if single else _list_parquet_files(place, skipped)
    # An object store answers slowly but takes many requests at once. A local disk answers at once, and threads slow it down.
    with ThreadPoolExecutor(1 if place.is_local else _THREADS) as pool:
        files = ParquetFiles(place, pa.Table.from_pylist(list(pool.map(partial(_describe, place), entries)), FILE_SCHEMA))
    splits = np.array([_split_of_name(name or place.path.rpartition("/")[2]) for name, _, _ in entries])
    names = dict.fromkeys(splits.tolist())
    if "" in names and len(names) > 1:
        raise RequestError(
            f"--data {place.display}: some files are named train or test and some are not, so the test rows are unclear"
        )
    starts = files.end_ids - files.table["rows"].to_numpy()
    return files, {name: RowRanges.of(starts[splits == name], files.end_ids[splits == name]) for name in names}, skipped


def _list_parquet_files(place: Location, skipped: dict[str, str]) -> list[tuple[str, int, int]]:
    """Name, size and modification time of the Parquet files of a folder, sorted by path; adds the others to `skipped`."""

    def name_of(path: str) -> str:
        return path.removeprefix(place.path).lstrip("/")

    listing = list_folder(place).filter(lambda path: is_data_file(name_of(path)))
    duplicates = set(duplicate_paths(listing.files))
    skipped |= listing.skipped | dict.fromkeys(duplicates, DUPLICATE)
    files = sorted(path for path in listing.files if path not in duplicates)
    not_utf8 = next((path for path in files if not is_utf8(path)), None)
    if not_utf8 is not None:
        raise RequestError(f"--data {escape_non_utf8(not_utf8)}: its name is not UTF-8; rename it")
    if not files:
        raise RequestError(
            f"--data {place.display}: holds neither IDX files (train-images-idx3-ubyte, …) on a local disk nor Parquet "
            f"files ({', '.join(SUFFIXES)})"
        )
    return [(name_of(path), listing.files[path].size, listing.files[path].modified) for path in files]


def _describe(place: Location, entry: tuple[str, int, int]) -> dict[str, Any]:
    """The FILE_SCHEMA row of a file with this name, size and modification time."""
    name, size, modified = entry
    file = place / name if name else place
    try:
        footer = retried(lambda: read_footer(file, size))
    except UnusableFileError as error:
        raise RequestError(f"{file.display}: {error}") from None
    return {
        "name": name,
        "size": size,
        "modified": modified,
        "footer_sha256": footer.sha256,
        "rows": sum(footer.group_rows),
        "group_rows": footer.group_rows,
        "digit_column": _check_columns(file, footer.schema),
    }


def _check_columns(file: Location, schema: pa.Schema) -> str:
    """Refuse a file without usable columns of images and digits; the name of its digit column."""
    digit_column = next((name for name in _DIGIT_COLUMNS if name in schema.names), None)
    if "image" not in schema.names or digit_column is None:
        raise RequestError(
            f"{file.display}: needs a column 'image' and a column 'digit' or 'label', has {', '.join(schema.names)}"
        )
    for name in ("image", digit_column):
        if len(schema.get_all_field_indices(name)) > 1:
            raise RequestError(f"{file.display}: has more than one column {name!r}; rename all but one")
    type_error = image_type_error(without_views(schema.field("image").type))
    if type_error:
        raise RequestError(f"{file.display}: column 'image' {type_error}")
    digit_type = schema.field(digit_column).type
    if not pa.types.is_integer(digit_type):
        raise RequestError(f"{file.display}: column {digit_column!r} has type {digit_type}, not an integer type")
    return digit_column


def _split_of_name(file: str) -> str:
    """Split named by the file or, failing that, by its folder: train, validation or test; "" where neither does."""
    for name in reversed(file.split("/")[-2:]):
        for word in re.findall("[a-z]+", name.lower()):
            if word in _SPLITS:
                return _SPLITS[word]
    return ""
