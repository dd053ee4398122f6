"""Find the Parquet files of a data source, read their footers, and divide their rows into splits by the names of the files."""

import hashlib
import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs

from mnistsum_ray.data import idx
from mnistsum_ray.data.column_types import image_type_error
from mnistsum_ray.data.parquet import SUFFIXES, UnusableFileError, is_data_file, parse_footer, read_footer, row_groups
from mnistsum_ray.data.parquet_files import FILE_SCHEMA, ParquetFiles
from mnistsum_ray.data.parquet_types import without_views
from mnistsum_ray.data.row_ranges import RowRanges
from mnistsum_ray.errors import RequestError, StorageError
from mnistsum_ray.storage.listing import DUPLICATE, duplicate_paths, escape_non_utf8, list_folder
from mnistsum_ray.storage.location import Backoff, Location, is_utf8

_DIGIT_COLUMNS: Final = ("digit", "label")

_THREADS: Final = 32

_SPLITS: Final = {"train": "train", "training": "train", "test": "test", "testing": "test"} | dict.fromkeys(
    ("validation", "valid", "val"), "validation"
)
"""Words in the names of files and folders, in upper or lower case, that name the split of their rows."""


def read_parquet_source(place: Location, info: pafs.FileInfo) -> tuple[ParquetFiles, dict[str, RowRanges], dict[str, str]]:
    """Read the footers of a Parquet file, or of all Parquet files in a folder.

    Returns:
        The files in the order of their row ids; split ("" where no name says one) -> its rows; path -> reason of each file that
        was skipped.

    Raises:
        RequestError: a file cannot be used, or only some files are named for a split; names the file or folder.
    """
    skipped: dict[str, str] = {}
    single = info.type == pafs.FileType.File
    entries = [("", info.size, place.modified(info))] if single else _list_parquet_files(place, skipped)
    # An object store answers slowly but takes many requests at once. A local disk answers at once, and threads slow it down.
    with ThreadPoolExecutor(1 if place.is_local else _THREADS) as pool:
        files = ParquetFiles(place, pa.Table.from_pylist(list(pool.map(partial(_read_footer, place), entries)), FILE_SCHEMA))
    ends = np.cumsum(files.table["rows"].to_numpy())
    splits = np.array([_split_of_name(name or place.path.rpartition("/")[2]) for name, _, _ in entries])
    names = dict.fromkeys(splits.tolist())
    if "" in names and len(names) > 1:
        raise RequestError(
            f"--data {place.display}: some files are named train or test and some are not, so the test rows are unclear"
        )
    starts = ends - files.table["rows"].to_numpy()
    return files, {name: RowRanges.of(starts[splits == name], ends[splits == name]) for name in names}, skipped


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
            f"--data {place.display}: holds neither IDX files ({idx.FILES[0]}, …) on a local disk nor Parquet files "
            f"({', '.join(SUFFIXES)})"
        )
    return [(name_of(path), listing.files[path].size, listing.files[path].modified) for path in files]


def _read_footer(place: Location, entry: tuple[str, int, int]) -> dict[str, Any]:
    """The FILE_SCHEMA row of a file with this name, size and modification time."""
    name, size, modified = entry
    file = place / name if name else place
    backoff = Backoff()
    while True:
        try:
            footer = read_footer(file, size)
            metadata, schema = parse_footer(footer)
            group_rows, _ = row_groups(metadata, size)
            break
        except UnusableFileError as error:
            raise RequestError(f"{file.display}: {error}") from None
        except StorageError:
            if not backoff.pause():
                raise
    return {
        "name": name,
        "size": size,
        "modified": modified,
        "footer_sha256": hashlib.sha256(footer).hexdigest(),
        "rows": sum(group_rows),
        "group_rows": group_rows,
        "digit_column": _check_columns(file, schema),
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
