"""Frames of other libraries: columns to Arrow, and further columns back."""

import sys
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

import pyarrow as pa

Rows = TypeVar("Rows")
"""A pandas or Polars DataFrame, an Arrow table, or a Ray Dataset."""


def columns_of(rows: Any, names: tuple[str, ...], added: Collection[str]) -> dict[str, pa.Array]:
    """Columns of a pandas or Polars DataFrame, or of an Arrow table, by name.

    Args:
        rows: the frame.
        names: of the columns.
        added: names of columns that the frame must not have, since they are added.

    Raises:
        TypeError: it is something else.
        ValueError: it lacks a column or has one of the added ones, or Arrow cannot hold its values.
    """
    if not (isinstance(rows, pa.Table) or _is_a(rows, "polars", "DataFrame") or _is_a(rows, "pandas", "DataFrame")):
        raise TypeError(f"rows: must be a pandas or Polars DataFrame, an Arrow table or a Ray Dataset, not {type(rows).__name__}")
    present = list(rows.column_names if isinstance(rows, pa.Table) else rows.columns)
    for name in names:
        if present.count(name) != 1:
            raise ValueError(f"there must be one column {name!r}; there are {', '.join(map(repr, present))}")
    taken = next((name for name in present if str(name).lower() in added), None)
    if taken is not None:
        raise ValueError(f"column {taken!r} would be added; rename it")
    return {name: as_array(rows[name], f"column {name!r}") for name in names}


def append_columns(rows: Rows, columns: dict[str, pa.Array]) -> Rows:
    """A copy of a frame with further columns; all that it has stays as it is, and a pandas DataFrame keeps its index."""
    frame: Any = rows
    if isinstance(frame, pa.Table):
        for name, values in columns.items():
            frame = frame.append_column(name, values)
    elif _is_a(frame, "polars", "DataFrame"):
        polars = sys.modules["polars"]
        frame = frame.with_columns([polars.from_arrow(values).alias(name) for name, values in columns.items()])
    else:
        frame = frame.copy()
        for name, values in columns.items():
            frame[name] = values.to_pandas().array
    return frame  # type: ignore[no-any-return]


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
