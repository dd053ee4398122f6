"""Kinds of columns: what a task reads of a row, from an Arrow column to an array.

A value that cannot be used gets a reason, and zeros in its place.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, ClassVar, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mnistsum_ray.errors import shortened

NULL: Final = "is null; fill it in or drop the row"
LISTS: Final = (pa.ListType, pa.LargeListType, pa.FixedSizeListType)
_TEXTS: Final = (pa.string(), pa.large_string(), pa.string_view())

ArrowColumn: TypeAlias = pa.Array | pa.ChunkedArray
Array: TypeAlias = npt.NDArray[Any]
Arrays: TypeAlias = dict[str, Array]
"""Rows as arrays by the names of a task's columns."""
Reasons: TypeAlias = dict[int, str]
"""Why a row cannot be used, by its index."""
RejectedRow: TypeAlias = tuple[str, int, str]
"""A row that cannot be used: its file, its index there, and the reason."""


@dataclass(frozen=True, kw_only=True)
class Column(ABC):
    """A kind of column. Decoded rows are an array `dtype[n, *shape]`."""

    names: tuple[str, ...] = ()
    """Column names to try in each file, in this order. Default: the column's name in the task."""
    flag: str = ""
    """Field and flag that set another name. Default: `NAME_column`."""

    dtype: ClassVar[str]
    stays_encoded: ClassVar[bool] = False
    """Whether rows stay encoded in the object store, and are decoded for each batch."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one decoded row."""
        return ()

    @property
    @abstractmethod
    def form(self) -> str:
        """What the values are, for `--help`."""

    @abstractmethod
    def type_error(self, kind: pa.DataType) -> str | None:
        """Return why a column of this Arrow type cannot be decoded; None where it can."""

    @abstractmethod
    def decode(self, column: ArrowColumn, name: str) -> tuple[Array, Reasons]:
        """Return the rows of a column whose type passes `type_error`, and why some cannot be used.

        `name` is what a reason calls the column.
        """

    def load(self, stored: Array) -> Array:
        """Return decoded rows as a batch has them. Only encoded pictures differ."""
        return stored

    def zeros(self, rows: int) -> Array:
        """Return rows of zeros, as `decode` returns rows."""
        return np.zeros((rows, *self.shape), self.dtype)

    @abstractmethod
    def random(self, rows: int, generator: np.random.Generator) -> Array:
        """Return some rows as a batch has them, to try a task with."""

    def to_arrow(self, values: Array) -> pa.Array:
        """Return rows of `decode` as they lie in Ray's object store."""
        if not self.shape:
            return pa.array(values)
        # Else a transposed array becomes a tensor whose type says so, and whose values do not.
        return pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(values))

    @property
    def row_bytes(self) -> int:
        """Bytes of a row in a batch."""
        return prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Integers(Column):
    """Whole numbers 0..below - 1, such as classes: int64[n].

    In files they are integers (no booleans), whole floats, or the text of one: "7" or "7.0".
    """

    below: int

    dtype: ClassVar[str] = "int64"

    @property
    def form(self) -> str:
        return f"whole numbers in 0..{self.below - 1}"

    def type_error(self, kind: pa.DataType) -> str | None:
        # pandas writes floats where a number is missing; labels may be text, or categories.
        values = plain_type(kind)
        is_known = _is_number(values) or values in (pa.null(), *_TEXTS)
        return None if is_known else f"has type {kind}, which holds no whole numbers"

    def decode(self, column: ArrowColumn, name: str) -> tuple[Array, Reasons]:
        column = plain(column)
        values = column
        if column.type in _TEXTS:
            texts = column.cast(pa.string())
            values = pc.if_else(pc.match_substring_regex(texts, r"^\d+(\.0*)?$"), texts, None)
        # A null becomes NaN; a huge integer is rounded, but stays out of range.
        numbers = values.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
        is_right = (numbers >= 0) & (numbers < self.below) & (numbers == np.floor(numbers))
        reasons = _reasons(column, name, is_right, f"not one of 0..{self.below - 1}")
        return np.where(is_right, numbers, 0).astype(np.int64), reasons

    def random(self, rows: int, generator: np.random.Generator) -> Array:
        return generator.integers(self.below, size=rows)


@dataclass(frozen=True)
class Numbers(Column):
    """Finite numbers: float32[n] or, with a length, lists of this length, float32[n, length]."""

    length: int | None = None

    dtype: ClassVar[str] = "float32"

    @property
    def shape(self) -> tuple[int, ...]:
        return () if self.length is None else (self.length,)

    @property
    def form(self) -> str:
        return "numbers" if self.length is None else f"lists of {self.length} numbers"

    def type_error(self, kind: pa.DataType) -> str | None:
        values = plain_type(kind)
        is_list = isinstance(values, LISTS)
        if is_list:
            values = values.value_type
        has_form = _is_number(values) and is_list == (self.length is not None)
        if has_form or values == pa.null():
            return tensor_error(kind, self.shape)
        return f"has type {kind}, which holds no {self.form}"

    def decode(self, column: ArrowColumn, name: str) -> tuple[Array, Reasons]:
        column = plain(column)
        found = self.zeros(len(column))
        if self.length is None:
            found[:] = _as_float32(column)
            is_right = np.isfinite(found)
        else:
            lists = column.cast(pa.large_list(pa.float64()), safe=False)
            lengths = pc.list_value_length(lists)
            has_length = pc.equal(lengths, self.length).fill_null(fill_value=False)
            is_right = has_length.to_numpy(zero_copy_only=False)
            values = _as_float32(lists.filter(has_length).flatten())
            found[is_right] = values.reshape(-1, self.length)
            is_right = is_right & np.isfinite(found).all(axis=1)
        found[~is_right] = 0
        count = "" if self.length is None else f"{self.length} numbers that are "
        wanted = f"not {count}finite in 32 bits"
        return found, _reasons(column, name, is_right, wanted)

    def random(self, rows: int, generator: np.random.Generator) -> Array:
        return generator.standard_normal((rows, *self.shape), np.float32)


