"""The one place that opens Parquet files: footers, rows, column types, and who fails, file or storage."""

import base64
import hashlib
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from mnistsum_ray.errors import ExistingFileError, StorageError, UnusableFileError, one_line
from mnistsum_ray.storage.store import Entry, Location

_MAX_ROWS: Final = 10**9
"""Most rows that a footer may claim: the plan of the whole run is computed from it."""

_TAIL_BYTES: Final = 64 * 1024
"""Read from the end of a file in the first request: most footers are shorter."""

_WHOLE_BYTES: Final = 4 * 2**20
"""Largest file that is read whole from an object store: its columns would take more requests."""

_BATCH_ROWS: Final = 8192
"""Rows that are decompressed at once."""

_ARROW_SCHEMA: Final = b"ARROW:schema"
_RAY: Final = b"ray.data."
"""How the names of Ray's Arrow types begin."""

_KEPT_TYPES: Final = {"None", "String", "Int", "Date", "Decimal", "Timestamp", "Time", "Float16", "JSON", "UUID", "Null"}
"""Parquet's logical types that pyarrow writes again as the same type."""

_ENGINE_METADATA: Final = {
    b"org.apache.spark.sql.parquet.row.metadata",
    b"parquet.avro.schema",
    b"avro.schema",
    b"iceberg.schema",
    b"huggingface",
    _ARROW_SCHEMA.lower(),  # as `_read_metadata` hides it
}
"""Entries of a file that list its columns for one engine, which would see no others."""


@contextmanager
def open_parquet(file: Location, listed: Entry | None = None) -> Iterator[pq.ParquetFile]:  # noqa: TID251
    """Open a Parquet file for the block; `listed` is what it must be still.

    Pages are checked against their CRC where they have one. INT96 is read in microseconds:
    nanoseconds do not reach the year 9999.

    Raises:
        StorageError: the block failed since the storage did, or for want of memory.
        UnusableFileError: it failed for any other reason.
    """
    with _opened(file, listed) as source:
        stream = source
        if not file.is_local and source.seek(0, io.SEEK_END) <= _WHOLE_BYTES:
            source.seek(0)
            stream = pa.BufferReader(source.read())
        yield pq.ParquetFile(  # noqa: TID251
            stream,
            metadata=_read_metadata(_footer_bytes(stream)),
            page_checksum_verification=True,
            coerce_int96_timestamp_unit="us",
        )


@contextmanager
def _opened(file: Location, listed: Entry | None) -> Iterator[Any]:
    """Open a file for the block, whose errors are raised as `open_parquet` says."""
    try:
        with file.open(listed) as source:
            yield source
    except ExistingFileError:
        raise UnusableFileError("has changed since the run began; run the command again") from None
    except (UnusableFileError, StorageError):
        raise
    except Exception as error:
        # On damaged bytes Arrow raises many types, OSError too; the disk's own has a number.
        # This machine's memory is no fault of the file.
        if getattr(error, "errno", None) or isinstance(error, MemoryError):
            raise file.error(error, "read") from error
        reason = f"{one_line(error)} ({type(error).__name__})"
        raise UnusableFileError(f"cannot be read: {reason}") from None


def read_table(file: Location) -> pa.Table:
    """A whole Parquet file as a table of plain types; errors as of `open_parquet`."""
    with open_parquet(file) as parquet:
        return plain_table(parquet.read())


@dataclass(frozen=True)
class Footer:
    """Footer of a Parquet file."""

    metadata: pq.FileMetaData
    schema: pa.Schema
    recast: dict[str, str]
    """Path -> type of each column that is written with another type than it has in the file."""
    group_rows: list[int]
    sha256: str


