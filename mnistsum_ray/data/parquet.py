"""The one place that opens Parquet files, our own too: footers, rows, column types, and whether the file or the storage fails."""

import hashlib
import io
import json
import pickletools
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from mnistsum_ray.errors import StorageError, UnusableFileError, one_line
from mnistsum_ray.storage.location import Location

_MAX_ROWS: Final = 10**9
"""Most rows that a footer may claim: the plan of the whole run is computed from it."""

_TAIL_BYTES: Final = 64 * 1024
"""Bytes read from the end of a file in the first request: most footers are shorter."""

_WHOLE_BYTES: Final = 4 * 2**20
"""Largest file that is read whole from an object store: two requests, where its footer and columns would take more."""

_BATCH_ROWS: Final = 8192
"""Rows that are decompressed at once."""

_NAME: Final = b"ARROW:extension:name"
_METADATA: Final = b"ARROW:extension:metadata"

_RAGGED: Final = pa.struct({"data": pa.large_list(pa.int64()), "shape": pa.list_(pa.int32())})

_RAY_TYPES: Final = {
    "ray.data.arrow_tensor": (pa.list_(pa.int64()), b"[0]"),
    "ray.data.arrow_tensor_v2": (pa.large_list(pa.int64()), b"[0]"),
    "ray.data.arrow_variable_shaped_tensor": (_RAGGED, b"1"),
    "ray.data.arrow_pickled_object": (pa.large_binary(), b""),
}
"""Type name -> storage type and metadata of some instance. With these, `_registered_types` finds the Python class."""

_UNCHANGED_TYPES: Final = frozenset(
    {"None", "String", "Int", "Date", "Decimal", "Timestamp", "Time(isAdjustedToUTC=false", "Float16", "JSON", "UUID", "Null"}
)
"""Parquet's logical types that pyarrow reads and writes again as the same type."""

_registry_lock = threading.Lock()


@contextmanager
def open_parquet(file: Location, listed: tuple[int, int] | None = None) -> Iterator[pq.ParquetFile]:  # noqa: TID251
    """Open a Parquet file for the block. Pages are checked against their CRC where they have one; Spark writes CRCs by default.

    `listed` are the size and the modification time that the file must have still; None: any.

    Raises:
        StorageError: the block, or the opening, failed since the storage did, or for want of memory.
        UnusableFileError: either failed for any other reason: Arrow and Pillow raise many types for damaged bytes.
    """
    source = _Source(file)
    try:
        if listed and source.status() != listed:
            raise UnusableFileError("has changed since the run began; run the command again")
        with plain_arrow_types():
            parquet = pq.ParquetFile(source, page_checksum_verification=True, arrow_extensions_enabled=True)  # noqa: TID251
        yield parquet
    except (UnusableFileError, StorageError):
        raise
    except Exception as error:
        if source.failure or isinstance(error, MemoryError):  # this machine's memory is no fault of the file either
            raise file.error(source.failure or error) from error
        raise _unreadable(error) from None
    finally:
        source.close()


class _Source:
    """A file for Arrow's Parquet reader that keeps the storage's failure.

    The reader raises OSError for damaged bytes and for a storage that fails alike.
    """

    def __init__(self, file: Location) -> None:
        self.failure: OSError | None = None
        self._file, self._opened = file, file.open()
        self._stream: pa.NativeFile = self._opened
        if not file.is_local:
            with file.answers():
                if self._opened.size() <= _WHOLE_BYTES:
                    self._stream = pa.BufferReader(self._opened.read_buffer())
        self.tell, self.close = self._stream.tell, self._opened.close

    def status(self) -> tuple[int, int]:
        """Size and modification time of the file."""
        found = self._file.status_of(self._opened)
        if found is None:
            raise self._file.error(FileNotFoundError())
        return found.size, found.modified

    @property
    def closed(self) -> bool:
        return bool(self._opened.closed)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self._stream.seek(offset, whence))

    def read(self, size: int) -> pa.Buffer:
        """The next bytes, without a copy."""
        try:
            return self._stream.read_buffer(size)
        except OSError as error:
            self.failure = error
            raise


def read_table(file: Location, columns: list[str] | None = None) -> pa.Table:
    """A whole Parquet file, or some of its columns, as a table of plain types; errors as of `open_parquet`."""
    with open_parquet(file) as parquet:
        return plain_table(parquet.read(columns))


