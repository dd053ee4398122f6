"""Write a part: the rejected rows first and the predictions last, so that a part is done when its predictions exist."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mnistsum_ray.model.predictions import PREDICTION_FIELDS, Predictions
from mnistsum_ray.scoring.decode import DecodedPart
from mnistsum_ray.scoring.layout import PREDICTIONS, REJECTED
from mnistsum_ray.scoring.provenance import KEY, PredictionSpec, Provenance
from mnistsum_ray.scoring.totals import count_part
from mnistsum_ray.storage import conditional
from mnistsum_ray.storage.location import Location


def write_part(
    output: Location,
    source: Location,
    decoded: DecodedPart,
    predictions: Predictions,
    spec: PredictionSpec,
    *,
    new_only: bool = False,
) -> None:
    """Write the files of one part.

    Args:
        output: folder to write to.
        source: the input's root.
        decoded: the part.
        predictions: one per good row of the part, in the same order.
        spec: what made the predictions.
        new_only: use conditional writes, which replace no file of another run.

    Raises:
        OSError: a file cannot be written, or with `new_only` another run has written another file of that name.
    """
    stamp = Provenance.of_part(decoded.part, source, len(decoded.reasons), spec, count_part(decoded, predictions))
    name = decoded.part.output
    if decoded.reasons:
        _write(output / REJECTED / name, _rejected_table(decoded, stamp.source), stamp, new_only=new_only)
    _write(output / PREDICTIONS / name, _prediction_table(decoded, predictions), stamp, new_only=new_only)


def _prediction_table(decoded: DecodedPart, predictions: Predictions) -> pa.Table:
    table = decoded.passthrough
    for field, values in zip(PREDICTION_FIELDS, predictions.columns(decoded.numbers), strict=True):
        table = table.append_column(field, pa.array(values, field.type))
    return table


def _rejected_table(decoded: DecodedPart, source: str) -> pa.Table:
    source_rows = np.fromiter(decoded.reasons, np.int64) + decoded.part.first_row
    added = {
        "source_file": pa.array([source] * len(source_rows), pa.string()),
        "source_row": pa.array(source_rows, pa.int64()),
        "reason": pa.array(decoded.reasons.values(), pa.string()),
    }
    # Input columns of these names are renamed to `input_<name>`.
    names = decoded.rejected.column_names
    taken = {*names, *added}
    table = decoded.rejected.rename_columns([_free_name(name, taken) if name in added else name for name in names])
    for name, values in added.items():
        table = table.append_column(name, values)
    return table


def _free_name(name: str, taken: set[str]) -> str:
    return _free_name(f"input_{name}", taken) if name in taken else name


def _write(place: Location, table: pa.Table, stamp: Provenance, *, new_only: bool) -> None:
    # The entry of Hugging Face lists the input's columns, and `datasets` refuses a file that has other columns.
    metadata = {key: value for key, value in (table.schema.metadata or {}).items() if key not in (b"huggingface", KEY)}
    data = to_parquet(table.replace_schema_metadata(metadata | stamp.to_metadata()))
    if not new_only:
        place.write_bytes(data)
        return
    try:
        conditional.put_if_absent(place, data.to_pybytes())
    except conditional.ConflictError:
        # An earlier process of this run may have written the same file before it died. Its `counts` hold sums of floats, which
        # differ in the last bits if it scored the rows in other batches.
        written = Provenance.from_metadata(pq.read_metadata(pa.BufferReader(place.read_bytes())).metadata)
        if written is None or replace(written, counts=stamp.counts) != stamp:
            raise OSError(f"{place.display} was written by another run") from None


def to_parquet(table: pa.Table) -> pa.Buffer:
    """Serialize a table as a Parquet file in memory."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue()
