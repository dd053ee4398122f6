"""An output file is its own record: what its metadata say that it was made from, beside what it holds."""

import json
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from mnistsum_ray.data.parquet import UnusableFileError
from mnistsum_ray.errors import one_line
from mnistsum_ray.model.calibration import Temperatures
from mnistsum_ray.scoring.footers import Columns, read_tail
from mnistsum_ray.scoring.layout import REJECTED
from mnistsum_ray.storage.location import Location

KEY: Final = b"mnistsum_ray.score"
FORMAT: Final = 2
"""2 has the temperatures, and the reliability where a label column was named."""

PROBABILITY_BINS: Final = 20
"""Of equal width over 0..1, in which a file counts its rows by `digit_prob` and by `sum_prob`."""

COMMITTED_SCHEMA: Final = pa.schema(
    {
        "output": pa.string(),
        "error": pa.string(),  # why it is no whole file of ours; then all else is null
        "name": pa.string(),  # of the input file, relative to the input's root
        "source": pa.string(),  # the same in full
        "size": pa.int64(),
        "modified": pa.int64(),
        "footer": pa.string(),
        "first_row": pa.int64(),
        "rows": pa.int64(),
        "rejected": pa.int64(),
        "request": pa.string(),
        "counts": pa.string(),
        "scored_found": pa.int64(),
        "rejected_found": pa.int64(),
    }
)


def is_ours(folder: Location, name: str) -> bool:
    """Whether a file carries the metadata that this program writes, of whichever version."""
    try:
        size = (folder / name).info().size
        metadata = pq.read_metadata(pa.BufferReader(read_tail(folder, name, size or 0))).metadata
    except (UnusableFileError, OSError, pa.ArrowException):
        return False
    return KEY in (metadata or {})


def read_committed(output: Location, files: pa.Table) -> pa.Table:
    """COMMITTED_SCHEMA for each prediction file of an `inputs.FILE_SCHEMA` table, in its order."""
    return pa.Table.from_pylist([_read_committed(output, file) for file in files.to_pylist()], COMMITTED_SCHEMA)


def _read_committed(output: Location, file: dict[str, Any]) -> dict[str, Any]:
    name = file["name"]
    try:
        metadata = pq.read_metadata(pa.BufferReader(read_tail(output, name, file["size"])))
        stamp = json.loads((metadata.metadata or {}).get(KEY, b"null"))
        if stamp is None:
            return {"output": name, "error": "is not a file of predictions of this program"}
        if stamp["format"] != FORMAT:
            return {"output": name, "error": "was written by another version of this program"}
        rejected = 0
        if stamp["rejected"]:
            size = (output / REJECTED / name).info().size
            if size is None:
                return {"output": name, "error": f"has lost its rejected rows ({REJECTED}/{name})"}
            rejected = pq.read_metadata(pa.BufferReader(read_tail(output, f"{REJECTED}/{name}", size))).num_rows
    except (UnusableFileError, OSError, pa.ArrowException, ValueError, KeyError, TypeError) as error:
        return {"output": name, "error": f"cannot be read: {one_line(error)}"}
    found = {"output": name, "scored_found": metadata.num_rows, "rejected_found": rejected}
    committed: dict[str, Any] = stamp | found | {"counts": json.dumps(stamp["counts"])}
    return committed


@dataclass(frozen=True)
class PredictionSpec:
    """What, beside the input, decides an output: outputs of different requests are not put together."""

    model_sha256: str
    precision: str
    columns: Columns
    temperatures: Temperatures
    int8_maxima: tuple[float, ...] | None = None
    """With precision int8, what decides the predictions beside the model's weights."""

    def canonical_json(self) -> str:
        """The same text for the same request."""
        fields = {"model_sha256": self.model_sha256, "precision": self.precision, **vars(self.columns)}
        fields["temperature"] = self.temperatures.as_json()
        return json.dumps(fields | ({"int8": self.int8_maxima} if self.int8_maxima else {}), sort_keys=True)
