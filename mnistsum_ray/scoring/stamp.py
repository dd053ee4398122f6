"""The stamp in the Parquet metadata of each output file, which says what the file was made from.

The output needs no other bookkeeping: which parts are done, and whether all rows exist, is read from these stamps.
"""

import json
from collections.abc import Mapping
from functools import partial
from typing import Any, Final

import pyarrow as pa

from mnistsum_ray.data.parquet import read_footer
from mnistsum_ray.errors import UnusableFileError, one_line
from mnistsum_ray.scoring.parts import PART_SCHEMA
from mnistsum_ray.storage.location import Location, retried

PREDICTIONS: Final = "predictions"
"""Folder of the scored rows."""

REJECTED: Final = "rejected"
"""Folder of the rejected rows; its files have the names of the prediction files."""

KEY: Final = b"mnistsum_ray.score"
"""Key of the stamp in the Parquet metadata."""

FORMAT: Final = 7
"""Version of the stamp and of how files are split; an output of another version is refused. 5 dropped temperatures, which are in
the weights; 6 moved the counts to a key of their own; 7 splits files without regard to their row groups."""

COUNTS_KEY: Final = b"mnistsum_ray.counts/2"
"""Key of `counts.Counts`, with its version. The counts are for the report alone: a file without them is resumed too."""

STAMP_SCHEMA: Final = pa.schema(
    [
        *PART_SCHEMA,
        ("source", pa.string()),  # the input file in full: a path, or a URI without its query
        ("rejected", pa.int64()),  # how many of the rows are in the file of rejected rows
        ("spec", pa.string()),  # `preflight.Plan.spec`: model and settings
    ]
)
"""A stamp: what one part was made from; in its file of predictions and in its file of rejected rows."""

OUTPUT_SCHEMA: Final = pa.schema(
    [
        *STAMP_SCHEMA,  # `output` is the file's own name, relative to its folder
        ("counts", pa.string()),  # JSON of `counts.Counts`, or `{}`
        ("folder", pa.string()),  # PREDICTIONS or REJECTED
        ("rows_in_file", pa.int64()),  # by its footer
        ("error", pa.string()),  # why it is not a whole file of this version of the program
    ]
)
"""One row per output file, with its stamp. With an error, the stamp is null."""


def to_metadata(stamp: dict[str, Any], counts: dict[str, Any]) -> dict[bytes, bytes]:
    """A stamp and `counts.Counts` as entries of Parquet metadata."""
    fields = {"format": FORMAT} | stamp
    return {KEY: json.dumps(fields).encode(), COUNTS_KEY: json.dumps(counts, separators=(",", ":")).encode()}


def from_metadata(metadata: Mapping[bytes, bytes] | None) -> dict[str, Any]:
    """The stamp in Parquet metadata.

    Raises:
        UnusableFileError: there is none, it is damaged, or another version of this program wrote it.
    """
    if not metadata or KEY not in metadata:
        raise UnusableFileError("is not a file of this program")
    try:
        stamp: dict[str, Any] = json.loads(metadata[KEY])
        if stamp.pop("format") != FORMAT:
            raise UnusableFileError("was written by another version of this program")
        return {name: stamp[name] for name in STAMP_SCHEMA.names}
    except (AttributeError, KeyError, json.JSONDecodeError) as error:
        raise UnusableFileError(f"cannot be read: {one_line(error)}") from None


def read_stamps(output: Location, files: pa.Table) -> pa.Table:
    """Read the stamps of files in an output folder, as OUTPUT_SCHEMA in the same order.

    Args:
        output: the folder.
        files: `inputs.FILE_SCHEMA`.

    Raises:
        StorageError: the storage does not give a file, for half a minute.
    """
    rows = [retried(partial(_read_file, output, file["name"], file["size"])) for file in files.to_pylist()]
    return pa.Table.from_pylist(rows, OUTPUT_SCHEMA)


def _read_file(folder: Location, file: str, size: int) -> dict[str, Any]:
    top, _, output = file.partition("/")
    place = {"folder": top, "output": output}
    try:
        footer = read_footer(folder / file, size).metadata
        stamp = from_metadata(footer.metadata)
    except UnusableFileError as error:
        return place | {"error": str(error)}
    counts = footer.metadata.get(COUNTS_KEY, b"{}").decode()
    return stamp | place | {"rows_in_file": footer.num_rows, "counts": counts}
