"""The stamp in the Parquet metadata of each output file, which says what the file was made from.

The output needs no other bookkeeping: which parts are done, and whether all rows exist, is read from these stamps.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import pyarrow as pa

from mnistsum_ray.data.parquet import read_footer
from mnistsum_ray.errors import UnusableFileError, one_line
from mnistsum_ray.storage.location import Location, retried

PREDICTIONS: Final = "predictions"
"""Folder of the scored rows."""

REJECTED: Final = "rejected"
"""Folder of the rejected rows; its files have the names of the prediction files."""

KEY: Final = b"mnistsum_ray.score"
"""Key of the stamp in the Parquet metadata."""

FORMAT: Final = 6
"""Version of the stamp; an output of another version is refused. 5 dropped temperatures, which are in the weights; 6 moved the
counts to a key of their own."""

COUNTS_KEY: Final = b"mnistsum_ray.counts"
"""Key of `summary.Counts`. The counts are for the report alone: a file without them, or with those of another version, is
resumed too."""

COUNTS_FORMAT: Final = 1

FILE_IDENTITY: Final = ("size", "modified", "footer_sha256")
"""Fields that say which version of the input file the rows were read from."""

PART_IDENTITY: Final = (*FILE_IDENTITY, "first_row", "rows")
"""Fields that must equal those of the planned part of the same output name."""


@dataclass(frozen=True)
class Stamp:
    """What one part was made from; in its file of predictions and in its file of rejected rows."""

    name: str
    """The input file, relative to the input's root."""
    source: str
    """The input file in full: a path, or a URI without its query."""
    size: int
    modified: int
    footer_sha256: str
    first_row: int
    rows: int
    rejected: int
    """How many of the rows are in the file of rejected rows."""
    spec: str
    """`preflight.Plan.spec`: model and settings."""
    counts: dict[str, Any] = field(default_factory=dict, compare=False)
    """`summary.Counts`; empty if they are of another version. Equal stamps may have other counts, from other hardware."""

    def to_metadata(self) -> dict[bytes, bytes]:
        """The stamp as entries of Parquet metadata."""
        fields = {"format": FORMAT} | {name: value for name, value in vars(self).items() if name != "counts"}
        counts = {"format": COUNTS_FORMAT} | self.counts
        return {KEY: json.dumps(fields).encode(), COUNTS_KEY: json.dumps(counts, separators=(",", ":")).encode()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[bytes, bytes] | None) -> "Stamp | None":
        """Read the stamp from Parquet metadata; None if it has none.

        Raises:
            UnusableFileError: it is damaged, or another version of this program wrote it.
        """
        try:
            fields, counts = (json.loads((metadata or {}).get(key, b"null")) for key in (KEY, COUNTS_KEY))
            if fields is None:
                return None
            if fields.pop("format") != FORMAT:
                raise UnusableFileError("was written by another version of this program")
            return cls(**fields, counts=counts if counts and counts.pop("format") == COUNTS_FORMAT else {})
        except (TypeError, KeyError, json.JSONDecodeError) as error:
            raise UnusableFileError(f"cannot be read: {one_line(error)}") from None


STAMP_SCHEMA: Final = pa.schema(
    {
        "folder": pa.string(),  # PREDICTIONS or REJECTED
        "output": pa.string(),  # the file, relative to that folder
        "error": pa.string(),  # why it is not a whole file of this version; the stamp is then null
        "ours": pa.bool_(),  # whether it has a stamp, of any version: then this program wrote it
        "rows_in_file": pa.int64(),  # by its footer
    }
    | {of.name: pa.int64() if of.type is int else pa.string() for of in dataclasses.fields(Stamp)}  # `counts` as JSON
)
"""One row per output file, with its stamp."""


def read_stamps(output: Location, files: pa.Table) -> pa.Table:
    """Read the stamps of files in an output folder, as STAMP_SCHEMA in the same order.

    Args:
        output: the folder.
        files: `inputs.FILE_SCHEMA`.

    Raises:
        StorageError: the storage does not give a file, for half a minute.
    """
    rows = [retried(partial(_read_file, output, file["name"], file["size"])) for file in files.to_pylist()]
    return pa.Table.from_pylist(rows, STAMP_SCHEMA)


def _read_file(folder: Location, file: str, size: int) -> dict[str, Any]:
    top, _, output = file.partition("/")
    row: dict[str, Any] = {"folder": top, "output": output, "ours": False}
    try:
        footer = read_footer(folder / file, size).metadata
        row |= {"ours": KEY in (footer.metadata or {}), "rows_in_file": footer.num_rows}
        stamp = Stamp.from_metadata(footer.metadata)
        if stamp is None:
            raise UnusableFileError("is not a file of this program")
    except UnusableFileError as error:
        return row | {"error": str(error)}
    return row | vars(stamp) | {"counts": json.dumps(stamp.counts)}
