"""Parquet footers of the input files: rows, row groups, and whether the file can be scored."""

import hashlib
from collections.abc import Callable
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from mnistsum_ray.data.arrow_types import plain_arrow_types
from mnistsum_ray.data.parquet import UnusableFileError, read_footer, row_groups
from mnistsum_ray.data.parquet_types import lossy_column
from mnistsum_ray.errors import one_line
from mnistsum_ray.scoring.input_columns import Columns, check_columns_exist, schema_error
from mnistsum_ray.scoring.inputs import Inputs
from mnistsum_ray.scoring.parallel import map_files
from mnistsum_ray.storage.location import Location

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
"""One row per input file. A file whose footer cannot be read has an error and nulls."""


def read_all_footers(inputs: Inputs, columns: Columns, on_progress: Callable[[int], None] = lambda _: None) -> pa.Table:
    """Read the footers of all input files, in threads of this process or on the cluster (see `map_files`).

    Returns:
        FOOTER_SCHEMA, in the order of the files.

    Raises:
        RequestError: none of the files has one of the columns.
    """

    def read(folder: Location, files: pa.Table) -> pa.Table:
        return read_footers(folder, files, columns)

    footers = map_files(read, inputs.root, inputs.files, on_progress)
    check_columns_exist(inputs.files["name"], footers, columns)
    return footers


def read_footers(folder: Location, files: pa.Table, columns: Columns) -> pa.Table:
    """Read the footers of the files in an `inputs.FILE_SCHEMA` table, as FOOTER_SCHEMA in the same order."""
    with plain_arrow_types():
        return pa.Table.from_pylist([_read_footer(folder, file, columns) for file in files.to_pylist()], FOOTER_SCHEMA)


def _read_footer(folder: Location, file: dict[str, Any], columns: Columns) -> dict[str, Any]:
    try:
        footer = read_footer(folder.filesystem, f"{folder.path}/{file['name']}", file["size"])
        metadata = pq.read_metadata(pa.BufferReader(footer))
        schema = metadata.schema.to_arrow_schema()
        group_rows, decompressed_bytes = row_groups(metadata, file["size"])
        error = schema_error(schema, columns) or lossy_column(metadata.schema, columns.image)
    except UnusableFileError as unusable:
        return {"error": str(unusable)}
    except Exception as failure:  # Arrow raises many types for damaged bytes, and one bad file must not end the run.
        return {"error": f"cannot be read: {one_line(failure)} ({type(failure).__name__})"}
    return {
        "rows": sum(group_rows),
        "group_rows": group_rows,
        "bytes": decompressed_bytes,
        "footer_sha256": hashlib.sha256(footer).hexdigest(),
        "error": error,
        "missing_column": next((name for name in columns.by_flag().values() if name not in schema.names), None),
    }
