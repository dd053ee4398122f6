"""Open Parquet files that other programs wrote: whether a failure is the file's or the storage's; footers; and rows."""

import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from mnistsum_ray.data.parquet_types import plain_arrow_types
from mnistsum_ray.errors import StorageError, UnusableFileError, one_line
from mnistsum_ray.storage.listing import is_hidden
from mnistsum_ray.storage.location import Location

SUFFIXES: Final = (".parquet", ".pq", ".parq")
"""Suffixes of the files that training and scoring take from a folder, in upper or lower case."""

# Limits on what a footer may claim, since the plan of the whole run is computed from it.
_MAX_BYTES: Final = 2**50
_MAX_ROWS: Final = 10**9

_TAIL_BYTES: Final = 64 * 1024
"""Bytes read from the end of a file in the first request: most footers are shorter."""

_BATCH_ROWS: Final = 8192
"""Rows that are decompressed at once."""


def is_data_file(name: str) -> bool:
    """True if a file with this name relative to the folder that was named is taken as input."""
    return name.lower().endswith(SUFFIXES) and not is_hidden(name)


@contextmanager
def open_parquet(file: Location, **options: Any) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file for the block. Pages are checked against their CRC where they have one; Spark writes CRCs by default.

    `options` are those of `pq.ParquetFile`.

    Raises:
        StorageError: the block, or the opening, failed since the storage did, or for want of memory.
        UnusableFileError: either failed for any other reason: Arrow and Pillow raise many types for damaged bytes.
    """
    source: _Source | None = None
    try:
        source = _Source(file)
        with plain_arrow_types():
            parquet = pq.ParquetFile(source, page_checksum_verification=True, arrow_extensions_enabled=True, **options)
        yield parquet
    except (UnusableFileError, StorageError):
        raise
    except Exception as error:
        failure = source.failure if source else error
        if failure or isinstance(error, MemoryError):  # this machine's memory is no fault of the file either
            raise storage_error(file, failure or error) from error
        raise UnusableFileError(f"cannot be read: {one_line(error)} ({type(error).__name__})") from None
    finally:
        if source is not None:
            source.close()


class _Source(io.RawIOBase):
    """A file for Arrow's Parquet reader that keeps the storage's failure.

    The reader raises OSError for damaged bytes and for a storage that fails alike.
    """

    def __init__(self, file: Location) -> None:
        self.failure: OSError | None = None
        self._stream = file.filesystem.open_input_file(file.path)

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return int(self._stream.tell())

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._stream.seek(offset, whence)
        return self.tell()

    def read(self, size: int = -1) -> Any:
        """The next bytes, without a copy."""
        try:
            return self._stream.read_buffer(size if size >= 0 else None)
        except OSError as error:
            self.failure = error
            raise

    def close(self) -> None:
        self._stream.close()
        super().close()


def storage_error(file: Location, error: Exception) -> StorageError:
    """The error for a file that the storage did not give."""
    if isinstance(error, FileNotFoundError):
        return StorageError(
            f"{file.display}: is not there any more, or not on this node; a local path must be on storage that all nodes share"
        )
    return StorageError(f"{file.display}: cannot be read: {one_line(error)}")


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
        UnusableFileError: it is damaged, or claims more than a file of this size can hold.
        StorageError: the storage does not give the file.
    """
    data = _footer_bytes(file, size)
    try:
        with plain_arrow_types():
            metadata = pq.read_metadata(pa.BufferReader(data))
            schema = metadata.schema.to_arrow_schema()
    except Exception as error:  # Arrow raises many types for damaged bytes
        raise UnusableFileError(f"cannot be read: {one_line(error)} ({type(error).__name__})") from None
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    rows, decompressed = [group.num_rows for group in groups], sum(group.total_byte_size for group in groups)
    plausible = min(rows, default=0) >= 0 and sum(rows) == metadata.num_rows <= _MAX_ROWS and 0 <= decompressed < _MAX_BYTES
    if not plausible:
        raise UnusableFileError(
            f"has a footer that promises {metadata.num_rows:,} rows in {size:,} bytes, {decompressed:,} when decompressed; "
            "write it again"
        )
    return Footer(metadata, schema, rows, decompressed, hashlib.sha256(data).hexdigest())


def _footer_bytes(file: Location, size: int) -> bytes:
    """The footer and the eight bytes after it."""
    if size < 12:
        raise UnusableFileError(f"is {'empty (0 bytes)' if not size else f'only {size} bytes long'}; write it again")
    try:
        with file.filesystem.open_input_file(file.path) as stream:
            start = max(0, size - _TAIL_BYTES)
            stream.seek(start)
            tail: bytes = stream.read()
            length = int.from_bytes(tail[-8:-4], "little") + 8
            if start + len(tail) == size and len(tail) < length <= size - 4:
                start = size - length
                stream.seek(start)
                tail = stream.read()
    except OSError as error:
        raise storage_error(file, error) from error
    if start + len(tail) != size:
        raise UnusableFileError(
            f"has {start + len(tail):,} bytes where the listing says {size:,}: it is being written; try again later"
        )
    if tail[-4:] == b"PARE":
        raise UnusableFileError("is encrypted Parquet, which this program cannot read; decrypt it")
    if tail[-4:] != b"PAR1":
        raise UnusableFileError("is not Parquet, or was cut off (it does not end with PAR1); write it again")
    if length > size - 4:
        raise UnusableFileError("has a damaged footer (longer than the file); write it again")
    return tail[-length:]


def read_rows(parquet: pq.ParquetFile, rows: npt.NDArray[np.int64], columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
    """Read the rows of a file with these indices, in ascending order. Rows between them are not kept in memory.

    Raises:
        UnusableFileError: a row group has fewer rows than the footer says.
    """
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


def check_unchanged(file: Location, size: int, modified: int) -> None:
    """Check that a file has the size and the modification time that it was listed with.

    Raises:
        UnusableFileError: it has changed.
        StorageError: it is not there, or the storage does not answer.
    """
    try:
        info = file.info()
    except OSError as error:
        raise storage_error(file, error) from error
    if info.type == pafs.FileType.NotFound:
        raise storage_error(file, FileNotFoundError())
    if (info.size, file.modified(info)) != (size, modified):
        raise UnusableFileError("has changed since the run began; run the command again")


def to_parquet(table: pa.Table) -> pa.Buffer:
    """Serialize a table as a Parquet file in memory."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue()
