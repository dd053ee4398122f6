"""What a kind of column is: it turns an Arrow column into an array, or says why it cannot.

A value that cannot be used gets a reason, and zeros in its place.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, ClassVar, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mnistsum_ray.errors import shortened

NULL: Final = "is null; fill it in or drop the row"
LISTS: Final = (pa.ListType, pa.LargeListType, pa.FixedSizeListType)
_OF_VIEWS: Final = {pa.string_view(): pa.large_string(), pa.binary_view(): pa.large_binary()}
TEXTS: Final = (pa.string(), pa.large_string(), pa.string_view())

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
    is_passed_on: ClassVar[bool] = True
    """Whether scoring writes the column to its output again."""

    def __post_init__(self) -> None:
        problem = self.problem()
        if problem:
            raise ValueError(f"{type(self).__name__}: {problem}")

    def problem(self) -> str | None:
        """Return what is wrong with the arguments, or None."""
        return None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one decoded row."""
        return ()

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of its classes in their order; none if it has no classes, or very many."""
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

    def read(self, column: ArrowColumn, name: str) -> tuple[Array, Reasons]:
        """Return rows as a batch has them, and why some cannot be used; see `decode`."""
        return self.decode(column, name)

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


def reasons_of(column: pa.Array, name: str, is_right: Array, wanted: str) -> Reasons:
    """Return why values that are not right cannot be used: they are null, or not `wanted`."""
    reasons: Reasons = {}
    for row in np.flatnonzero(~is_right).tolist():
        value, problem = column[row], NULL
        if value.is_valid:
            is_list = isinstance(value, pa.ListScalar)
            shown = f"a list of {len(value)}" if is_list else shortened(repr(value.as_py()))
            problem = f"is {shown}, {wanted}; correct it or drop the row"
        reasons[row] = f"the {name} {problem}"
    return reasons


def is_number(kind: pa.DataType) -> bool:
    """Return whether values of this type are integers, floats or decimals."""
    checks = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal)
    return any(check(kind) for check in checks)


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
    if isinstance(column, pa.DictionaryArray):
        values = column.dictionary
        large = _OF_VIEWS.get(values.type, values.type)  # Arrow cannot take from views
        return values.cast(large).take(column.indices).cast(values.type)
    return column


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


class ColumnError(ValueError):
    """A file cannot be used for a task; the message names the column and the flag."""


def find_columns(
    columns: Mapping[str, Column],
    schema: pa.Schema,
    given: Mapping[str, str | None],
    flag_of: Callable[[str], str],
) -> dict[str, str]:
    """Return which column of a file is read for which column of the task.

    Args:
        columns: the task's columns by name.
        schema: names and types of the file's columns.
        given: the file's name of a column, where a flag sets it.
        flag_of: the flag that sets the name of a column, for messages.

    Raises:
        ColumnError: a column is missing or ambiguous, or has a type that cannot be decoded.
    """
    found: dict[str, str] = {}
    for key, column in columns.items():
        usual = column.names or (key,)
        name = given.get(key) or next((one for one in usual if one in schema.names), usual[0])
        flag, count = flag_of(key), schema.names.count(name)
        if count != 1:
            present = shortened(", ".join(schema.names))
            how_many = f"{count} columns" if count else "no column"
            raise ColumnError(f"has {how_many} {name!r} but {present}; {flag} names another")
        if name in found.values():
            raise ColumnError(
                f"column {name!r} would be two columns of the task; {flag} names another"
            )
        problem = column.type_error(schema.field(name).type)
        if problem:
            raise ColumnError(f"column {name!r} {problem}; convert it, or {flag} names another")
        found[key] = name
    return found


def decode_columns(
    columns: Mapping[str, Column],
    rows: pa.Table | pa.RecordBatch,
    names: Mapping[str, str],
    *,
    for_batch: bool = False,
) -> tuple[Arrays, Reasons]:
    """Decode columns of a table, where they have these names; `for_batch`: by `read`.

    Returns the rows by the columns' names in the task, and one reason for each rejected row.
    """
    arrays: Arrays = {}
    joined: Reasons = {}
    for key, column in columns.items():
        decode = column.read if for_batch else column.decode
        arrays[key], reasons = decode(one_chunk(rows[names[key]]), key)
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
