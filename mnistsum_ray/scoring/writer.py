"""Write a part: an output file appears whole, and its metadata say what it was made from.

Of one part of an input file, the rejected rows are written first and the predictions last, so that a part is done
exactly when its predictions are there.
"""

import json
from collections import Counter
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from mnistsum_ray.model.calibration import Reliability
from mnistsum_ray.model.inference import Predictions
from mnistsum_ray.scoring.layout import PREDICTION_FIELDS, REJECTED
from mnistsum_ray.scoring.provenance import FORMAT, KEY, PROBABILITY_BINS, PredictionSpec
from mnistsum_ray.scoring.reader import DecodedPart
from mnistsum_ray.storage import conditional
from mnistsum_ray.storage.location import Location

_REASONS_KEPT: Final = 20
"""Different reasons that a file's metadata count one by one."""

OTHER_REASONS: Final = "other reasons"


def write_part(
    output: Location,
    source: Location,
    rows: DecodedPart,
    predictions: Predictions,
    request: PredictionSpec,
    *,
    new_only: bool = False,
) -> dict[str, Any]:
    """Write one part.

    Args:
        output: the folder.
        source: the input's root.
        rows: the part, as read.
        predictions: of its good rows, in their order.
        request: what decides the predictions.
        new_only: write by conditional writes, so that nothing of another run is replaced.

    Returns:
        The metadata that the file carries.

    Raises:
        OSError: it cannot be written, or with `new_only` another run has written something else there.
    """
    part = rows.part
    stamp: dict[str, Any] = {
        "format": FORMAT,
        "name": part.name,
        "source": source.at(f"{source.path}/{part.name}").display,
        "size": part.size,
        "modified": part.modified,
        "footer": part.footer,
        "first_row": part.first_row,
        "rows": part.rows,
        "rejected": len(rows.reasons),
        "request": request.canonical_json(),
        "counts": _counts(rows, predictions),
    }
    if rows.reasons:
        _write(output / REJECTED / part.output, _with_reasons(rows, stamp["source"]), stamp, new_only=new_only)
    _write(output / part.output, _with_predictions(rows, predictions), stamp, new_only=new_only)
    return stamp


def _with_predictions(rows: DecodedPart, predictions: Predictions) -> pa.Table:
    table = rows.kept
    consistent = predictions.sum == predictions.digit + rows.numbers
    columns = (predictions.digit, predictions.digit_prob, predictions.sum, predictions.sum_prob, consistent)
    for field, values in zip(PREDICTION_FIELDS, columns, strict=True):
        table = table.append_column(field, pa.array(values, field.type))
    return table


def _with_reasons(rows: DecodedPart, source: str) -> pa.Table:
    places = np.fromiter(rows.reasons, np.int64) + rows.part.first_row
    added = {
        "source_file": pa.array([source] * len(places), pa.string()),
        "source_row": pa.array(places, pa.int64()),
        "reason": pa.array(rows.reasons.values(), pa.string()),
    }
    names = rows.rejected.column_names
    # The input's own columns give way where they have these names.
    table = rows.rejected.rename_columns([_free_name(name, {*names, *added}) if name in added else name for name in names])
    for name, values in added.items():
        table = table.append_column(name, values)
    return table


def _free_name(name: str, taken: set[str]) -> str:
    return _free_name(f"input_{name}", taken) if name in taken else name


def _write(place: Location, table: pa.Table, stamp: dict[str, Any], *, new_only: bool) -> None:
    kept = {key: value for key, value in (table.schema.metadata or {}).items() if key not in (b"huggingface", KEY)}
    # Hugging Face's entry lists the columns, and `datasets` refuses a file that has others.
    table = table.replace_schema_metadata(kept | {KEY: json.dumps(stamp).encode()})
    data = to_parquet(table)
    if not new_only:
        place.write_bytes(data)
        return
    try:
        conditional.put_if_absent(place, data.to_pybytes())
    except conditional.ConflictError:
        # Written before by a process of this run that then died, it is the same.
        metadata = pq.read_metadata(pa.BufferReader(place.read_bytes())).metadata
        if json.loads((metadata or {}).get(KEY, b"null")) != stamp:
            raise OSError(f"{place.display} was written by another run") from None


def to_parquet(table: pa.Table) -> pa.Buffer:
    """A whole Parquet file in memory."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue()


def _counts(rows: DecodedPart, predictions: Predictions) -> dict[str, Any]:
    """What a summary adds up, over the rows of a part."""
    counts: dict[str, Any] = {
        "consistent": int((predictions.sum == predictions.digit + rows.numbers).sum()),
        "digit_prob": _histogram(predictions.digit_prob),
        "sum_prob": _histogram(predictions.sum_prob),
    }
    if rows.labels is not None:
        known = rows.labels >= 0
        counts["labelled"] = int(known.sum())
        counts["digits_right"] = int((predictions.digit == rows.labels)[known].sum())
        counts["sums_right"] = int((predictions.sum == rows.labels + rows.numbers)[known].sum())
        counts["reliability"] = _reliability(rows, predictions, known)
    if rows.reasons:
        commonest = Counter(rows.reasons.values()).most_common(_REASONS_KEPT)
        rest = len(rows.reasons) - sum(count for _, count in commonest)
        counts["reasons"] = dict(commonest) | ({OTHER_REASONS: rest} if rest else {})
    return counts


def _reliability(rows: DecodedPart, predictions: Predictions, known: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """`calibration.Reliability` by head, over the rows whose label is known."""
    assert rows.labels is not None
    losses = predictions.losses
    assert losses is not None, "labels were given to the predictor"
    digits_right, sums_right = predictions.digit == rows.labels, predictions.sum == rows.labels + rows.numbers
    digit = predictions.digit_prob[known], digits_right[known], losses.digit_nll[known], losses.digit_brier[known]
    sum_ = predictions.sum_prob[known], sums_right[known], losses.sum_nll[known], losses.sum_brier[known]
    return {"digit": Reliability.of(*digit).as_json(), "sum": Reliability.of(*sum_).as_json()}


def _histogram(probabilities: npt.NDArray[np.float32]) -> list[int]:
    counts: list[int] = np.histogram(probabilities, PROBABILITY_BINS, (0, 1))[0].tolist()
    return counts
