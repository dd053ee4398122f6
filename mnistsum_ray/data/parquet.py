"""Open Parquet files that other programs wrote, and check that their footers are plausible."""

from typing import Final

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from mnistsum_ray.data.arrow_types import plain_arrow_types

SUFFIXES: Final = (".parquet", ".pq", ".parq")
"""Suffixes of the files that training and scoring take from a folder, in upper or lower case."""

# Limits on what a footer may claim, since the plan of the whole run is computed from it.
_MAX_BYTES: Final = 2**50
_MAX_ROWS: Final = 10**9
_MAX_ROWS_PER_FILE_BYTE: Final = 10_000
"""A file that repeats one row, the densest there is, has some hundreds of rows per byte."""
_MAX_BYTES_PER_FILE_BYTE: Final = 100_000
"""Zeros, under the best of Parquet's codecs, shrink by some tens of thousands."""


_TAIL_BYTES: Final = 64 * 1024
"""Bytes read from the end of a file in the first request: most footers are shorter."""


class UnusableFileError(ValueError):
    """A file cannot be used; the message says why and what to do."""


def is_data_file(parts: tuple[str, ...]) -> bool:
    """True if a file in a folder is taken as input.

    By the convention of Spark, Hive and Arrow, names that begin with . or _ are not data, or not yet.

    Args:
        parts: components of the file's path relative to the folder that was named.
    """
    return parts[-1].lower().endswith(SUFFIXES) and not any(part.startswith((".", "_")) for part in parts)


def open_parquet(stream: pa.NativeFile | pa.Buffer) -> pq.ParquetFile:
    """Open a Parquet file. Pages are checked against their CRC where they have one; Spark writes CRCs by default."""
    with plain_arrow_types():
        return pq.ParquetFile(stream, page_checksum_verification=True, arrow_extensions_enabled=True)


def read_footer(filesystem: pafs.FileSystem, path: str, size: int) -> bytes:
    """Read a Parquet file's footer and the eight bytes after it.

    Raises:
        UnusableFileError: the file does not end as a Parquet file does.
        OSError: the file cannot be read.
    """
    if size < 12:
        raise UnusableFileError(f"is {'empty (0 bytes)' if not size else f'only {size} bytes long'}; write it again")
    with filesystem.open_input_file(path) as stream:
        start = max(0, size - _TAIL_BYTES)
        stream.seek(start)
        tail: bytes = stream.read()
        if start + len(tail) != size:
            raise UnusableFileError(
                f"has {start + len(tail):,} bytes where the listing says {size:,}: it is being written; try again later"
            )
        if tail[-4:] != b"PAR1":
            raise UnusableFileError("is not Parquet, or was cut off (it does not end with PAR1); write it again")
        length = int.from_bytes(tail[-8:-4], "little") + 8
        if length > size - 4:
            raise UnusableFileError("has a damaged footer (longer than the file); write it again")
        if length > len(tail):
            stream.seek(size - length)
            tail = stream.read()
    return tail[-length:]


def row_groups(metadata: pq.FileMetaData, file_size: int) -> tuple[list[int], int]:
    """Rows of each row group, and bytes of all columns, uncompressed.

    Raises:
        UnusableFileError: a file of this size cannot hold what the footer claims.
    """
    rows, size = [], 0
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        if group.num_rows < 0 or not 0 <= group.total_byte_size < _MAX_BYTES:
            raise UnusableFileError(
                f"has a damaged footer (row group {index} with {group.num_rows:,} rows and {group.total_byte_size:,} bytes); "
                "write it again"
            )
        rows.append(group.num_rows)
        size += group.total_byte_size
    if sum(rows) != metadata.num_rows:
        raise UnusableFileError("has a damaged footer (its row groups do not add up); write it again")
    if size > min(_MAX_BYTES, _MAX_BYTES_PER_FILE_BYTE * file_size):
        raise UnusableFileError(f"has a footer that promises {size:,} bytes in {file_size:,}; write it again")
    if metadata.num_rows > min(_MAX_ROWS, _MAX_ROWS_PER_FILE_BYTE * file_size):
        raise UnusableFileError(
            f"has a footer that promises {metadata.num_rows:,} rows in {file_size:,} bytes; write it again, or split it"
        )
    return rows, size
