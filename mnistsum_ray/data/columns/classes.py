"""Classes by name."""

from collections.abc import Sequence
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
    plain,
    plain_type,
    reasons_of,
)
from mnistsum_ray.errors import shortened


@dataclass(frozen=True)
class Classes(Column):
    """Classes by name, as their places in `classes`: int64[n].

    In files they are text or categories. Any other text is rejected; upper and lower case differ.
    """

    classes: Sequence[str]

    dtype: ClassVar[str] = "int64"

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(self.classes))  # a list cannot be hashed
        super().__post_init__()

    def problem(self) -> str | None:
        if not self.classes or not all(isinstance(name, str) for name in self.classes):
            return "must have the name of a class or more, as text"
        twice = [name for name in self.classes if self.classes.count(name) > 1]
        return f"has {twice[0]!r} twice" if twice else None

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(self.classes)

    @property
    def form(self) -> str:
        return shortened(f"one of {', '.join(self.classes)}")

    def type_error(self, kind: pa.DataType) -> str | None:
        is_known = plain_type(kind) in (pa.null(), *TEXTS)
        return None if is_known else f"has type {kind}, which holds no text or categories"

    def decode(self, column: ArrowColumn, name: str) -> tuple[Array, Reasons]:
        column = plain(column).cast(pa.string())
        places = pc.index_in(column, pa.array(self.classes, pa.string())).fill_null(-1)
        found = places.to_numpy(zero_copy_only=False).astype(np.int64)
        is_right = found >= 0
        wanted = shortened(f"not one of {', '.join(self.classes)}")
        return np.where(is_right, found, 0), reasons_of(column, name, is_right, wanted)

    def random(self, rows: int, generator: np.random.Generator) -> Array:
        return generator.integers(len(self.classes), size=rows)
