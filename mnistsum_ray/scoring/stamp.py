"""The stamp in the Parquet metadata of each output file, which says what the file was made from.

The output needs no other bookkeeping: which parts are done, and whether all rows exist, is read from these stamps.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from mnistsum_ray.data.parquet import read_footer, storage_error
from mnistsum_ray.errors import UnusableFileError, one_line
from mnistsum_ray.model.heads import PREDICTION_FIELDS
from mnistsum_ray.scoring.footers import Columns
from mnistsum_ray.scoring.parts import Part
from mnistsum_ray.storage.location import Location, retried

PREDICTIONS: Final = "predictions"
"""Folder of the scored rows."""

REJECTED: Final = "rejected"
"""Folder of the rejected rows; its files have the names of the prediction files."""

KEY: Final = b"mnistsum_ray.score"
"""Key of the stamp in the Parquet metadata."""

FORMAT: Final = 5
"""Version of the stamp. 2 added temperatures and reliability; 3 renamed `request` to `spec` and `footer` to `footer_sha256`;
4 added frequencies, examples and the least sure rows to the counts; 5 dropped temperatures, which are in the weights."""

FILE_IDENTITY: Final = ("size", "modified", "footer_sha256")
"""Fields that say which version of the input file the rows were read from."""

PART_IDENTITY: Final = (*FILE_IDENTITY, "first_row", "rows")
"""Fields that must equal those of the planned part of the same output name."""


@dataclass(frozen=True)
class PredictionSpec:
    """The model and settings that determine the predictions. One output holds predictions of one spec."""

    model_sha256: str
    precision: str
    columns: Columns
    int8_maxima: tuple[float, ...] | None = None
    """Calibration of the quantized network; set with precision int8 only."""

    def canonical_json(self) -> str:
        """The spec as JSON with sorted keys, so that equal specs have equal texts."""
        fields = {"model_sha256": self.model_sha256, "precision": self.precision, **vars(self.columns)}
        fields |= {"prediction_columns": PREDICTION_FIELDS.names}
        return json.dumps(fields | ({"int8": self.int8_maxima} if self.int8_maxima else {}), sort_keys=True)


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
    """`PredictionSpec.canonical_json`"""
    counts: dict[str, Any]
    """`totals.count_part`"""

    @classmethod
    def of_part(cls, part: Part, source: Location, rejected: int, spec: PredictionSpec, counts: dict[str, Any]) -> "Stamp":
        """Make the stamp of a part whose file is below the folder `source`."""
        return cls(
            name=part.name,
            source=source.at(f"{source.path}/{part.name}").display,
            size=part.size,
            modified=part.modified,
            footer_sha256=part.footer_sha256,
            first_row=part.first_row,
            rows=part.rows,
            rejected=rejected,
            spec=spec.canonical_json(),
            counts=counts,
        )

    def to_metadata(self) -> dict[bytes, bytes]:
        """The stamp as an entry of Parquet metadata."""
        return {KEY: json.dumps({"format": FORMAT} | vars(self)).encode()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[bytes, bytes] | None) -> "Stamp | None":
        """Read the stamp from Parquet metadata; None if it has none.

        Raises:
            UnusableFileError: it is damaged, or another version of this program wrote it.
        """
        try:
            fields = json.loads((metadata or {}).get(KEY, b"null"))
            if fields is None:
                return None
            if fields["format"] != FORMAT:
                raise UnusableFileError("was written by another version of this program")
            return cls(**{key: value for key, value in fields.items() if key != "format"})
        except (TypeError, KeyError, json.JSONDecodeError) as error:
            raise UnusableFileError(f"cannot be read: {one_line(error)}") from None


COMMITTED_SCHEMA: Final = pa.schema(
    {
        "output": pa.string(),  # the prediction file, relative to the folder of predictions
        "error": pa.string(),  # why it is not a whole file of this program; all other columns are then null
        "name": pa.string(),
        "source": pa.string(),
        "size": pa.int64(),
        "modified": pa.int64(),
        "footer_sha256": pa.string(),
        "first_row": pa.int64(),
        "rows": pa.int64(),
        "rejected": pa.int64(),  # rejected rows by the stamp
        "spec": pa.string(),
        "counts": pa.string(),  # JSON
        "scored_in_file": pa.int64(),  # rows of the prediction file by its footer
        "rejected_in_file": pa.int64(),  # rows of the file of rejected rows by its footer
    }
)
"""One row per prediction file: its stamp, and the rows that the files really have."""


def has_stamp(folder: Location, name: str) -> bool:
    """Return whether a file carries a stamp, of any version: then this program wrote it.

    Raises:
        StorageError: the storage does not answer.
    """
    try:
        footer = _footer(folder / name)
    except UnusableFileError:
        return False
    return footer is not None and KEY in (footer.metadata or {})


def read_committed(output: Location, files: pa.Table) -> pa.Table:
    """Read the stamps of the prediction files in an `inputs.FILE_SCHEMA` table, as COMMITTED_SCHEMA in the same order.

    Raises:
        StorageError: the storage does not give a file, for half a minute.
    """
    rows = [retried(partial(_read_file, output, file["name"], file["size"])) for file in files.to_pylist()]
    return pa.Table.from_pylist(rows, COMMITTED_SCHEMA)


def _read_file(output: Location, name: str, size: int) -> dict[str, Any]:
    try:
        footer = read_footer(output / PREDICTIONS / name, size).metadata
        stamp = Stamp.from_metadata(footer.metadata)
        if stamp is None:
            return {"output": name, "error": "is not a file of predictions of this program"}
        rejected = _footer(output / REJECTED / name) if stamp.rejected else None
        if stamp.rejected and rejected is None:
            return {"output": name, "error": f"has lost its rejected rows ({REJECTED}/{name})"}
    except UnusableFileError as error:
        return {"output": name, "error": str(error)}
    in_files = {"scored_in_file": footer.num_rows, "rejected_in_file": rejected.num_rows if rejected else 0}
    return {"output": name} | vars(stamp) | {"counts": json.dumps(stamp.counts, separators=(",", ":"))} | in_files


def _footer(file: Location) -> pq.FileMetaData | None:
    """The footer of a file whose size is not known; None where there is no such file."""
    try:
        info = file.info()
    except OSError as error:
        raise storage_error(file, error) from error
    if info.type == pafs.FileType.NotFound:
        return None
    return read_footer(file, info.size).metadata
