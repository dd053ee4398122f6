"""Finite numbers, one or a list of them."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mnistsum_ray.data.columns.base import (
    LISTS,
    Array,
    ArrowColumn,
    Column,
    Reasons,
    is_number,
    plain,
    plain_type,
    reasons_of,
    tensor_error,
)


@dataclass(frozen=True)
class Numbers(Column):
    """Finite numbers: float32[n] or, with a length, lists of this length, float32[n, length].

    In files they are integers, floats, decimals or booleans (0 and 1). With `missing`, null and NaN
    mean this number; otherwise their rows are rejected. A null in place of a list is rejected.
    """

    length: int | None = None
    missing: float | None = None

    dtype: ClassVar[str] = "float32"

    def problem(self) -> str | None:
        if self.length is not None and not (isinstance(self.length, int) and self.length >= 1):
            return f"length is {self.length!r}, and must be an integer of at least 1"
        if self.missing is not None and not np.isfinite(np.float32(self.missing)):
            return f"missing is {self.missing!r}, and must be finite"
        return None

    @property
    def shape(self) -> tuple[int, ...]:
        return () if self.length is None else (self.length,)

    @property
    def form(self) -> str:
        return "numbers" if self.length is None else f"lists of {self.length} numbers"

    def type_error(self, kind: pa.DataType) -> str | None:
        outer = plain_type(kind)
        is_list = isinstance(outer, LISTS)
        inner = outer.value_type if is_list else outer
        is_known = is_number(inner) or pa.types.is_boolean(inner) or pa.types.is_null(inner)
        if (is_known and is_list == (self.length is not None)) or pa.types.is_null(outer):
            return tensor_error(kind, self.shape)
        return f"has type {kind}, which holds no {self.form}"

    def decode(self, column: ArrowColumn, name: str) -> tuple[Array, Reasons]:
        column = plain(column)
        found = self.zeros(len(column))
        if self.length is None:
            found[:] = self._float32(column)
            is_right = np.isfinite(found)
        else:
            # Arrow ends the process where a value of lists of nulls is looked at.
            column = lists = column.cast(pa.large_list(_value_type(column.type)), safe=False)
            lengths = pc.list_value_length(lists)
            has_length = pc.equal(lengths, self.length).fill_null(fill_value=False)
            is_right = has_length.to_numpy(zero_copy_only=False)
            values = self._float32(lists.filter(has_length).flatten())
            found[is_right] = values.reshape(-1, self.length)
            is_right = is_right & np.isfinite(found).all(axis=1)
        found[~is_right] = 0
        count = "" if self.length is None else f"{self.length} numbers that are "
        wanted = f"not {count}finite in 32 bits"
        return found, reasons_of(column, name, is_right, wanted)

    def random(self, rows: int, generator: np.random.Generator) -> Array:
        return generator.standard_normal((rows, *self.shape), np.float32)

    def _float32(self, column: pa.Array) -> Array:
        """Return values as float32; null and NaN as `missing`, if there is one."""
        if pa.types.is_boolean(column.type):
            column = column.cast(pa.int8())
        values = column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
        if self.missing is not None:
            values = np.where(np.isnan(values), self.missing, values)
        # NumPy warns of what is too large for float32, and becomes infinite.
        with np.errstate(over="ignore"):
            return np.asarray(values, np.float32)


def _value_type(kind: pa.DataType) -> pa.DataType:
    """Return the type of the values of lists; float64 for nulls."""
    values = kind if pa.types.is_null(kind) else kind.value_type
    return pa.float64() if pa.types.is_null(values) else values
