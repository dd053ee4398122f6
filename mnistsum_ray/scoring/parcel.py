"""Parcels: a batch of parts as one row of a Ray Data block, on its way from a reader to a predicting worker and on to a writer.

What the model reads and yields are columns of raw bytes, which a worker with a GPU takes without a copy. All else is pickled,
because a block could not hold tables with different columns, and passes through the worker unopened.
"""

import io
import pickle
from dataclasses import fields
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mnistsum_ray.data.pixels import SIDE
from mnistsum_ray.model.predictions import Predictions, ProbabilityLosses
from mnistsum_ray.scoring.decode import BatchRows, DecodedPart, UnreadablePart

_PREDICTIONS: Final = {"digit": np.int8, "digit_prob": np.float32, "sum": np.int8, "sum_prob": np.float32}
_LOSSES: Final = tuple(field.name for field in fields(ProbabilityLosses))


def pack_parts(started: float, batch: list[DecodedPart | UnreadablePart]) -> pa.Table:
    """Pack parts, with the time when their processing started, in seconds since 1970."""
    rows = BatchRows.of(batch)
    stream = io.BytesIO()
    _TablePickler(stream, protocol=5).dump([part.without_images() if isinstance(part, DecodedPart) else part for part in batch])
    columns = {"parts": stream.getbuffer(), "images": rows.images, "numbers": rows.numbers}
    if rows.labels is not None:
        columns["labels"] = rows.labels
    return pa.table({"started": [started]} | {name: _bytes_column(values) for name, values in columns.items()})


def rows_of(parcel: pa.Table) -> BatchRows:
    """The rows of a parcel; views of its memory."""
    images = _array(parcel, "images", np.uint8).reshape(-1, SIDE, SIDE)
    labels = _array(parcel, "labels", np.int64) if _has(parcel, "labels") else None
    return BatchRows(images, _array(parcel, "numbers", np.int64), labels)


def with_predictions(parcel: pa.Table, ready: float, predictions: Predictions) -> pa.Table:
    """The parcel with predictions in place of its rows.

    Its processing started no earlier than the model was ready: parts that were read before would make the rate look too low.
    """
    columns = {name: getattr(predictions, name) for name in _PREDICTIONS}
    if predictions.losses:
        columns |= {name: getattr(predictions.losses, name) for name in _LOSSES}
    started = max(parcel["started"][0].as_py(), ready)
    packed = {name: _bytes_column(values) for name, values in columns.items()}
    return pa.table({"started": [started], "parts": parcel["parts"]} | packed)


def unpack_predictions(parcel: pa.Table) -> tuple[float, list[DecodedPart | UnreadablePart], Predictions]:
    """When the processing started, the parts without images, and the predictions of their rows."""
    parts = pickle.loads(parcel["parts"][0].as_buffer())
    losses = None
    if _has(parcel, _LOSSES[0]):
        losses = ProbabilityLosses(*(_array(parcel, name, np.float32) for name in _LOSSES))
    predictions = Predictions(**{name: _array(parcel, name, dtype) for name, dtype in _PREDICTIONS.items()}, losses=losses)
    return parcel["started"][0].as_py(), parts, predictions


def _bytes_column(values: Any) -> pa.Array:
    """One value: the bytes of a buffer, which is not copied."""
    data = pa.py_buffer(np.ascontiguousarray(values) if isinstance(values, np.ndarray) else values)
    offsets = pa.py_buffer(np.array([0, data.size], np.int64))
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, [None, offsets, data])


def _has(parcel: pa.Table, name: str) -> bool:
    """Whether a parcel has a column; in a block that Ray Data has joined from several parcels, all have it, some as null."""
    return name in parcel.column_names and parcel[name][0].is_valid


def _array(parcel: pa.Table, name: str, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    return np.frombuffer(parcel[name][0].as_buffer(), dtype)


class _TablePickler(pickle.Pickler):
    """Pickles a table that is a slice without the rest of its buffers; Arrow's own pickling sends the whole buffers."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, pa.Table):
            return NotImplemented
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, value.schema) as writer:
            writer.write_table(value)
        return _read_table, (sink.getvalue().to_pybytes(),)


def _read_table(data: bytes) -> pa.Table:
    return pa.ipc.open_stream(data).read_all()
