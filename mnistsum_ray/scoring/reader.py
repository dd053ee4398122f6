"""Read and decode parts: images, numbers and labels of the good rows, and a reason for each bad row or bad file."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mnistsum_ray.data.images import SIDE, Pixels, decode_images, decode_numbers, join_reasons, one_chunk
from mnistsum_ray.data.parquet import check_int96, check_unchanged, int96_columns, open_parquet, plain_table, read_rows
from mnistsum_ray.errors import StorageError, UnusableFileError
from mnistsum_ray.scoring.footers import Columns
from mnistsum_ray.scoring.parts import Part
from mnistsum_ray.storage.location import Backoff, Location

_BATCH_ROWS: Final = 2048
"""Small parts are batched up to this number of rows: a forward pass on ten rows wastes most of its time."""


@dataclass(frozen=True)
class DecodedPart:
    """The rows of one part: n good rows, which can be scored, and the rejected rows."""

    part: Part
    passthrough: pa.Table
    """The good rows with every input column but the image."""
    images: Pixels
    """uint8[n, 28, 28]"""
    numbers: npt.NDArray[np.int64]
    """int64[n], 0..9"""
    labels: npt.NDArray[np.int64] | None
    """int64[n], the true digit, -1 where it is unknown; None without a label column."""
    rejected: pa.Table
    """The rejected rows with every input column."""
    reasons: dict[int, str]
    """Why each rejected row cannot be scored, by its index in the part, in ascending order."""


@dataclass(frozen=True)
class UnreadablePart:
    """A part that cannot be read although the footer of its file could."""

    part: Part
    reason: str


@dataclass(frozen=True)
class BatchRows:
    """The good rows of several parts, one after the other."""

    images: Pixels
    """uint8[n, 28, 28]"""
    numbers: npt.NDArray[np.int64]
    """int64[n], 0..9"""
    labels: npt.NDArray[np.int64] | None
    """int64[n], -1 where unknown; None without a label column."""

    @classmethod
    def of(cls, parts: Sequence[DecodedPart | UnreadablePart]) -> "BatchRows":
        """The rows of the readable parts."""
        decoded = [part for part in parts if isinstance(part, DecodedPart)]
        if len(decoded) == 1:
            return cls(decoded[0].images, decoded[0].numbers, decoded[0].labels)
        labels = [part.labels for part in decoded if part.labels is not None]
        return cls(
            np.concatenate([np.empty((0, SIDE, SIDE), np.uint8), *(part.images for part in decoded)]),
            np.concatenate([np.empty(0, np.int64), *(part.numbers for part in decoded)]),
            np.concatenate(labels) if labels else None,
        )


def read_batches(folder: Location, parts: list[Part], columns: Columns) -> Iterator[list[DecodedPart | UnreadablePart]]:
    """Read parts in their order and yield them in lists of at least _BATCH_ROWS rows together; the last may have fewer.

    Raises:
        StorageError: see `read_parts`.
    """
    batch: list[DecodedPart | UnreadablePart] = []
    rows = 0
    for part in read_parts(folder, parts, columns):
        batch.append(part)
        rows += part.part.rows
        if rows >= _BATCH_ROWS:
            yield batch
            batch, rows = [], 0
    if batch:
        yield batch


def read_parts(folder: Location, parts: list[Part], columns: Columns) -> Iterator[DecodedPart | UnreadablePart]:
    """Read and decode parts in their order. Consecutive slices of one row group are read in one pass.

    Raises:
        StorageError: the storage does not give a file, for half a minute.
    """
    start, backoff = 0, Backoff()
    while start < len(parts):
        end = start + 1
        while end < len(parts) and _continues(parts[end - 1], parts[end]):
            end += 1
        try:
            for part in _read_slices(folder, parts[start:end], columns):
                yield part
                start, backoff = start + 1, Backoff()
        except UnusableFileError as error:
            yield from (UnreadablePart(part, str(error)) for part in parts[start:end])
            start = end
        except StorageError:
            if not backoff.pause():
                raise


def decode_part(part: Part, table: pa.Table, columns: Columns) -> DecodedPart:
    """Decode the rows of a part; `table` has them with every input column.

    Raises:
        UnusableFileError: the file has fewer rows there than its footer says.
    """
    if table.num_rows != part.rows:
        raise UnusableFileError(
            f"has {table.num_rows:,} rows from row {part.first_row:,} on, where its footer says {part.rows:,}"
        )
    images, bad_images = decode_images(one_chunk(table[columns.image]))
    numbers, bad_numbers = decode_numbers(one_chunk(table[columns.number]))
    labels = None
    if columns.label:
        labels, bad_labels = decode_numbers(one_chunk(table[columns.label]))
        labels[list(bad_labels)] = -1
    passthrough = table.drop_columns([columns.image])
    if not bad_images and not bad_numbers:
        return DecodedPart(part, passthrough, images, numbers, labels, table.slice(0, 0), {})
    reasons = join_reasons(bad_images, bad_numbers)
    bad = np.fromiter(reasons, np.int64)
    good = np.setdiff1d(np.arange(part.rows), bad)
    return DecodedPart(
        part,
        passthrough.take(pa.array(good)),
        images[good],
        numbers[good],
        None if labels is None else labels[good],
        table.take(pa.array(bad)),
        reasons,
    )


def _continues(part: Part, following: Part) -> bool:
    """Return whether two parts are consecutive slices of one row group."""
    return (
        part.name == following.name
        and part.first_group == following.first_group
        and part.num_groups == following.num_groups == 1
        and part.first_row + part.rows == following.first_row
    )


def _read_slices(folder: Location, parts: list[Part], columns: Columns) -> Iterator[DecodedPart]:
    """Read one part, or consecutive slices of one row group."""
    first = parts[0]
    path = folder / first.name
    check_unchanged(path, first.size, first.modified)
    groups = list(range(first.first_group, first.first_group + first.num_groups))
    with open_parquet(path) as file:
        timestamps = int96_columns(file.schema)
        if timestamps:
            with open_parquet(path, coerce_int96_timestamp_unit="us") as in_microseconds:
                check_int96(in_microseconds, timestamps, groups)
        group_rows = sum(file.metadata.row_group(group).num_rows for group in groups)
        if len(parts) == 1 and not first.skip_rows and group_rows == first.rows:
            yield decode_part(first, plain_table(file.read_row_groups(groups, use_threads=False)), columns)
            return
        batches = read_rows(file, np.arange(first.first_row, parts[-1].first_row + parts[-1].rows))
        pending: list[pa.RecordBatch] = []
        for part in parts:  # only the batches of the current part are in memory
            while sum(batch.num_rows for batch in pending) < part.rows:
                pending.append(next(batches))
            table = pa.Table.from_batches(pending)
            yield decode_part(part, plain_table(table.slice(0, part.rows)), columns)
            pending = table.slice(part.rows).to_batches()