def _is_number(kind: pa.DataType) -> bool:
    checks = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal)
    return any(check(kind) for check in checks)


def _as_float32(column: pa.Array) -> Array:
    # NumPy warns of what is too large for float32, and becomes infinite.
    with np.errstate(over="ignore"):
        numbers = column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
        return np.asarray(numbers, np.float32)


def _reasons(column: pa.Array, name: str, is_right: Array, wanted: str) -> Reasons:
    """Return why values that are not `right` cannot be used: they are null, or not `wanted`."""
    reasons: Reasons = {}
    for row in np.flatnonzero(~is_right).tolist():
        value, problem = column[row], NULL
        if value.is_valid:
            is_list = isinstance(value, pa.ListScalar)
            shown = f"a list of {len(value)}" if is_list else shortened(repr(value.as_py()))
            problem = f"is {shown}, {wanted}; correct it or drop the row"
        reasons[row] = f"the {name} {problem}"
    return reasons


def one_chunk(column: ArrowColumn) -> pa.Array:
    """Return a column as one array; `combine_chunks` alone would copy one chunk too."""
    if isinstance(column, pa.Array):
        return column
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def plain(column: ArrowColumn) -> pa.Array:
    """Return a column as one array of its `plain_type`."""
    column = one_chunk(column)
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    return column.cast(plain_type(column.type))


def plain_type(kind: pa.DataType) -> pa.DataType:
    """Return the type of the values below a tensor, or of categories."""
    if isinstance(kind, pa.BaseExtensionType):
        return kind.storage_type
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def tensor_error(kind: pa.DataType, shape: tuple[int, ...]) -> str | None:
    """Return why values of this type lie in another order than rows of this shape, or None."""
    order = getattr(kind, "permutation", None) or []
    # A tensor may be flat, or have dimensions of 1 beside the others.
    wide = [size for size in getattr(kind, "shape", shape) if size != 1]
    if order == sorted(order) and wide in ([size for size in shape if size != 1], [prod(shape)]):
        return None
    return f"has type {kind}, which is transposed or not {' x '.join(map(str, shape))}"


def name_in_file(column: Column, key: str, present: Collection[str], given: str | None) -> str:
    """Return the name in a file of a task's column `key`: the given one, else a usual one."""
    if given is not None:
        return given
    usual = column.names or (key,)
    return next((name for name in usual if name in present), usual[0])


def decode_columns(
    columns: Mapping[str, Column], rows: pa.Table | pa.RecordBatch, names: Mapping[str, str]
) -> tuple[Arrays, Reasons]:
    """Decode columns of a table, where they have these names.

    Returns the rows by the columns' names in the task, and one reason for each rejected row.
    """
    arrays: Arrays = {}
    joined: Reasons = {}
    for key, column in columns.items():
        arrays[key], reasons = column.decode(one_chunk(rows[names[key]]), key)
        for row, reason in reasons.items():
            joined[row] = f"{joined[row]}; {reason}" if row in joined else reason
    return arrays, dict(sorted(joined.items()))


def rows_in(size: int, columns: Iterable[Column]) -> int:
    """Return how many rows with these columns fit into this many bytes: at least one.

    A row counts as a KiB at least, for what it costs beside its values.
    """
    row_bytes = sum(column.row_bytes for column in columns)
    return max(1, size // max(1024, row_bytes))


@dataclass
class ReasonCounts:
    """Counts of rejected rows by reason, and the first of these rows."""

    # All reasons after the first twenty are one entry, so that the counts stay small.
    reasons: Counter[str] = field(default_factory=Counter)
    examples: list[RejectedRow] = field(default_factory=list)

    def add(self, reasons: Mapping[str, int], examples: Iterable[RejectedRow]) -> None:
        """Add counts of other rows, and those rows or the first of them."""
        for reason, rows in reasons.items():
            is_counted = reason in self.reasons or len(self.reasons) < 20
            self.reasons[reason if is_counted else "other reasons"] += rows
        self.examples = sorted([*self.examples, *examples])[:5]

    @property
    def total(self) -> int:
        return self.reasons.total()

    def describe(self) -> str:
        """Return the first rejected rows by reason, for a message."""
        rows: dict[str, list[str]] = {}
        for file, row, reason in self.examples:
            rows.setdefault(reason, []).append(f"{file}: row {row}")
        texts = [f"{', '.join(places)}: {reason}" for reason, places in rows.items()]
        if self.total > len(self.examples):
            texts.append("…")
        return " | ".join(texts)
