"""Where images come from: full MNIST, an IDX folder, Parquet files, or the bundled sample; which rows are held out.

A source is a list of parts in the order of their row ids. Small sources are read here, whole; Parquet files stay where
they are and are described by their footers, for Ray Data to read. Nothing of Ray.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from mnistsum_ray import idx
from mnistsum_ray.errors import Refusal, one_line
from mnistsum_ray.listing import LISTED_ANYWAY, in_utf8, list_folder, parts_below
from mnistsum_ray.pairs import Rows, held_out
from mnistsum_ray.parquet import SUFFIXES, BadFile, is_data_file, open_parquet, row_groups, table_without_views, without_views
from mnistsum_ray.schema import Pixels, decode_images, image_form_error, one_chunk, pixels_array
from mnistsum_ray.storage import Location, locate

SAMPLE: Final = Path(__file__).parent / "sample" / "mnist_5k.parquet"
DIGIT_COLUMNS: Final = ("digit", "label")
_BLOCK_ROWS: Final = 8192

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
            Refusal: a row is not a 28x28 image with a digit 0..9; names the file and the row.
        """
        where = self.location.text
        try:
            with self.location.filesystem.open_input_file(self.location.path) as stream:
                file = open_parquet(stream)
                table = table_without_views(file.read_row_groups(list(self.row_groups), columns=["image", self.digit_column]))
        except (OSError, pa.ArrowException, ValueError) as error:  # the last from an extension type of Ray with wrong metadata
            raise Refusal(f"{where}: cannot be read: {one_line(error)}") from None
        if table.num_rows != self.rows:
            raise Refusal(f"{where}: has {table.num_rows} rows where its footer says {self.rows}")
        images, bad = decode_images(one_chunk(table["image"]))
        for row, reason in sorted(bad.items()):
            raise Refusal(f"{where}: row {self.first_row + row}: {reason}")
        digits = one_chunk(table[self.digit_column])
        return _table(images, _checked_digits(digits, where, self.first_row))


def read_whole(part: pa.Table | ParquetPart) -> pa.Table:
    """A part of a source with its columns `image` and `digit`; see `ParquetPart.read`."""
    return part.read() if isinstance(part, ParquetPart) else part


@dataclass(frozen=True)
class Source:
    """Images with digits, numbered by row id in the order of `parts`, and the ids of each split: disjoint, together all."""

    name: str
    location: str
    parts: tuple[pa.Table | ParquetPart, ...]
    train: Rows
    validation: Rows
    test: Rows
    notice: str = ""
    """What a person must be told about the choice of source."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Path and reason of files in the folder that are not taken."""

    @property
    def rows(self) -> int:
        """Of all splits together."""
        return len(self.train) + len(self.validation) + len(self.test)


