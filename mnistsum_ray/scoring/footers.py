"""The columns that scoring reads, and the footers of the input files: rows, row groups, and whether a file can be scored."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc

from mnistsum_ray.cluster.map_files import map_files
from mnistsum_ray.config import ScoreConfig
from mnistsum_ray.data.images import image_type_error, number_type_error
from mnistsum_ray.data.inputs import Inputs
from mnistsum_ray.data.parquet import column_error, lossy_column, read_footer
from mnistsum_ray.errors import RequestError, UnusableFileError
from mnistsum_ray.model.heads import PREDICTION_FIELDS
from mnistsum_ray.storage.location import Location, retried

REJECTION_FIELDS: Final = pa.schema({"source_file": pa.string(), "source_row": pa.int64(), "reason": pa.string()})
"""Columns that scoring adds to rejected rows, after the input's."""

FOOTER_SCHEMA: Final = pa.schema(
    {
        "rows": pa.int64(),
        "group_rows": pa.list_(pa.int64()),  # rows of each row group
        "bytes": pa.int64(),  # of all columns, decompressed
        "footer_sha256": pa.string(),
        "error": pa.string(),  # why the file cannot be scored
        "missing_column": pa.string(),  # the first column that the request names and the file lacks
    }
)
"""One row per input file. A file whose footer cannot be used has an error and nulls."""


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


def read_all_footers(inputs: Inputs, columns: Columns, on_progress: Callable[[int], None] = lambda _: None) -> pa.Table:
    """Read the footers of all input files, in threads of this process or on the cluster (see `map_files`).

    Returns:
        FOOTER_SCHEMA, in the order of the files.

    Raises:
        RequestError: none of the files has one of the columns.
        StorageError: the storage does not give a file, for half a minute.
    """

    def read(folder: Location, files: pa.Table) -> pa.Table:
        return read_footers(folder, files, columns, inputs.unusable)

    footers = map_files(read, inputs.root, inputs.files, on_progress)
    _check_columns_exist(inputs.files["name"], footers, columns)
    return footers


def read_footers(folder: Location, files: pa.Table, columns: Columns, unusable: Mapping[str, str]) -> pa.Table:
    """Read the footers of the files in an `inputs.FILE_SCHEMA` table, as FOOTER_SCHEMA in the same order.

    `unusable` is `Inputs.unusable`.
    """
    rows = [
        {"error": unusable[file["name"]]} if file["name"] in unusable else _read_footer(folder, file, columns)
        for file in files.to_pylist()
    ]
    return pa.Table.from_pylist(rows, FOOTER_SCHEMA)


def _read_footer(folder: Location, file: dict[str, Any], columns: Columns) -> dict[str, Any]:
    name, size = file["name"], file["size"]
    try:
        footer = retried(lambda: read_footer(folder / name, size))
    except UnusableFileError as unusable:
        return {"error": str(unusable)}
    lossy = lossy_column(footer.metadata.schema, columns.image)
    return {
        "rows": sum(footer.group_rows),
        "group_rows": footer.group_rows,
        "bytes": footer.decompressed_bytes,
        "footer_sha256": footer.sha256,
        "error": _schema_error(footer.schema, columns) or _folder_error(name) or lossy,
        "missing_column": next((column for column in columns.by_flag().values() if column not in footer.schema.names), None),
    }


def _schema_error(schema: pa.Schema, columns: Columns) -> str | None:
    """Return why a file with this schema cannot be scored, or None if it can."""
    for flag, name in columns.by_flag().items():
        if name not in schema.names:
            return f"has no column {name!r} but {_first_ten(schema.names)}; {flag} names another"
        error = column_error(schema, name, image_type_error if name == columns.image else number_type_error)
        if error:
            return f"{error}, or {flag} names another"
    # DuckDB and Spark do not tell upper case from lower case.
    added = next((name for name in schema.names if name.lower() in PREDICTION_FIELDS.names), None)
    return f"has a column {added!r}, which scoring would add; rename it" if added else None


def _folder_error(name: str) -> str | None:
    """Return why a file's output could not lie in folders of these names; None if it can.

    Readers of Parquet take a folder `key=value` for a column, and its value for that of every row below.
    """
    for folder in name.split("/")[:-1]:
        key, equals, _ = folder.partition("=")
        if equals and unquote(key).lower() in (*PREDICTION_FIELDS.names, *REJECTION_FIELDS.names):
            return f"lies in a folder {folder!r}, which readers take for the column that scoring adds; rename the folder"
    return None


def _first_ten(names: list[str]) -> str:
    return ", ".join(map(repr, names[:10])) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _check_columns_exist(names: pa.ChunkedArray, footers: pa.Table, columns: Columns) -> None:
    """Refuse a column that none of the readable files has: a wrong flag, not a wrong file, is then the likely cause.

    `names` are those of the input files, in the order of `footers` (FOOTER_SCHEMA).

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
