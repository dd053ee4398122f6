"""Whole numbers, such as class numbers."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mnistsum_ray.data.columns.base import (
    TEXTS,
    Array,
    ArrowColumn,
    Column,
    Reasons,
    is_number,
    plain,
    plain_type,
    reasons_of,
)


@dataclass(frozen=True)
class Integers(Column):
    """Whole numbers 0..below - 1, such as classes: int64[n].

    In files they are integers (no booleans), whole floats or decimals, or the text of one: "7" or
    "7.0".
    """

    below: int

    dtype: ClassVar[str] = "int64"

    def problem(self) -> str | None:
        is_right = isinstance(self.below, int) and 1 <= self.below < 2**63
        return (
            None if is_right else f"below is {self.below!r}, and must be an integer of at least 1"
        )

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(map(str, range(self.below))) if self.below <= 1000 else ()

    @property
    def form(self) -> str:
        return f"whole numbers in 0..{self.below - 1}"

    def type_error(self, kind: pa.DataType) -> str | None:
        # pandas writes floats where a number is missing; labels may be text, or categories.
        values = plain_type(kind)
        is_known = is_number(values) or values in (pa.null(), *TEXTS)
        return None if is_known else f"has type {kind}, which holds no whole numbers"

    def decode(self, column: ArrowColumn, name: str) -> tuple[Array, Reasons]:
        column = plain(column)
        whole = _whole(column)
        found = whole.fill_null(-1).to_numpy(zero_copy_only=False)
        is_right = (found >= 0) & (found < self.below)
        reasons = reasons_of(column, name, is_right, f"not one of 0..{self.below - 1}")
        return np.where(is_right, found, 0), reasons

    def random(self, rows: int, generator: np.random.Generator) -> Array:
        return generator.integers(self.below, size=rows)


def _whole(column: pa.Array) -> pa.Array:
    """Return whole numbers as int64, exactly; null for all other values."""
    kind = column.type
    if kind in TEXTS:
        texts = column.cast(pa.string())
        is_whole = pc.match_substring_regex(texts, r"^\d{1,18}(\.0*)?$")
        texts = pc.replace_substring_regex(texts, r"\..*$", "")
        return pc.if_else(is_whole, texts, None).cast(pa.int64())
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        column = column.cast(_computable(kind))
        numbers = column.cast(pa.float64(), safe=False)
        # Casts wrap what is too large, and cut fractions off.
        fits = pc.less(pc.abs(numbers), 2.0**63)
        is_whole = pc.and_(fits, pc.equal(pc.floor(column), column))
        column = pc.if_else(is_whole, column, None)
    # A uint64 above int64 becomes negative, and so is none.
    return column.cast(pa.int64(), safe=False)


def _computable(kind: pa.DataType) -> pa.DataType:
    """Return a type that Arrow computes with: neither float16 nor small decimals."""
    if pa.types.is_float16(kind):
        return pa.float32()
    is_small = pa.types.is_decimal32(kind) or pa.types.is_decimal64(kind)
    return pa.decimal128(kind.precision, kind.scale) if is_small else kind