def _unreadable(error: Exception) -> UnusableFileError:
    return UnusableFileError(f"cannot be read: {one_line(error)} ({type(error).__name__})")


@dataclass(frozen=True)
class Footer:
    """Footer of a Parquet file."""

    metadata: pq.FileMetaData
    schema: pa.Schema
    group_rows: list[int]
    """Rows of each row group."""
    decompressed_bytes: int
    """Bytes of all columns, decompressed."""
    sha256: str


def read_footer(file: Location, size: int) -> Footer:
    """Read the footer of a file of this size.

    Raises:
        UnusableFileError: it is damaged, or claims more rows than any file has.
        StorageError: the storage does not give the file.
    """
    data = _footer_bytes(file, size)
    try:
        with plain_arrow_types():
            metadata = pq.read_metadata(pa.BufferReader(data))  # noqa: TID251
            schema = metadata.schema.to_arrow_schema()
    except Exception as error:  # Arrow raises many types for damaged bytes
        raise _unreadable(error) from None
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    rows = [group.num_rows for group in groups]
    if min(rows, default=0) < 0 or sum(rows) != metadata.num_rows or metadata.num_rows > _MAX_ROWS:
        raise UnusableFileError(f"has a footer that promises {metadata.num_rows:,} rows in {size:,} bytes; write it again")
    decompressed = min(2**62, max(0, sum(group.total_byte_size for group in groups)))  # a footer that lies fits into an int64
    return Footer(metadata, schema, rows, decompressed, hashlib.sha256(data).hexdigest())


def _footer_bytes(file: Location, size: int) -> bytes:
    """The footer and the eight bytes after it."""
    if size < 12:
        raise UnusableFileError(f"is {'empty (0 bytes)' if not size else f'only {size} bytes long'}; write it again")
    with file.answers(), file.open() as stream:
        if (found := stream.size()) != size:
            raise UnusableFileError(f"has {found:,} bytes where the listing says {size:,}: it is being written; try again later")
        start = max(0, size - _TAIL_BYTES)
        tail: bytes = stream.read_at(size - start, start)
        length = int.from_bytes(tail[-8:-4], "little") + 8
        if len(tail) < length <= size - 4:
            tail = stream.read_at(length, size - length)
    if tail[-4:] == b"PARE":
        raise UnusableFileError("is encrypted Parquet, which this program cannot read; decrypt it")
    if tail[-4:] != b"PAR1":
        raise UnusableFileError("is not Parquet, or was cut off (it does not end with PAR1); write it again")
    if length > size - 4:
        raise UnusableFileError("has a damaged footer (longer than the file); write it again")
    return tail[-length:]


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


def to_parquet(table: pa.Table) -> pa.Buffer:
    """A Parquet file of the table."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue()


@contextmanager
def plain_arrow_types() -> Iterator[None]:
    """Files opened in the block show columns of Ray's types as plain columns.

    Otherwise scored files would need Ray to be read, and files of Ray 2.49 to 2.54, whose metadata is a pickle, could not be
    opened at all. Arrow's registry belongs to the whole process and no reader can ignore it, so the block takes Ray's types out.
    Keep it short: threads wait for each other, and one that deserializes one of Ray's types meanwhile gets the plain type too.
    """
    with _registry_lock:
        types = _registered_types()
        for kind in types:
            pa.unregister_extension_type(kind.extension_name)
        try:
            yield
        finally:
            for kind in types:
                pa.register_extension_type(kind)


def _registered_types() -> list[pa.ExtensionType]:
    """An instance of each of Ray's types that is registered in this process.

    Arrow has no public lookup by name. A serialized schema is read with the types that are registered, and plain ones else.
    """
    fields = [
        pa.field(name, storage, metadata={_NAME: name.encode(), _METADATA: metadata})
        for name, (storage, metadata) in _RAY_TYPES.items()
    ]
    schema = pa.ipc.read_schema(pa.schema(fields).serialize())
    return [field.type for field in schema if isinstance(field.type, pa.ExtensionType)]


def plain_table(table: pa.Table) -> pa.Table:
    """The table without string and binary views and without marks of Ray's types; the same object where there are none."""
    schema = plain_schema(table.schema)
    if schema.equals(table.schema, check_metadata=True):
        return table
    # Only what must be cast is: pyarrow 25 cannot cast a slice of structs with a child of the type null.
    columns = zip(table.columns, schema.types, strict=True)
    return pa.Table.from_arrays([column if column.type == kind else column.cast(kind) for column, kind in columns], schema=schema)


