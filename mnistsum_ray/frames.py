"""Tables of other libraries: to Arrow and back."""

import sys
from collections.abc import Mapping
from typing import Any, TypeVar

import pyarrow as pa

Rows = TypeVar("Rows")
"""A pandas or Polars DataFrame, an Arrow table, or a Ray Dataset."""


def as_table(rows: Any) -> pa.Table:
    """Convert a pandas or Polars DataFrame to an Arrow table; an Arrow table is returned as it is.

    Raises:
        TypeError: it is something else.
        ValueError: a column has values that Arrow cannot hold.
    """
    if isinstance(rows, pa.Table):
        return rows
    if _is_a(rows, "polars", "DataFrame"):
        return rows.to_arrow()
    if not _is_a(rows, "pandas", "DataFrame"):
        raise TypeError(f"rows: must be a pandas or Polars DataFrame, an Arrow table or a Ray Dataset, not {type(rows).__name__}")
    try:
        return pa.Table.from_pandas(rows)
    except pa.ArrowException as error:
        raise ValueError(f"rows: cannot be converted to Arrow: {error}; images are 784 bytes or a list of 784 integers") from None


def like(rows: Rows, table: pa.Table) -> Rows:
    """Convert an Arrow table to the library of `rows`; a pandas DataFrame keeps its index."""
    converted: Any = table
    if _is_a(rows, "polars", "DataFrame"):
        converted = sys.modules["polars"].from_arrow(table)
    elif _is_a(rows, "pandas", "DataFrame"):
        converted = table.to_pandas()
    return converted  # type: ignore[no-any-return]


def as_array(values: Any, name: str) -> pa.Array:
    """Convert a list, a Series of pandas or Polars, or an Arrow array to one Arrow array.

    Raises:
        ValueError: the values have no common type.
    """
    try:
        if isinstance(values, Mapping | str | bytes):
            raise TypeError(f"must be a sequence, not {type(values).__name__}")
        column = values.to_arrow() if _is_a(values, "polars", "Series") else values
        column = column if isinstance(column, pa.Array | pa.ChunkedArray) else pa.array(column)
    except (pa.ArrowException, TypeError) as error:
        raise ValueError(f"{name}: {error}") from None
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def is_ray_dataset(rows: Any) -> bool:
    """Return whether this is a Ray Dataset. Ray is not imported for the question."""
    return _is_a(rows, "ray.data", "Dataset")


def _is_a(value: Any, module: str, name: str) -> bool:
    """Return whether a value is of a class of a library that may not be installed: if it is not imported, no value is."""
    return module in sys.modules and isinstance(value, getattr(sys.modules[module], name))
