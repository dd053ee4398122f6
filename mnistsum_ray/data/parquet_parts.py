"""TODO data.parquet_parts"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs

from mnistsum_ray.data import idx
from mnistsum_ray.data.decoding import Pixels, decode_images, image_form_error, one_chunk, pixels_array
from mnistsum_ray.data.parquet import (
    SUFFIXES,
    UnusableFileError,
    is_data_file,
    open_parquet,
    row_groups,
    table_without_views,
    without_views,
)
from mnistsum_ray.errors import RequestError, one_line
from mnistsum_ray.storage.listing import DUPLICATE, in_utf8, list_folder, parts_below
from mnistsum_ray.storage.location import Location

DIGIT_COLUMNS: Final = ("digit", "label")
BLOCK_ROWS: Final = 8192

_SPLITS: Final = {"train": "train", "training": "train", "test": "test", "testing": "test"} | dict.fromkeys(
    ("validation", "valid", "val"), "validation"
)
"""Words in names of files and folders, in any case, that say which split their rows belong to."""


@dataclass(frozen=True)
class ParquetPart:
    """Some row groups of one Parquet file."""

    location: Location
    row_groups: tuple[int, ...]
    first_row: int
    """The place in the file of the part's first row, for messages."""
    rows: int
    digit_column: str

    def read(self) -> pa.Table:
        """Read and decode: columns `image` (784 bytes) and `digit` int8.

        Raises:
            RequestError: a row is not a 28x28 image with a digit 0..9; names the file and the row.
        """
        where = self.location.display
        try:
            with self.location.filesystem.open_input_file(self.location.path) as stream:
                file = open_parquet(stream)
                table = table_without_views(file.read_row_groups(list(self.row_groups), columns=["image", self.digit_column]))
        except (OSError, pa.ArrowException, ValueError) as error:  # the last from an extension type of Ray with wrong metadata
            raise RequestError(f"{where}: cannot be read: {one_line(error)}") from None
        if table.num_rows != self.rows:
            raise RequestError(f"{where}: has {table.num_rows} rows where its footer says {self.rows}")
        images, bad = decode_images(one_chunk(table["image"]))
        for row, reason in sorted(bad.items()):
            raise RequestError(f"{where}: row {self.first_row + row}: {reason}")
        digits = one_chunk(table[self.digit_column])
        return image_table(images, check_digits(digits, where, self.first_row))


def read_whole(part: pa.Table | ParquetPart) -> pa.Table:
    """A part of a source with its columns `image` and `digit`; see `ParquetPart.read`."""
    return part.read() if isinstance(part, ParquetPart) else part


def list_parquet_files(place: Location, skipped: dict[str, str]) -> list[pafs.FileInfo]:
    """The Parquet files of a folder, sorted by path; `skipped` gets the other files."""
    listing = list_folder(place).keep(lambda path: is_data_file(parts_below(path, place.path) or ("",)))
    second = set(listing.second_names())
    skipped |= listing.skipped | dict.fromkeys(second, DUPLICATE)
    infos = listing.file_infos(place)
    files = sorted(path for path in listing.files if path not in second)
    unnamed = next((path for path in files if path not in infos), None)
    if unnamed is not None:
        raise RequestError(f"--data {in_utf8(unnamed)}: its name is not UTF-8; rename it")
    if not files:
        raise RequestError(
            f"--data {place.display}: holds neither IDX files ({idx.FILES[0]}, …) on a local disk nor Parquet files "
            f"({', '.join(SUFFIXES)})"
        )
    return [infos[path] for path in files]


def file_location(place: Location, path: str) -> Location:
    relative = path.removeprefix(place.path).lstrip("/")
    return place / relative if relative else place


def parts_of_file(file: Location, size: int) -> list[ParquetPart]:
    try:
        with file.filesystem.open_input_file(file.path) as stream:
            parquet = open_parquet(stream)
            columns = parquet.schema_arrow
            sizes, _ = row_groups(parquet.metadata, size)
    except UnusableFileError as bad:
        raise RequestError(f"{file.display}: {bad}") from None
    except (OSError, pa.ArrowException, ValueError) as error:  # the last from an extension type of Ray whose metadata are wrong
        raise RequestError(f"{file.display}: is not a whole Parquet file: {one_line(error)}") from None
    digit_column = next((name for name in DIGIT_COLUMNS if name in columns.names), None)
    if "image" not in columns.names or digit_column is None:
        raise RequestError(
            f"{file.display}: needs a column 'image' and a column 'digit' or 'label', has {', '.join(columns.names)}"
        )
    for name in ("image", digit_column):
        if len(columns.get_all_field_indices(name)) > 1:
            raise RequestError(f"{file.display}: has more than one column {name!r}; rename all but one")
    form_error = image_form_error(without_views(columns.field("image").type))
    if form_error:
        raise RequestError(f"{file.display}: column 'image' {form_error}")
    if not pa.types.is_integer(columns.field(digit_column).type):
        raise RequestError(
            f"{file.display}: column {digit_column!r} has type {columns.field(digit_column).type}, not an integer type"
        )
    parts, groups, rows, first = [], list[int](), 0, 0
    for group, size_of_group in enumerate(sizes):
        groups.append(group)
        rows += size_of_group
        if rows >= BLOCK_ROWS or group == len(sizes) - 1:
            parts.append(ParquetPart(file, tuple(groups), first, rows, digit_column))
            groups, rows, first = [], 0, first + rows
    return [part for part in parts if part.rows]


def split_of_path(path: str, root: str) -> str:
    """train, validation, test, or "" where no word of the file's name nor of its folder's, below the root, tells."""
    below = path.removeprefix(root).strip("/") or path.rpartition("/")[2]
    for name in reversed(below.split("/")[-2:]):
        for word in re.findall("[a-z]+", name.lower()):
            if word in _SPLITS:
                return _SPLITS[word]
    return ""


def image_table(images: Pixels, digits: np.ndarray) -> pa.Table:
    return pa.table({"image": pixels_array(images), "digit": pa.array(digits, pa.int8())})


def check_digits(digits: pa.Array, where: str, first_row: int) -> np.ndarray:
    values: Iterable[int | None] = digits.to_pylist() if digits.null_count else digits.to_numpy(zero_copy_only=False)
    for row, digit in enumerate(values):
        if digit is None or not 0 <= digit <= 9:
            raise RequestError(f"{where}: row {first_row + row}: the digit is {'null' if digit is None else digit}, not 0..9")
    return np.asarray(values, np.int8)