def plain_schema(schema: pa.Schema) -> pa.Schema:
    """The schema with plain strings and bytes in place of views, which pyarrow cannot `take`, and without marks of Ray's types.

    Files written with the marks would be read as those types again.
    """
    return pa.schema([_plain_field(field) for field in schema], schema.metadata)


def _plain_field(field: pa.Field) -> pa.Field:
    metadata = field.metadata or {}
    if metadata.get(_NAME, b"").decode(errors="replace") in _RAY_TYPES:
        field = field.with_metadata({key: value for key, value in metadata.items() if key not in (_NAME, _METADATA)})
    return field.with_type(_plain_type(field.type))


def _plain_type(kind: pa.DataType) -> pa.DataType:
    types = pa.types
    if types.is_string_view(kind):
        return pa.string()
    if types.is_binary_view(kind):
        return pa.binary()
    if isinstance(kind, pa.JsonType):
        return pa.json_(_plain_type(kind.storage_type))
    if types.is_list(kind):
        return pa.list_(_plain_field(kind.value_field))
    if types.is_large_list(kind):
        return pa.large_list(_plain_field(kind.value_field))
    if types.is_fixed_size_list(kind):
        return pa.list_(_plain_field(kind.value_field), kind.list_size)
    if types.is_struct(kind):
        return pa.struct([_plain_field(child) for child in kind])
    if types.is_map(kind):
        return pa.map_(_plain_field(kind.key_field), _plain_field(kind.item_field), kind.keys_sorted)
    return kind


def column_error(schema: pa.Schema, name: str, type_error: Callable[[pa.DataType], str | None]) -> str | None:
    """Why a column that is in the schema cannot be used; `type_error` says it of a type, as `images.image_type_error`."""
    if len(schema.get_all_field_indices(name)) > 1:
        return f"has more than one column {name!r}; rename all but one"
    error = type_error(_tensor_type(schema.field(name)) or plain_schema(schema).field(name).type)
    return f"column {name!r} {error}; convert it" if error else None


def _tensor_type(field: pa.Field) -> pa.DataType | None:
    """Arrow's own type, which has a shape, of a column that is marked as Ray's tensors of one shape; None of any other."""
    metadata = field.metadata or {}
    if metadata.get(_NAME) not in (b"ray.data.arrow_tensor", b"ray.data.arrow_tensor_v2"):
        return None
    mark = metadata.get(_METADATA, b"")
    try:
        # Ray 2.49 to 2.54 wrote a pickle, whose numbers are read here and nothing is executed.
        ints = [number for code, number, _ in pickletools.genops(mark) if "BININT" in code.name] if mark[:1] == b"\x80" else None
        return pa.fixed_shape_tensor(field.type.value_type, ints or json.loads(mark))
    except (ValueError, TypeError, AttributeError, pa.ArrowException):
        return None


def lossy_column(footer: Footer, dropped: str) -> str | None:
    """Why some column, but for that of the name `dropped`, would be written with another type than it was read with."""
    schema, columns = footer.metadata.schema, footer.schema.names
    if variant := re.search(r"group field_id=-?\d+ (.+) \(Variant", str(schema)):
        return f"column {variant[1]!r} has the type VARIANT, which would be lost; cast it to JSON or VARCHAR"
    for leaf in (schema.column(index) for index in range(len(schema))):
        # The column that the leaf's path begins with; its own name may hold dots.
        named = (name for name in columns if leaf.path == name or leaf.path.startswith(f"{name}."))
        column = max(named, key=len, default=leaf.path)
        if leaf.physical_type == "INT96":  # it holds nanoseconds of any year, and Arrow's timestamps one or the other
            return f"column {column!r} has the type INT96, which would be lost; cast it to another"
        logical = str(leaf.logical_type)
        is_time = logical.startswith("Time(")
        if column != dropped and logical.partition("," if is_time else "(")[0] not in _UNCHANGED_TYPES:
            name = "TIME WITH TIME ZONE" if is_time else logical.partition("(")[0].upper()
            return f"column {column!r} has the type {name}, which would be lost; cast it to another"
    return None
