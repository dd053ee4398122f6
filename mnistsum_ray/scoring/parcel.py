"""Parcels: Python objects as one row of a Ray Data block. A block could not hold tables with different columns."""

import io
import pickle
from typing import Any

import pyarrow as pa


def pack_parcel(started: float, objects: list[Any]) -> pa.Table:
    """Pack objects into a table of one row, with the time when their processing started, in seconds since 1970."""
    stream = io.BytesIO()
    _TablePickler(stream, protocol=5).dump(objects)
    return pa.table({"started": [started], "objects": pa.array([stream.getvalue()], pa.large_binary())})


def unpack_parcel(parcel: pa.Table) -> tuple[float, list[Any]]:
    """Return what `pack_parcel` was given."""
    return parcel["started"][0].as_py(), pickle.loads(parcel["objects"][0].as_py())


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