def read_footer(file: Location, listed: Entry) -> Footer:
    """Read the footer of a file that was listed; errors as of `open_parquet`."""
    with _opened(file, listed) as source:
        data = _footer_bytes(source)
        metadata = _read_metadata(data)
        schema = plain_schema(metadata.schema.to_arrow_schema())
        recast = _recast_columns(metadata.schema)
        rows = [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
        is_sum = sum(rows) == metadata.num_rows and min(rows, default=0) >= 0
        if not is_sum or metadata.num_rows > _MAX_ROWS:
            promise = f"{metadata.num_rows:,} rows in {listed.size:,} bytes"
            raise UnusableFileError(f"has a footer that promises {promise}; write it again")
        return Footer(metadata, schema, recast, rows, hashlib.sha256(data).hexdigest())


def _footer_bytes(stream: Any) -> bytes:
    """The footer of an open file, and the eight bytes after it."""
    stream.seek(0, io.SEEK_END)
    size = stream.tell()
    if not size:
        raise UnusableFileError("is empty (0 bytes); write it again")
    start = max(0, size - _TAIL_BYTES)
    stream.seek(start)
    tail = bytes(stream.read(size - start))
    if tail[-4:] not in (b"PAR1", b"PARE"):  # with PARE the footer is encrypted, as Arrow will say
        raise UnusableFileError("is not Parquet, or was cut off; write it again")
    length = int.from_bytes(tail[-8:-4], "little") + 8
    if length > size - 4:
        raise UnusableFileError("has a damaged footer (longer than the file); write it again")
    if length > len(tail):
        stream.seek(size - length)
        return bytes(stream.read(length))
    return tail[-length:]


def _read_metadata(footer: bytes) -> pq.FileMetaData:
    """The metadata of a footer; where Ray's Arrow types are in it, of Parquet's own types alone.

    Ray registers its types in the process, and one of them holds pickles, which run code when its
    values are looked at, here or by a reader of what is scored. The Arrow schema, which the footer
    holds in base64, names them: such a one is hidden.
    """
    name = _ARROW_SCHEMA.lower()
    hidden = pq.read_metadata(pa.BufferReader(footer.replace(_ARROW_SCHEMA, name)))  # noqa: TID251
    if footer.count(_ARROW_SCHEMA) > 1:
        return hidden
    encoded = (hidden.metadata or {}).get(name, b"")
    schema = base64.b64decode(encoded + b"==")  # some writers leave the padding out
    return hidden if _RAY in schema else pq.read_metadata(pa.BufferReader(footer))  # noqa: TID251


def read_rows(parquet: pq.ParquetFile, rows: npt.NDArray[np.int64], columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:  # noqa: TID251
    """Read the rows of a file with these indices, in ascending order. Rows between them are not kept in memory."""
    counts = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
    ends = np.cumsum(counts)
    groups, starts = np.unique(np.searchsorted(ends, rows, side="right"), return_index=True)
    for group, wanted in zip(groups.tolist(), np.split(rows, starts[1:]), strict=False):
        position, done = ends[group] - counts[group], 0
        for batch in parquet.iter_batches(_BATCH_ROWS, row_groups=[group], columns=columns, use_threads=False):
            end = int(np.searchsorted(wanted, position + batch.num_rows))
            indices = wanted[done:end] - position
            if len(indices) and indices[-1] - indices[0] == len(indices) - 1:
                yield batch.slice(indices[0], len(indices))  # `take` copies, and cannot be used on views
            elif len(indices):
                yield batch.take(pa.array(indices))
            position, done = position + batch.num_rows, end
            if done == len(wanted):
                break
        else:
            raise UnusableFileError("has fewer rows in a row group than its footer says; write it again")


def to_parquet(table: pa.Table, row_group_size: int | None = None) -> pa.Buffer:
    """A Parquet file of the table."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size)
    return sink.getvalue()


def neutral_metadata(metadata: dict[bytes, bytes] | None) -> dict[bytes, bytes]:
    """Metadata of a file without what holds for its own columns alone, and what is ours."""
    return {
        key: value
        for key, value in (metadata or {}).items()
        if key not in _ENGINE_METADATA and not key.startswith(b"mnistsum_ray.")
    }


def plain_table(table: pa.Table) -> pa.Table:
    """The table without string and binary views; the same object where there are none."""
    schema = plain_schema(table.schema)
    if schema.equals(table.schema, check_metadata=True):
        return table
    # Only what must be cast is: pyarrow 25 cannot cast a slice of structs with a child of nulls.
    columns = zip(table.columns, schema.types, strict=True)
    plain = [column if column.type == kind else column.cast(kind) for column, kind in columns]
    return pa.Table.from_arrays(plain, schema=schema)


def plain_schema(schema: pa.Schema) -> pa.Schema:
    """The schema with plain strings and bytes in place of views, which pyarrow cannot `take`."""
    return pa.schema([_plain_field(field) for field in schema], schema.metadata)


def _plain_field(field: pa.Field) -> pa.Field:
    types, kind = pa.types, field.type
    plain = kind
    if types.is_string_view(kind):
        plain = pa.string()
    elif types.is_binary_view(kind):
        plain = pa.binary()
    elif types.is_list(kind):
        plain = pa.list_(_plain_field(kind.value_field))
    elif types.is_large_list(kind):
        plain = pa.large_list(_plain_field(kind.value_field))
    elif types.is_fixed_size_list(kind):
        plain = pa.list_(_plain_field(kind.value_field), kind.list_size)
    elif types.is_struct(kind):
        plain = pa.struct([_plain_field(child) for child in kind])
    elif types.is_map(kind):
        plain = pa.map_(_plain_field(kind.key_field), _plain_field(kind.item_field), kind.keys_sorted)
    return field.with_type(plain)


def column_error(schema: pa.Schema, name: str, type_error: Callable[[pa.DataType], str | None]) -> str | None:
    """Why a column of a footer's schema cannot be used; `type_error` says it of a type."""
    if len(schema.get_all_field_indices(name)) > 1:
        return f"has more than one column {name!r}; rename all but one"
    error = type_error(schema.field(name).type)
    return f"column {name!r} {error}; convert it" if error else None


def _recast_columns(schema: pq.ParquetSchema) -> dict[str, str]:
    """As `Footer.recast`."""
    found = {}
    for leaf in (schema.column(index) for index in range(len(schema))):
        kind = str(leaf.logical_type).partition("(")[0]
        if leaf.physical_type == "INT96" or kind not in _KEPT_TYPES:
            found[leaf.path] = "INT96" if leaf.physical_type == "INT96" else kind.upper()
    return found