def open_source(data: str) -> Source:
    """Find what `--data` names.

    Raises:
        Refusal: it is not there, cannot be read, or is not images with digits; one line that names the file.
    """
    if data == "sample":
        return _sample()
    if data in ("auto", "mnist"):
        return _full_mnist(fall_back=data == "auto")
    place = locate(data, "--data")
    try:
        info = place.info()
        if info.type == pafs.FileType.NotFound:
            raise Refusal(f"--data {place.text}: there is no such file or folder")
        if isinstance(place.filesystem, pafs.LocalFileSystem) and info.type == pafs.FileType.Directory:
            folder = idx.find(Path(place.path))
            if folder:
                return _idx(folder)
        return _parquet(place.patient(), info)
    except OSError as error:
        raise Refusal(f"--data {place.text}: {one_line(error)}") from None


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
            raise Refusal(
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
        raise Refusal(f"--data mnist: the download left no MNIST in {cache}")
    return _idx(folder)


def _idx(folder: Path) -> Source:
    images, digits, test_rows = idx.read(folder)
    _checked_digits(pa.array(digits), str(folder), 0)
    return _in_memory("mnist", str(folder), images, digits.astype(np.int8), test_rows=test_rows)


def _parquet(place: Location, info: pafs.FileInfo) -> Source:
    left_out: dict[str, str] = {}
    files = [info] if info.type == pafs.FileType.File else _parquet_files(place, left_out)
    parts: list[ParquetPart] = []
    counts: dict[str, list[tuple[int, int]]] = {}
    total = 0
    for file in files:
        of_file = _parts_of_file(_same_store(place, file.path), file.size)
        rows = sum(part.rows for part in of_file)
        counts.setdefault(_split_name(file.path, place.path), []).append((total, total + rows))
        parts += of_file
        total += rows
    ids = {split: np.concatenate([np.arange(*span) for span in spans]) for split, spans in counts.items()}
    if "" in ids and len(ids) > 1:
        raise Refusal(f"--data {place.text}: some files are named train or test and some are not, so the test rows are unclear")
    source = _with_splits(
        "parquet", place.text, tuple(parts), ids.get("train", ids.get("")), ids.get("validation"), ids.get("test")
    )
    return replace(source, left_out=left_out)


def _parquet_files(place: Location, left_out: dict[str, str]) -> list[pafs.FileInfo]:
    """The Parquet files of a folder, sorted by path; `left_out` gets the other files."""
    listing = list_folder(place).keep(lambda path: is_data_file(parts_below(path, place.path) or ("",)))
    second = set(listing.second_names())
    left_out |= listing.left_out | dict.fromkeys(second, LISTED_ANYWAY)
    infos = listing.file_infos(place)
    files = sorted(path for path in listing.files if path not in second)
    unnamed = next((path for path in files if path not in infos), None)
    if unnamed is not None:
        raise Refusal(f"--data {in_utf8(unnamed)}: its name is not UTF-8; rename it")
    if not files:
        raise Refusal(
            f"--data {place.text}: holds neither IDX files ({idx.FILES[0]}, …) on a local disk nor Parquet files "
            f"({', '.join(SUFFIXES)})"
        )
    return [infos[path] for path in files]


def _same_store(place: Location, path: str) -> Location:
    relative = path.removeprefix(place.path).lstrip("/")
    return place / relative if relative else place


def _parts_of_file(file: Location, size: int) -> list[ParquetPart]:
    try:
        with file.filesystem.open_input_file(file.path) as stream:
            parquet = open_parquet(stream)
            columns = parquet.schema_arrow
            sizes, _ = row_groups(parquet.metadata, size)
    except BadFile as bad:
        raise Refusal(f"{file.text}: {bad}") from None
    except (OSError, pa.ArrowException, ValueError) as error:  # the last from an extension type of Ray whose metadata are wrong
        raise Refusal(f"{file.text}: is not a whole Parquet file: {one_line(error)}") from None
    digit_column = next((name for name in DIGIT_COLUMNS if name in columns.names), None)
    if "image" not in columns.names or digit_column is None:
        raise Refusal(f"{file.text}: needs a column 'image' and a column 'digit' or 'label', has {', '.join(columns.names)}")
    for name in ("image", digit_column):
        if len(columns.get_all_field_indices(name)) > 1:
            raise Refusal(f"{file.text}: has more than one column {name!r}; rename all but one")
    form_error = image_form_error(without_views(columns.field("image").type))
    if form_error:
        raise Refusal(f"{file.text}: column 'image' {form_error}")
    if not pa.types.is_integer(columns.field(digit_column).type):
        raise Refusal(f"{file.text}: column {digit_column!r} has type {columns.field(digit_column).type}, not an integer type")
    parts, groups, rows, first = [], list[int](), 0, 0
    for group, size_of_group in enumerate(sizes):
        groups.append(group)
        rows += size_of_group
        if rows >= _BLOCK_ROWS or group == len(sizes) - 1:
            parts.append(ParquetPart(file, tuple(groups), first, rows, digit_column))
            groups, rows, first = [], 0, first + rows
    return [part for part in parts if part.rows]


def _split_name(path: str, root: str) -> str:
    """train, validation, test, or "" where no word of the file's name nor of its folder's, below the root, tells."""
    below = path.removeprefix(root).strip("/") or path.rpartition("/")[2]
    for name in reversed(below.split("/")[-2:]):
        for word in re.findall("[a-z]+", name.lower()):
            if word in _SPLITS:
                return _SPLITS[word]
    return ""


def _in_memory(name: str, location: str, images: Pixels, digits: np.ndarray, *, test_rows: int | None) -> Source:
    """A source that is held in memory; its last `test_rows` rows are the test rows (None: hold some out)."""
    parts = tuple(
        _table(images[start : start + _BLOCK_ROWS], digits[start : start + _BLOCK_ROWS])
        for start in range(0, len(images), _BLOCK_ROWS)
    )
    ids = np.arange(len(images))
    if test_rows is None:
        return _with_splits(name, location, parts, ids, None, None)
    return _with_splits(name, location, parts, ids[: len(ids) - test_rows], None, ids[len(ids) - test_rows :])


def _with_splits(
    name: str,
    location: str,
    parts: tuple[pa.Table | ParquetPart, ...],
    train: Rows | None,
    validation: Rows | None,
    test: Rows | None,
) -> Source:
    """Hold out of the training rows what the source does not itself set apart: a tenth, at most 5,000 rows each."""
    if train is None or len(train) < 10:
        raise Refusal(f"--data {location}: has {0 if train is None else len(train)} training rows; at least 10 are needed")
    portion = min(5000, len(train) // 10)
    if test is None:
        train, test = held_out(train, portion)
    if validation is None:
        train, validation = held_out(train, portion)
    if not len(validation) or not len(test):
        raise Refusal(f"--data {location}: its validation or test files have no rows")
    return Source(name, location, parts, train, validation, test)


def _table(images: Pixels, digits: np.ndarray) -> pa.Table:
    return pa.table({"image": pixels_array(images), "digit": pa.array(digits, pa.int8())})


def _checked_digits(digits: pa.Array, where: str, first_row: int) -> np.ndarray:
    values: Iterable[int | None] = digits.to_pylist() if digits.null_count else digits.to_numpy(zero_copy_only=False)
    for row, digit in enumerate(values):
        if digit is None or not 0 <= digit <= 9:
            raise Refusal(f"{where}: row {first_row + row}: the digit is {'null' if digit is None else digit}, not 0..9")
    return np.asarray(values, np.int8)
