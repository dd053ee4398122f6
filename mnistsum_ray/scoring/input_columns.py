"""The input columns that scoring reads, and the checks of a file's schema against them."""

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from mnistsum_ray.config import ScoreConfig
from mnistsum_ray.data.column_types import image_type_error, number_type_error
from mnistsum_ray.data.parquet_types import without_views
from mnistsum_ray.errors import RequestError
from mnistsum_ray.model.predictions import PREDICTION_FIELDS


@dataclass(frozen=True)
class Columns:
    """Names of the input columns that scoring reads; all other columns pass through."""

    image: str
    number: str
    label: str | None

    @classmethod
    def from_config(cls, config: ScoreConfig) -> "Columns":
        return cls(config.image_column, config.number_column, config.label_column)

    def by_flag(self) -> dict[str, str]:
        """The column names by the flag that sets them."""
        flags = {"--image-column": self.image, "--number-column": self.number}
        return flags | ({"--label-column": self.label} if self.label else {})


def schema_error(schema: pa.Schema, columns: Columns) -> str | None:
    """Return why a file with this schema cannot be scored, or None if it can."""
    for flag, name in columns.by_flag().items():
        if name not in schema.names:
            return f"has no column {name!r} but {_first_ten(schema.names)}; {flag} names another"
        if len(schema.get_all_field_indices(name)) > 1:
            return f"has more than one column {name!r}; rename all but one"
        kind = without_views(schema.field(name).type)
        type_error = image_type_error(kind) if name == columns.image else number_type_error(kind)
        if type_error:
            return f"column {name!r} {type_error}; convert it, or {flag} names another"
    added = next((name for name in PREDICTION_FIELDS.names if name in schema.names), None)
    return f"has a column {added!r}, which scoring would add; rename it" if added else None


def _first_ten(names: list[str]) -> str:
    return ", ".join(map(repr, names[:10])) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def check_columns_exist(names: pa.ChunkedArray, footers: pa.Table, columns: Columns) -> None:
    """Refuse a column that none of the readable files has: a wrong flag, not a wrong file, is then the likely cause.

    `names` are those of the input files, in the order of `footers` (`footers.FOOTER_SCHEMA`).

    Raises:
        RequestError: names the flag, the first file and its columns.
    """
    readable = pc.is_valid(footers["rows"])
    for flag, column in columns.by_flag().items():
        lacks = pc.fill_null(pc.equal(footers["missing_column"], column), False)
        if pc.any(readable).as_py() and pc.all(pc.equal(lacks, readable)).as_py():
            first = pc.index(lacks, True).as_py()
            error = footers["error"][first].as_py().partition(";")[0]
            raise RequestError(f"{flag} {column}: no file of --input has such a column; {names[first]} {error}")
