"""Lists of whole numbers of different lengths, such as the tokens of a text."""

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
    plain,
    plain_type,
    reasons_of,
)


@dataclass(frozen=True)
class Tokens(Column):
    """Lists of at most `length` whole numbers 0..below - 1: int64[n, length], -1 after the end.

    In files they are lists of integers. The mask is `batch["tokens"] >= 0`, and an embedding takes
    `batch["tokens"].clamp(min=0)`. A longer list is rejected: cut it first.
    """

    below: int
    length: int

    dtype: ClassVar[str] = "int64"

    def problem(self) -> str | None:
        for name in ("below", "length"):
            value = getattr(self, name)
            if not isinstance(value, int) or not 1 <= value < 2**31:
                return f"{name} is {value!r}, and must be an integer of at least 1"
        return None

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.length,)

    @property
    def form(self) -> str:
        return f"lists of at most {self.length} whole numbers in 0..{self.below - 1}"

    def type_error(self, kind: pa.DataType) -> str | None:
        values = plain_type(kind)
        if pa.types.is_null(values):
            return None
        if isinstance(values, LISTS) and not isinstance(kind, pa.BaseExtensionType):
            inner = values.value_type
            if pa.types.is_integer(inner) or pa.types.is_null(inner):
                return None
        return f"has type {kind}, which holds no lists of integers"

    def decode(self, column: ArrowColumn, name: str) -> tuple[Array, Reasons]:
        lists = plain(column).cast(pa.large_list(pa.int64()), safe=False)
        lengths = pc.list_value_length(lists).fill_null(-1).to_numpy(zero_copy_only=False)
        found = np.full((len(lists), self.length), -1, np.int64)
        fits = (lengths >= 0) & (lengths <= self.length)
        values = lists.filter(pa.array(fits)).flatten().fill_null(-1)
        is_token = np.arange(self.length) < np.where(fits, lengths, 0)[:, None]
        found[is_token] = values.to_numpy(zero_copy_only=False)
        is_wrong = is_token & ((found < 0) | (found >= self.below))
        is_right = fits & ~is_wrong.any(axis=1)
        found[~is_right] = 0
        wanted = f"not at most {self.length} whole numbers in 0..{self.below - 1}"
        return found, reasons_of(lists, name, is_right, wanted)

    def random(self, rows: int, generator: np.random.Generator) -> Array:
        tokens = generator.integers(self.below, size=(rows, self.length))
        lengths = generator.integers(1, self.length + 1, size=rows)
        return np.where(np.arange(self.length) < lengths[:, None], tokens, -1)
