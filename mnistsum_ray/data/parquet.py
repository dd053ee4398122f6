"""The one place that opens Parquet files, and says whether a file or the storage fails."""

import io
import json
from base64 import b64decode
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from mnistsum_ray.errors import ConflictError, StorageError, UnusableFileError, one_line
from mnistsum_ray.storage.store import Entry, Location

_ParquetFile: TypeAlias = pq.ParquetFile  # noqa: TID251

_TAIL_BYTES: Final = 64 * 1024
"""Read from the end of a file in the first request: most footers are shorter."""

_BUFFER_BYTES: Final = 8 * 2**20
"""Read of a column in one request: a row group may be larger than the memory."""


@contextmanager
def open_parquet(file: Location, listed: Entry | None = None) -> Iterator[_ParquetFile]:
    """Open a Parquet file for the block; the file must still be as `listed`.

    Pages are checked against their CRC where they have one. INT96 is read in microseconds:
    nanoseconds do not reach the year 9999.

    StorageError: the block failed since the storage did, or for want of memory.
    UnusableFileError: it failed for any other reason.
    """
    try:
        with file.open(listed) as source:
            metadata = _read_metadata(source)
            groups = map(metadata.row_group, range(metadata.num_row_groups))
            largest = max((group.total_byte_size for group in groups), default=0)
            yield _ParquetFile(
                source,
                metadata=metadata,
                page_checksum_verification=True,
                coerce_int96_timestamp_unit="us",
                arrow_extensions_enabled=False,  # UUID and JSON are bytes and text to all readers
                buffer_size=_BUFFER_BYTES,
                # Of a small row group one request brings all columns.
                pre_buffer=not file.is_local and largest <= 4 * _BUFFER_BYTES,
            )
    except ConflictError:
        raise UnusableFileError("has changed since the run began; run the command again") from None
    except (UnusableFileError, StorageError):
        raise
    except Exception as error:
        # On damaged bytes Arrow raises many types, OSError too; the disk's own have an errno.
        # This machine's memory is no fault of the file.
        if getattr(error, "errno", None) or isinstance(error, MemoryError):
            raise file.error(error, "read") from error
        reason = f"{one_line(error)} ({type(error).__name__})"
        raise UnusableFileError(f"cannot be read: {reason}") from None


def read_footer(file: Location, listed: Entry) -> _ParquetFile:
    """Return the `metadata` and schemas of a file, and close it. Errors: see `open_parquet`."""
    if not listed.e_tag:
        raise UnusableFileError("is not a file, or is a broken link")
    with open_parquet(file, listed) as parquet:
        return parquet


def _read_metadata(stream: Any) -> pq.FileMetaData:
    """Return the footer of an open file, whose columns have the types of Parquet alone.

    The schema of Arrow types that many writers add is hidden. With that schema, Ray's type of
    pickles would come back, which runs code when a value is looked at, here or by a reader of the
    output; a null in a list of a fixed size would make the whole file unreadable; and tensors that
    Ray 2.49 to 2.54 wrote would be refused. No option of Arrow's readers leaves the schema out.
    """
    size = stream.seek(0, io.SEEK_END)
    tail_start = max(0, size - _TAIL_BYTES)
    stream.seek(tail_start)
    tail = bytes(stream.read(size - tail_start))
    # A file ends with its footer, the footer's length in four bytes, and `PAR1`.
    footer_start = size - 8 - int.from_bytes(tail[-8:-4], "little")
    if tail[-4:] != b"PAR1" or footer_start < 0:
        raise UnusableFileError("is not Parquet, or was cut off; write it again")
    if footer_start < tail_start:
        stream.seek(footer_start)
        tail = bytes(stream.read(size - footer_start))
    # Arrow looks for this key. The other name has the same length, so each offset in the footer
    # stays right. `read_metadata` takes the end of a file for a whole one.
    tail = tail.replace(b"ARROW:schema", b"arrow:schema")
    metadata = pq.read_metadata(pa.BufferReader(tail))  # noqa: TID251
    groups = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    if sum(groups) != metadata.num_rows:
        raise UnusableFileError("has a damaged footer (its rows do not add up); write it again")
    return metadata


def read_ranges(
    parquet: _ParquetFile, ranges: Sequence[range], batch_rows: int
) -> Iterator[pa.Table]:
    """Yield the rows of each range of a file, in one pass. Ranges ascend; one is in memory.

    Of a row group `batch_rows` rows are decompressed at once; reading stops after the last range.
    """
    schema = parquet.read_row_groups([]).schema
    batches = _read_batches(parquet, ranges, batch_rows)
    batch_start, batch = 0, pa.RecordBatch.from_pylist([], schema)
    for rows in ranges:
        slices = []
        next_row = rows.start
        while next_row < rows.stop:
            while batch_start + batch.num_rows <= next_row:  # also past rows that no range has
                batch_start, batch = next(batches)
            found = batch[next_row - batch_start : rows.stop - batch_start]
            slices.append(found)
            next_row += found.num_rows
        yield pa.Table.from_batches(slices, schema)


def _read_batches(
    parquet: _ParquetFile, ranges: Sequence[range], batch_rows: int
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Yield batches of the row groups that hold rows of the ranges, each with its first row."""
    group_start = 0
    for group in range(parquet.num_row_groups):
        group_stop = group_start + parquet.metadata.row_group(group).num_rows
        if any(rows.start < group_stop and group_start < rows.stop for rows in ranges):
            batch_start = group_start
            for batch in parquet.iter_batches(batch_rows, row_groups=[group], use_threads=False):
                yield batch_start, batch
                batch_start += batch.num_rows
            if batch_start != group_stop:
                raise UnusableFileError("its rows differ from its footer; write it again")
        group_start = group_stop


def to_parquet(table: pa.Table, row_group_size: int | None = None) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size)
    return sink.getvalue()


def real_schema(schema: pa.Schema) -> pa.Schema:
    """Return the schema of a file in which columns of tensors have Arrow's type for tensors."""
    fields = [field.with_type(_type_with_shape(schema, field.name)) for field in schema]
    return pa.schema(fields)


def _type_with_shape(schema: pa.Schema, name: str) -> pa.DataType:
    """Return the type of a column: Arrow's tensor type, if the file's Arrow types have one.

    No type of Ray comes back: its shape is read as JSON.
    """
    kind = schema.field(name).type
    with suppress(Exception):  # damaged ones say nothing
        data = b64decode(schema.metadata[b"arrow:schema"])
        data = data.replace(b"ARROW:extension:name", b"arrow:extension:name")
        field = pa.ipc.read_schema(pa.py_buffer(data)).field(name)
        tensor = json.loads(field.metadata[b"ARROW:extension:metadata"])
        tensor = tensor if isinstance(tensor, dict) else {"shape": tensor}  # of Ray
        order = tensor.get("permutation")
        return pa.fixed_shape_tensor(kind.value_type, tensor["shape"], permutation=order)
    return kind
