"""How Parquet files of others are opened: names that are taken, checksums, types that pass through unchanged or not at all."""

import re
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

SUFFIXES: Final = (".parquet", ".pq", ".parq")
"""File names that are taken of a folder, in any case, for training and scoring alike."""

_PASS_THROUGH: Final = frozenset(
    {"None", "String", "Int", "Date", "Decimal", "Timestamp", "Time(isAdjustedToUTC=false", "Float16", "JSON", "UUID", "Null"}
)
"""Parquet's logical types that pyarrow reads and writes again as the same."""


_MOST_BYTES: Final = 2**50
_MOST_ROWS: Final = 10**9
_MOST_ROWS_A_BYTE: Final = 10_000
"""A file of one and the same row, as dense as Parquet gets, has some hundreds."""
_MOST_BYTES_A_BYTE: Final = 100_000
"""Nothing but zeros, by the best of Parquet's codecs, is tens of thousands of times smaller."""


class UnusableFileError(ValueError):
    """A file cannot be used; the message says why and what to do."""


def is_data_file(below: tuple[str, ...]) -> bool:
    """Whether a file in a folder is taken; `below` holds the parts of its path below the folder that was named.

    By the convention of Spark, Hive and Arrow, names that begin with . or _ are for what is not data, or not yet.
    """
    return below[-1].lower().endswith(SUFFIXES) and not any(part.startswith((".", "_")) for part in below)


def open_parquet(stream: pa.NativeFile | pa.Buffer) -> pq.ParquetFile:
    """Open a Parquet file, whose pages are compared with their CRC where they have one (Spark writes it by default)."""
    return pq.ParquetFile(stream, page_checksum_verification=True, arrow_extensions_enabled=True)


def row_groups(metadata: pq.FileMetaData, file_size: int) -> tuple[list[int], int]:
    """The rows of each row group, and the bytes of all columns, as far as a file of this size can hold them.

    Raises:
        BadFile: the footer says what cannot be. Others wrote it, and the plan of the whole run is made of it.
    """
    rows, size = [], 0
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        if group.num_rows < 0 or not 0 <= group.total_byte_size < _MOST_BYTES:
            raise UnusableFileError(
                f"has a damaged footer (row group {index} with {group.num_rows:,} rows and {group.total_byte_size:,} bytes); "
                "write it anew"
            )
        rows.append(group.num_rows)
        size += group.total_byte_size
    if sum(rows) != metadata.num_rows:
        raise UnusableFileError("has a damaged footer (its row groups do not add up); write it anew")
    if size > min(_MOST_BYTES, _MOST_BYTES_A_BYTE * file_size):
        raise UnusableFileError(f"has a footer that promises {size:,} bytes in {file_size:,}; write it anew")
    if metadata.num_rows > min(_MOST_ROWS, _MOST_ROWS_A_BYTE * file_size):
        raise UnusableFileError(
            f"has a footer that promises {metadata.num_rows:,} rows in {file_size:,} bytes; write it anew, or split it"
        )
    return rows, size


def without_views(kind: pa.DataType) -> pa.DataType:
    """The type with string and binary views replaced: the same values, of which pyarrow can take rows."""
    types = pa.types
    if types.is_string_view(kind):
        return pa.string()
    if types.is_binary_view(kind):
        return pa.binary()
    if isinstance(kind, pa.JsonType):
        return pa.json_(without_views(kind.storage_type))
    if types.is_list(kind):
        return pa.list_(_field_without_views(kind.value_field))
    if types.is_large_list(kind):
        return pa.large_list(_field_without_views(kind.value_field))
    if types.is_fixed_size_list(kind):
        return pa.list_(_field_without_views(kind.value_field), kind.list_size)
    if types.is_struct(kind):
        return pa.struct([_field_without_views(kind.field(index)) for index in range(kind.num_fields)])
    if types.is_map(kind):
        return pa.map_(_field_without_views(kind.key_field), _field_without_views(kind.item_field), kind.keys_sorted)
    return kind


def _field_without_views(field: pa.Field) -> pa.Field:
    return field.with_type(without_views(field.type))


def table_without_views(table: pa.Table) -> pa.Table:
    """The table with its columns as `without_views` has their types; the same object where there are none."""
    schema = pa.schema([_field_without_views(field) for field in table.schema], table.schema.metadata)
    return table if schema.equals(table.schema) else table.cast(schema)


def lossy_column(schema: pq.ParquetSchema, dropped: str) -> str | None:
    """Why a column of a file would not be written again as it was read; None where all are. `dropped` is not written."""
    text, columns = str(schema), schema.to_arrow_schema().names
    variant = re.search(r"group field_id=-?\d+ (.+) \(Variant", text) if "(Variant" in text else None
    if variant:
        return f"column {variant[1]!r} has the type VARIANT, which would be lost; cast it to JSON or VARCHAR"
    for index in range(len(schema)):
        leaf = schema.column(index)
        logical = str(leaf.logical_type)
        name = logical.partition(",")[0] if logical.startswith("Time(") else logical.partition("(")[0]
        column = _column_of(leaf.path, columns)
        if name not in _PASS_THROUGH and column != dropped:
            return f"column {column!r} has the type {_said(logical)}, which would be lost; cast it to another"
    return None


def _said(logical: str) -> str:
    return "TIME WITH TIME ZONE" if logical.startswith("Time(") else logical.partition("(")[0].upper()


def int96_columns(schema: pq.ParquetSchema) -> list[str]:
    """Columns that hold timestamps as INT96, which pyarrow reads as nanoseconds since 1970."""
    leaves, columns = (schema.column(index) for index in range(len(schema))), schema.to_arrow_schema().names
    return sorted({_column_of(leaf.path, columns) for leaf in leaves if leaf.physical_type == "INT96"})


def _column_of(leaf: str, columns: list[str]) -> str:
    """The column that a leaf's path begins with; its name may hold dots itself."""
    return max((name for name in columns if leaf == name or leaf.startswith(f"{name}.")), key=len, default=leaf)


def check_int96(stream: pa.NativeFile, columns: list[str], groups: list[int]) -> None:
    """Refuse INT96 timestamps that nanoseconds since 1970 cannot hold: pyarrow would read them as others, without a word.

    Raises:
        BadFile: names the column.
    """
    file = pq.ParquetFile(stream, coerce_int96_timestamp_unit="us")
    for batch in file.iter_batches(row_groups=groups, columns=columns, use_threads=False):
        for name in columns:
            column = batch.column(name)
            try:
                column.cast(_in_nanoseconds(column.type))
            except pa.ArrowInvalid:
                raise UnusableFileError(
                    f"column {name!r} holds INT96 timestamps outside of the years 1677 to 2262, which would be read as others; "
                    "write it anew with TIMESTAMP_MICROS (Spark: spark.sql.parquet.outputTimestampType)"
                ) from None


def _in_nanoseconds(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_timestamp(kind):
        return pa.timestamp("ns", kind.tz)
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_in_nanoseconds(kind.value_type)))
    if pa.types.is_struct(kind):
        fields = (kind.field(index) for index in range(kind.num_fields))
        return pa.struct([field.with_type(_in_nanoseconds(field.type)) for field in fields])
    if pa.types.is_map(kind):
        return pa.map_(_in_nanoseconds(kind.key_type), _in_nanoseconds(kind.item_type))
    return kind
