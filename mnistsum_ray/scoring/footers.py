"""What the footers of the input files say: rows, row groups, and whether the columns that are needed are there."""

import hashlib
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mnistsum_ray.config import ScoreConfig
from mnistsum_ray.data.arrow_types import plain_arrow_types
from mnistsum_ray.data.decoding import image_form_error, number_form_error
from mnistsum_ray.data.parquet import UnusableFileError, lossy_column, row_groups, without_views
from mnistsum_ray.errors import RequestError, one_line
from mnistsum_ray.scoring.layout import PREDICTION_FIELDS
from mnistsum_ray.storage.location import Location

FOOTER_SCHEMA: Final = pa.schema(
    {
        "rows": pa.int64(),
        "groups": pa.list_(pa.int64()),  # rows of each row group
        "bytes": pa.int64(),  # of all columns, decompressed
        "footer": pa.string(),  # SHA-256 of the footer
        "error": pa.string(),  # why the file cannot be scored
        "missing": pa.string(),  # the first column that it lacks
    }
)

_TAIL_BYTES: Final = 64 * 1024
"""What is read at once from a file's end: most footers are shorter."""


@dataclass(frozen=True)
class Columns:
    """The names of the columns that scoring looks into."""

    image: str
    number: str
    label: str | None

    @classmethod
    def of(cls, config: ScoreConfig) -> "Columns":
        return cls(config.image_column, config.number_column, config.label_column)

    def flags(self) -> dict[str, str]:
        """Column by flag."""
        flags = {"--image-column": self.image, "--number-column": self.number}
        return flags | ({"--label-column": self.label} if self.label else {})


def read_tail(folder: Location, name: str, size: int) -> bytes:
    """A Parquet file's footer with the eight bytes after it.

    Raises:
        BadFile: the file does not end as a Parquet file does.
        OSError: it cannot be read.
    """
    if size < 12:
        raise UnusableFileError(f"is {'empty (0 bytes)' if not size else f'only {size} bytes long'}; write it anew")
    with folder.filesystem.open_input_file(f"{folder.path}/{name}") as stream:
        start = max(0, size - _TAIL_BYTES)
        stream.seek(start)
        tail: bytes = stream.read()
        if start + len(tail) != size:
            raise UnusableFileError(
                f"has {start + len(tail):,} bytes where the listing says {size:,}: it is being written; try again later"
            )
        if tail[-4:] != b"PAR1":
            raise UnusableFileError("is not Parquet, or was cut off (it does not end with PAR1); write it anew")
        length = int.from_bytes(tail[-8:-4], "little") + 8
        if length > size - 4:
            raise UnusableFileError("has a damaged footer (longer than the file); write it anew")
        if length > len(tail):
            stream.seek(size - length)
            tail = stream.read()
    return tail[-length:]


def read_footers(folder: Location, files: pa.Table, columns: Columns) -> pa.Table:
    """FOOTER_SCHEMA for each file of an `inputs.FILE_SCHEMA` table, in its order."""
    plain_arrow_types()
    return pa.Table.from_pylist([_read_footer(folder, file, columns) for file in files.to_pylist()], FOOTER_SCHEMA)


def _read_footer(folder: Location, file: dict[str, Any], columns: Columns) -> dict[str, Any]:
    try:
        tail = read_tail(folder, file["name"], file["size"])
        metadata = pq.read_metadata(pa.BufferReader(tail))
        schema = metadata.schema.to_arrow_schema()
        groups, size = row_groups(metadata, file["size"])
        error = _columns_error(schema, columns) or lossy_column(metadata.schema, columns.image)
    except UnusableFileError as bad:
        return {"error": str(bad)}
    except Exception as failure:  # whatever one file leads to, it must not end the run
        return {"error": f"cannot be read: {one_line(failure)} ({type(failure).__name__})"}
    missing = next((name for name in columns.flags().values() if name not in schema.names), None)
    return {
        "rows": sum(groups),
        "groups": groups,
        "bytes": size,
        "footer": hashlib.sha256(tail).hexdigest(),
        "error": error,
        "missing": missing,
    }


def _columns_error(schema: pa.Schema, columns: Columns) -> str | None:
    for flag, name in columns.flags().items():
        if name not in schema.names:
            return f"has no column {name!r} but {_some(schema.names)}; {flag} names another"
        if len(schema.get_all_field_indices(name)) > 1:
            return f"has more than one column {name!r}; rename all but one"
        kind = without_views(schema.field(name).type)
        form_error = image_form_error(kind) if name == columns.image else number_form_error(kind)
        if form_error:
            return f"column {name!r} {form_error}; convert it, or {flag} names another"
    taken = next((name for name in PREDICTION_FIELDS.names if name in schema.names), None)
    return f"has a column {taken!r}, which scoring would add; rename it" if taken else None


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:10])) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def check_columns_exist(names: pa.ChunkedArray, footers: pa.Table, columns: Columns) -> None:
    """Refuse a column that not one of the readable files has: then it is the request that is wrong.

    Raises:
        RequestError: names the flag.
    """
    readable = pc.is_valid(footers["rows"])
    for flag, column in columns.flags().items():
        lacks = pc.fill_null(pc.equal(footers["missing"], column), False)
        if pc.any(readable).as_py() and pc.all(pc.equal(lacks, readable)).as_py():
            first = pc.index(lacks, True).as_py()
            error = footers["error"][first].as_py().partition(";")[0]
            raise RequestError(f"{flag} {column}: no file of --input has such a column; {names[first]} {error}")
