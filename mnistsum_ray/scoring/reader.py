"""From parts of files to rows that are ready for the model, with the reason for each that is not."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from mnistsum_ray.data.arrow_types import plain_arrow_types
from mnistsum_ray.data.decoding import Pixels, decode_images, decode_numbers, one_chunk
from mnistsum_ray.data.parquet import UnusableFileError, check_int96, int96_columns, open_parquet, table_without_views
from mnistsum_ray.errors import one_line
from mnistsum_ray.scoring.footers import Columns
from mnistsum_ray.scoring.plan import Part
from mnistsum_ray.storage.location import Location

_TOGETHER_ROWS: Final = 2048
"""Small parts go through the model together from so many rows on: a forward pass on ten rows wastes most of itself."""


@dataclass(frozen=True)
class DecodedPart:
    """The rows of one part: n that can be scored, and the others."""

    part: Part
    kept: pa.Table
    """Of the n rows, every column of the input but the image."""
    images: Pixels
    """uint8[n, 28, 28]"""
    numbers: npt.NDArray[np.int64]
    """int64[n], 0..9"""
    labels: npt.NDArray[np.int64] | None
    """int64[n], the true digit, -1 where it is not known; None where no column was named."""
    rejected: pa.Table
    """Of the other rows, every column of the input."""
    reasons: dict[int, str]
    """Place in the part, from 0, and reason of each of these."""

    def without_images(self) -> "DecodedPart":
        """The same for whoever only writes."""
        return replace(self, images=self.images[:0])


@dataclass(frozen=True)
class UnreadablePart:
    """A part that cannot be read, although the footer of its file could."""

    part: Part
    reason: str


def read_together(folder: Location, parts: list[Part], columns: Columns) -> Iterator[list[DecodedPart | UnreadablePart]]:
    """Read parts in their order, several at a time where they are small."""
    together: list[DecodedPart | UnreadablePart] = []
    rows = 0
    for read in read_parts(folder, parts, columns):
        together.append(read)
        rows += read.part.rows
        if rows >= _TOGETHER_ROWS:
            yield together
            together, rows = [], 0
    if together:
        yield together


def read_parts(folder: Location, parts: list[Part], columns: Columns) -> Iterator[DecodedPart | UnreadablePart]:
    """Read and decode parts in their order; slices of one row group that follow each other are read in one pass."""
    plain_arrow_types()
    start = 0
    while start < len(parts):
        end = start + 1
        while end < len(parts) and _same_group(parts[end - 1], parts[end]):
            end += 1
        run, done = parts[start:end], 0
        try:
            for part, table in _tables(folder, run):
                yield _decode(part, table, columns)
                done += 1
        except Exception as error:  # whatever one file leads to, it must not end the run
            reason = one_line(error)
            reason = reason if isinstance(error, UnusableFileError) else f"cannot be read: {reason} ({type(error).__name__})"
            yield from (UnreadablePart(part, reason) for part in run[done:])
        start = end


def _same_group(one: Part, other: Part) -> bool:
    return (
        one.name == other.name
        and one.first_group == other.first_group
        and one.groups == other.groups == 1
        and one.first_row + one.rows == other.first_row
    )


def _tables(folder: Location, run: list[Part]) -> Iterator[tuple[Part, pa.Table]]:
    first = run[0]
    path = f"{folder.path}/{first.name}"
    info = folder.filesystem.get_file_info(path)
    if info.type == pafs.FileType.NotFound:
        raise UnusableFileError(
            "is not there any more, or not on this node; a local path must be on storage that all nodes share"
        )
    if (info.size, folder.modified(info)) != (first.size, first.modified):
        raise UnusableFileError("has changed since it was listed; run the command again")
    with folder.filesystem.open_input_file(path) as stream:
        file = open_parquet(stream)
        groups = list(range(first.first_group, first.first_group + first.groups))
        timestamps = int96_columns(file.schema)
        if timestamps:
            with folder.filesystem.open_input_file(path) as again:
                check_int96(again, timestamps, groups)
        if len(run) == 1 and not first.skip and _rows_in(file, groups) == first.rows:
            yield first, table_without_views(file.read_row_groups(groups, use_threads=False))
            return
        # Only as much of a large row group is in memory as is worked on.
        batches = file.iter_batches(batch_size=_TOGETHER_ROWS, row_groups=groups, use_threads=False)
        position = first.first_row - first.skip
        pending: list[pa.RecordBatch] = []
        for part in run:
            while position < part.first_row + part.rows:
                batch = next(batches, None)
                if batch is None:
                    raise UnusableFileError(f"ends after {position:,} rows, where its footer promises more; write it anew")
                position += batch.num_rows
                if position > part.first_row:
                    pending.append(batch)
            table = pa.Table.from_batches(pending)
            table = table.slice(table.num_rows - (position - part.first_row), part.rows)
            yield part, table_without_views(table)
            pending = pending[-1:]  # its end belongs to the next part


def _rows_in(file: pq.ParquetFile, groups: list[int]) -> int:
    return sum(file.metadata.row_group(group).num_rows for group in groups)


def _decode(part: Part, table: pa.Table, columns: Columns) -> DecodedPart:
    if table.num_rows != part.rows:
        raise UnusableFileError(
            f"has {table.num_rows:,} rows from row {part.first_row:,} on, where its footer says {part.rows:,}"
        )
    images, bad_images = decode_images(one_chunk(table[columns.image]))
    numbers, bad_numbers = decode_numbers(one_chunk(table[columns.number]))
    labels = None
    if columns.label:
        labels, unlabelled = decode_numbers(one_chunk(table[columns.label]))
        labels[list(unlabelled)] = -1
    kept = table.drop_columns([columns.image])
    if not bad_images and not bad_numbers:
        return DecodedPart(part, kept, images, numbers, labels, table.slice(0, 0), {})
    reasons = {row: _both(bad_images.get(row), bad_numbers.get(row)) for row in sorted(bad_images | bad_numbers)}
    bad = np.fromiter(reasons, np.int64)
    good = np.setdiff1d(np.arange(part.rows), bad)
    return DecodedPart(
        part,
        kept.take(pa.array(good)),
        images[good],
        numbers[good],
        None if labels is None else labels[good],
        table.take(pa.array(bad)),
        reasons,
    )


def _both(image: str | None, number: str | None) -> str:
    return "; ".join(([image] if image else []) + ([f"the number {number}"] if number else []))
