"""Find the Parquet files of a data source, and divide their row groups into parts and their rows into splits by name."""

import re
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs

from mnistsum_ray.data import idx
from mnistsum_ray.data.column_types import image_type_error
from mnistsum_ray.data.parquet import SUFFIXES, UnusableFileError, is_data_file, open_parquet, row_groups
from mnistsum_ray.data.parquet_types import without_views
from mnistsum_ray.data.parts import PART_ROWS, ParquetPart
from mnistsum_ray.data.sampling import RowIds
from mnistsum_ray.errors import RequestError, one_line
from mnistsum_ray.storage.listing import DUPLICATE, escape_non_utf8, list_folder, relative_parts
from mnistsum_ray.storage.location import Location

_DIGIT_COLUMNS: Final = ("digit", "label")

_SPLITS: Final = {"train": "train", "training": "train", "test": "test", "testing": "test"} | dict.fromkeys(
    ("validation", "valid", "val"), "validation"
)
"""Words in the names of files and folders, in upper or lower case, that name the split of their rows."""


def read_parquet_source(
    place: Location, info: pafs.FileInfo
) -> tuple[tuple[ParquetPart, ...], dict[str, RowIds], dict[str, str]]:
    """Read the footers of a Parquet file, or of all Parquet files in a folder.

    Returns:
        The parts in the order of their row ids; split ("" where no name says one) -> row ids; path -> reason of each file that
        was skipped.

    Raises:
        RequestError: a file cannot be used, or only some files are named for a split; names the file or folder.
    """
    skipped: dict[str, str] = {}
    files = [info] if info.type == pafs.FileType.File else _list_parquet_files(place, skipped)
    parts: list[ParquetPart] = []
    row_ranges: dict[str, list[tuple[int, int]]] = {}
    total = 0
    for file in files:
        file_parts = _parts_of_file(_file_location(place, file.path), file.size)
        rows = sum(part.rows for part in file_parts)
        row_ranges.setdefault(_split_of_path(file.path, place.path), []).append((total, total + rows))
        parts += file_parts
        total += rows
    if "" in row_ranges and len(row_ranges) > 1:
        raise RequestError(
            f"--data {place.display}: some files are named train or test and some are not, so the test rows are unclear"
        )
    row_ids = {split: np.concatenate([np.arange(*rows) for rows in ranges]) for split, ranges in row_ranges.items()}
    return tuple(parts), row_ids, skipped


def _list_parquet_files(place: Location, skipped: dict[str, str]) -> list[pafs.FileInfo]:
    """The Parquet files of a folder, sorted by path. Adds to `skipped` the path and reason of every other file."""
    listing = list_folder(place).filter(lambda path: is_data_file(relative_parts(path, place.path) or ("",)))
    duplicates = set(listing.duplicates())
    skipped |= listing.skipped | dict.fromkeys(duplicates, DUPLICATE)
    infos = listing.file_infos(place)
    files = sorted(path for path in listing.files if path not in duplicates)
    not_utf8 = next((path for path in files if path not in infos), None)
    if not_utf8 is not None:
        raise RequestError(f"--data {escape_non_utf8(not_utf8)}: its name is not UTF-8; rename it")
    if not files:
        raise RequestError(
            f"--data {place.display}: holds neither IDX files ({idx.FILES[0]}, …) on a local disk nor Parquet files "
            f"({', '.join(SUFFIXES)})"
        )
    return [infos[path] for path in files]


def _file_location(place: Location, path: str) -> Location:
    relative = path.removeprefix(place.path).lstrip("/")
    return place / relative if relative else place


def _parts_of_file(file: Location, size: int) -> list[ParquetPart]:
    """The parts of a file with at least one row, by its footer: row groups are put together up to PART_ROWS."""
    try:
        with file.filesystem.open_input_file(file.path) as stream:
            parquet = open_parquet(stream)
            schema = parquet.schema_arrow
            group_rows, _ = row_groups(parquet.metadata, size)
    except UnusableFileError as error:
        raise RequestError(f"{file.display}: {error}") from None
    except (OSError, pa.ArrowException, ValueError) as error:  # ValueError: one of Ray's types with damaged metadata
        raise RequestError(f"{file.display}: is not a whole Parquet file: {one_line(error)}") from None
    digit_column = _check_columns(file, schema)
    parts, groups, rows, first_row = [], list[int](), 0, 0
    for group, rows_of_group in enumerate(group_rows):
        groups.append(group)
        rows += rows_of_group
        if rows >= PART_ROWS or group == len(group_rows) - 1:
            parts.append(ParquetPart(file, tuple(groups), first_row, rows, digit_column))
            groups, rows, first_row = [], 0, first_row + rows
    return [part for part in parts if part.rows]


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


def _split_of_path(path: str, root: str) -> str:
    """Split named by the file or, failing that, by its folder below `root`: train, validation or test; "" where neither does."""
    below = path.removeprefix(root).strip("/") or path.rpartition("/")[2]
    for name in reversed(below.split("/")[-2:]):
        for word in re.findall("[a-z]+", name.lower()):
            if word in _SPLITS:
                return _SPLITS[word]
    return ""
