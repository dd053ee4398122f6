"""Read parts: the rows of each from its Parquet file, decoded, or the reason why they cannot be read."""

from collections.abc import Iterator
from typing import Final

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from mnistsum_ray.data.parquet import UnusableFileError, open_parquet
from mnistsum_ray.data.parquet_types import check_int96, int96_columns, plain_table
from mnistsum_ray.errors import one_line
from mnistsum_ray.scoring.decode import DecodedPart, UnreadablePart, decode_part
from mnistsum_ray.scoring.input_columns import Columns
from mnistsum_ray.scoring.parts import Part
from mnistsum_ray.storage.location import Location

_BATCH_ROWS: Final = 2048
"""Small parts are batched up to this number of rows: a forward pass on ten rows wastes most of its time."""


def read_batches(folder: Location, parts: list[Part], columns: Columns) -> Iterator[list[DecodedPart | UnreadablePart]]:
    """Read parts in their order and yield them in lists of at least _BATCH_ROWS rows together; the last may have fewer."""
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
    """Read and decode parts in their order. Consecutive slices of one row group are read in one pass."""
    start = 0
    while start < len(parts):
        end = start + 1
        while end < len(parts) and _continues(parts[end - 1], parts[end]):
            end += 1
        done = 0
        try:
            for part, table in _read_tables(folder, parts[start:end]):
                yield decode_part(part, table, columns)
                done += 1
        except Exception as error:  # Arrow and Pillow raise many types for damaged bytes, and one bad file must not end the run.
            reason = one_line(error)
            reason = reason if isinstance(error, UnusableFileError) else f"cannot be read: {reason} ({type(error).__name__})"
            yield from (UnreadablePart(part, reason) for part in parts[start + done : end])
        start = end


def _continues(part: Part, following: Part) -> bool:
    """Return whether two parts are consecutive slices of one row group."""
    return (
        part.name == following.name
        and part.first_group == following.first_group
        and part.num_groups == following.num_groups == 1
        and part.first_row + part.rows == following.first_row
    )


def _read_tables(folder: Location, parts: list[Part]) -> Iterator[tuple[Part, pa.Table]]:
    """Yield the rows of one part, or of consecutive slices of one row group."""
    first = parts[0]
    path = f"{folder.path}/{first.name}"
    _check_unchanged(folder, path, first)
    with folder.filesystem.open_input_file(path) as stream:
        file = open_parquet(stream)
        groups = list(range(first.first_group, first.first_group + first.num_groups))
        timestamps = int96_columns(file.schema)
        if timestamps:
            with folder.filesystem.open_input_file(path) as second_stream:
                check_int96(second_stream, timestamps, groups)
        group_rows = sum(file.metadata.row_group(group).num_rows for group in groups)
        if len(parts) == 1 and not first.skip_rows and group_rows == first.rows:
            yield first, plain_table(file.read_row_groups(groups, use_threads=False))
        else:
            yield from _slice_groups(file, groups, parts)


def _check_unchanged(folder: Location, path: str, part: Part) -> None:
    info = folder.filesystem.get_file_info(path)
    if info.type == pafs.FileType.NotFound:
        raise UnusableFileError(
            "is not there any more, or not on this node; a local path must be on storage that all nodes share"
        )
    if (info.size, folder.modified(info)) != (part.size, part.modified):
        raise UnusableFileError("has changed since it was listed; run the command again")


def _slice_groups(file: pq.ParquetFile, groups: list[int], parts: list[Part]) -> Iterator[tuple[Part, pa.Table]]:
    """Cut consecutive parts out of their row groups. Only the batches of the current part are in memory."""
    batches = file.iter_batches(batch_size=_BATCH_ROWS, row_groups=groups, use_threads=False)
    position = parts[0].first_row - parts[0].skip_rows  # row of the file after the batches that were read
    pending: list[pa.RecordBatch] = []
    for part in parts:
        while position < part.first_row + part.rows:
            batch = next(batches, None)
            if batch is None:
                raise UnusableFileError(f"ends after {position:,} rows, where its footer promises more; write it again")
            position += batch.num_rows
            if position > part.first_row:
                pending.append(batch)
        table = pa.Table.from_batches(pending)
        yield part, plain_table(table.slice(table.num_rows - (position - part.first_row), part.rows))
        pending = pending[-1:]  # the end of the last batch belongs to the next part
