"""Provenance: the stamp in the Parquet metadata of each output file, which says what the file was made from.

The output needs no other bookkeeping: which parts are done, and whether all rows exist, is read from these stamps.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from mnistsum_ray.data.parquet import UnusableFileError, read_footer
from mnistsum_ray.errors import one_line
from mnistsum_ray.model.calibration import Temperatures
from mnistsum_ray.model.predictions import PREDICTION_FIELDS
from mnistsum_ray.scoring.input_columns import Columns
from mnistsum_ray.scoring.layout import PREDICTIONS, REJECTED
from mnistsum_ray.scoring.parts import Part
from mnistsum_ray.storage.location import Location

KEY: Final = b"mnistsum_ray.score"
"""Key of the stamp in the Parquet metadata."""

FORMAT: Final = 4
"""Version of the stamp. 2 added temperatures and reliability; 3 renamed `request` to `spec` and `footer` to `footer_sha256`;
4 added frequencies, examples and the least sure rows to the counts."""

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
    temperatures: Temperatures
    int8_maxima: tuple[float, ...] | None = None
    """Calibration of the quantized network; set with precision int8 only."""

    def canonical_json(self) -> str:
        """The spec as JSON with sorted keys, so that equal specs have equal texts."""
        fields = {"model_sha256": self.model_sha256, "precision": self.precision, **vars(self.columns)}
        fields |= {"temperature": self.temperatures.as_json(), "prediction_columns": PREDICTION_FIELDS.names}
        return json.dumps(fields | ({"int8": self.int8_maxima} if self.int8_maxima else {}), sort_keys=True)


@dataclass(frozen=True)
class Provenance:
    """The stamp of one part, written into its file of predictions and its file of rejected rows."""

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
    def of_part(cls, part: Part, source: Location, rejected: int, spec: PredictionSpec, counts: dict[str, Any]) -> "Provenance":
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
    def from_metadata(cls, metadata: Mapping[bytes, bytes] | None) -> "Provenance | None":
        """Read the stamp from Parquet metadata; None if it has none.

        Raises:
            OtherVersionError: another version of this program wrote it.
            ValueError, KeyError, TypeError: it is damaged.
        """
        fields = json.loads((metadata or {}).get(KEY, b"null"))
        if fields is None:
            return None
        if fields["format"] != FORMAT:
            raise OtherVersionError("was written by another version of this program")
        return cls(**{key: value for key, value in fields.items() if key != "format"})


class OtherVersionError(ValueError):
    """The stamp has a format that this version does not read."""


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


def has_provenance(folder: Location, name: str) -> bool:
    """Return whether a file carries a stamp, of any version: then this program wrote it."""
    try:
        size = (folder / name).info().size
        metadata = _footer(folder, name, size or 0).metadata
    except (UnusableFileError, OSError, pa.ArrowException):
        return False
    return KEY in (metadata or {})


def read_committed(output: Location, files: pa.Table) -> pa.Table:
    """Read the stamps of the prediction files in an `inputs.FILE_SCHEMA` table, as COMMITTED_SCHEMA in the same order."""
    return pa.Table.from_pylist([_read_file(output, file["name"], file["size"]) for file in files.to_pylist()], COMMITTED_SCHEMA)


def _read_file(output: Location, name: str, size: int) -> dict[str, Any]:
    try:
        footer = _footer(output, f"{PREDICTIONS}/{name}", size)
        stamp = Provenance.from_metadata(footer.metadata)
        if stamp is None:
            return {"output": name, "error": "is not a file of predictions of this program"}
        rejected_in_file = 0
        if stamp.rejected:
            rejected_size = (output / REJECTED / name).info().size
            if rejected_size is None:
                return {"output": name, "error": f"has lost its rejected rows ({REJECTED}/{name})"}
            rejected_in_file = _footer(output, f"{REJECTED}/{name}", rejected_size).num_rows
    except OtherVersionError as error:
        return {"output": name, "error": str(error)}
    except (UnusableFileError, OSError, pa.ArrowException, ValueError, KeyError, TypeError) as error:
        return {"output": name, "error": f"cannot be read: {one_line(error)}"}
    in_files = {"scored_in_file": footer.num_rows, "rejected_in_file": rejected_in_file}
    return {"output": name} | vars(stamp) | {"counts": json.dumps(stamp.counts, separators=(",", ":"))} | in_files


def _footer(folder: Location, name: str, size: int) -> pq.FileMetaData:
    return pq.read_metadata(pa.BufferReader(read_footer(folder.filesystem, f"{folder.path}/{name}", size)))
