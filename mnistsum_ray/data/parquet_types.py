"""Column types of Parquet files: Ray's types read as plain ones, types that pyarrow writes again unchanged, and casts."""

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from mnistsum_ray.errors import UnusableFileError

_NAME: Final = b"ARROW:extension:name"
_METADATA: Final = b"ARROW:extension:metadata"

# Type name -> storage type and metadata of some instance. With these, `_registered_types` finds the Python class.
_RAY_TYPES: Final = {
    "ray.data.arrow_tensor": (pa.list_(pa.int64()), b"[0]"),
    "ray.data.arrow_tensor_v2": (pa.large_list(pa.int64()), b"[0]"),
    "ray.data.arrow_variable_shaped_tensor": (
        pa.struct({"data": pa.large_list(pa.int64()), "shape": pa.list_(pa.int32())}),
        b"1",
    ),
    "ray.data.arrow_pickled_object": (pa.large_binary(), b""),
}

_lock = threading.Lock()
_users = 0
_unregistered: list[pa.ExtensionType] = []


@contextmanager
def plain_arrow_types() -> Iterator[None]:
    """Files opened in the block show columns of Ray's types as plain columns. After the block the types are registered as before.

    Otherwise scored files would need Ray to be read, and files of Ray 2.49 to 2.54, whose metadata is a pickle, could not be
    opened at all. Arrow's registry belongs to the whole process and no reader can ignore it, so the block takes Ray's types out.
    Several threads may be in the block at once. Keep it short: a thread outside of it that deserializes one of Ray's types
    meanwhile gets the plain type too.
    """
    global _users
    with _lock:
        if _users == 0:
            _unregistered[:] = _registered_types()
            for kind in _unregistered:
                pa.unregister_extension_type(kind.extension_name)
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                for kind in _unregistered:
                    pa.register_extension_type(kind)


def _registered_types() -> list[pa.ExtensionType]:
    """An instance of each of Ray's types that is registered in this process.

    Arrow has no public lookup by name. Reading a serialized schema gives instances of the types that are registered, and plain
    types for the others.
    """
    fields = [
        pa.field(name, storage, metadata={_NAME: name.encode(), _METADATA: metadata})
        for name, (storage, metadata) in _RAY_TYPES.items()
    ]
    schema = pa.ipc.read_schema(pa.schema(fields).serialize())
    return [field.type for field in schema if isinstance(field.type, pa.ExtensionType)]


def without_ray_marks(field: Any) -> Any:
    """The field without the metadata that marks it as one of Ray's types; files written with the field have the plain type."""
    metadata = field.metadata or {}
    if metadata.get(_NAME, b"").decode(errors="replace") not in _RAY_TYPES:
        return field
    return field.with_metadata({key: value for key, value in metadata.items() if key not in (_NAME, _METADATA)})


_UNCHANGED_TYPES: Final = frozenset(
    {"None", "String", "Int", "Date", "Decimal", "Timestamp", "Time(isAdjustedToUTC=false", "Float16", "JSON", "UUID", "Null"}
)
"""Parquet's logical types that pyarrow reads and writes again as the same type."""


def without_views(kind: pa.DataType) -> pa.DataType:
    """The type with string and binary views replaced by plain strings and bytes, since pyarrow cannot `take` rows of views."""
    return _with_leaves(kind, _without_view)


def _without_view(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_string_view(kind):
        return pa.string()
    return pa.binary() if pa.types.is_binary_view(kind) else kind


def _with_leaves(kind: pa.DataType, leaf: Callable[[pa.DataType], pa.DataType]) -> pa.DataType:
    """The type with `leaf` of each type that is not nested, and without marks of Ray's types."""

    def inner(field: pa.Field) -> pa.Field:
        return without_ray_marks(field).with_type(_with_leaves(field.type, leaf))

    types = pa.types
    if isinstance(kind, pa.JsonType):
        return pa.json_(leaf(kind.storage_type))
    if types.is_list(kind):
        return pa.list_(inner(kind.value_field))
    if types.is_large_list(kind):
        return pa.large_list(inner(kind.value_field))
    if types.is_fixed_size_list(kind):
        return pa.list_(inner(kind.value_field), kind.list_size)
    if types.is_struct(kind):
        return pa.struct([inner(kind.field(index)) for index in range(kind.num_fields)])
    if types.is_map(kind):
        return pa.map_(inner(kind.key_field), inner(kind.item_field), kind.keys_sorted)
    return leaf(kind)


def plain_table(table: pa.Table) -> pa.Table:
    """The table without string and binary views and without marks of Ray's types; the same object where there are none."""
    fields = [without_ray_marks(field).with_type(without_views(field.type)) for field in table.schema]
    schema = pa.schema(fields, table.schema.metadata)
    return table if schema.equals(table.schema, check_metadata=True) else table.cast(schema)


def lossy_column(schema: pq.ParquetSchema, dropped: str) -> str | None:
    """Why some column would be written with another type than it was read with; None where none would.

    Args:
        dropped: name of the column that is not written.
    """
    text, columns = str(schema), schema.to_arrow_schema().names
    variant = re.search(r"group field_id=-?\d+ (.+) \(Variant", text) if "(Variant" in text else None
    if variant:
        return f"column {variant[1]!r} has the type VARIANT, which would be lost; cast it to JSON or VARCHAR"
    for index in range(len(schema)):
        leaf = schema.column(index)
        logical = str(leaf.logical_type)
        name = logical.partition(",")[0] if logical.startswith("Time(") else logical.partition("(")[0]
        column = _column_of_leaf(leaf.path, columns)
        if name not in _UNCHANGED_TYPES and column != dropped:
            return f"column {column!r} has the type {_sql_name(logical)}, which would be lost; cast it to another"
    return None


def _sql_name(logical: str) -> str:
    return "TIME WITH TIME ZONE" if logical.startswith("Time(") else logical.partition("(")[0].upper()


def _column_of_leaf(leaf: str, columns: list[str]) -> str:
    """The column that a leaf's path begins with; the column's own name may hold dots."""
    return max((name for name in columns if leaf == name or leaf.startswith(f"{name}.")), key=len, default=leaf)


def int96_columns(schema: pq.ParquetSchema) -> list[str]:
    """Columns with timestamps of Parquet's old type INT96, which pyarrow reads as nanoseconds since 1970."""
    leaves, columns = (schema.column(index) for index in range(len(schema))), schema.to_arrow_schema().names
    return sorted({_column_of_leaf(leaf.path, columns) for leaf in leaves if leaf.physical_type == "INT96"})


def check_int96(file: pq.ParquetFile, columns: list[str], groups: list[int]) -> None:
    """Refuse INT96 timestamps that do not fit into nanoseconds since 1970: pyarrow would silently read other dates.

    Args:
        file: opened with `coerce_int96_timestamp_unit="us"`.
        columns: from `int96_columns`.
        groups: row groups to check.

    Raises:
        UnusableFileError: names the column.
    """
    for batch in file.iter_batches(row_groups=groups, columns=columns, use_threads=False):
        for name in columns:
            column = batch.column(name)
            try:
                column.cast(_with_leaves(column.type, _in_nanoseconds))
            except pa.ArrowInvalid:
                raise UnusableFileError(
                    f"column {name!r} holds INT96 timestamps outside of the years 1677 to 2262, which would be read as others; "
                    "write it again with TIMESTAMP_MICROS (Spark: spark.sql.parquet.outputTimestampType)"
                ) from None


def _in_nanoseconds(kind: pa.DataType) -> pa.DataType:
    return pa.timestamp("ns", kind.tz) if pa.types.is_timestamp(kind) else kind
