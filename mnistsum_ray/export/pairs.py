"""Export example input for scoring: images of a split of MNIST, each paired with a number, as Parquet files."""

from collections.abc import Callable
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mnistsum_ray.config import ExportPairsConfig
from mnistsum_ray.data.images import IMAGE_TYPE, pixels_array
from mnistsum_ray.data.order import NUMBERS, RowRanges, integer_type, random_numbers
from mnistsum_ray.data.sources import Source, open_source
from mnistsum_ray.errors import RunError, RunInterrupted, StorageError
from mnistsum_ray.storage.store import Location
from mnistsum_ray.storage.uri import empty_output, refused

SCHEMA: Final = pa.schema({"row_id": pa.int64(), "image": IMAGE_TYPE, "number": integer_type(NUMBERS), "digit": pa.int8()})
"""`row_id` is the position of the image in its source; `digit` is the true digit, for measuring accuracy."""

_ROW_GROUP_ROWS: Final = 8192


def export_pairs(config: ExportPairsConfig, say: Callable[[str], None]) -> tuple[Location, Source]:
    """Write the files, the same for the same flags; return their folder, and the images' source.

    Raises:
        RequestError: the data cannot be used, or the output is no empty folder that can be written.
        RunError: the storage does not give the data.
    """
    output = empty_output(config.output)
    try:
        source = open_source(config.data)
        if source.notice:
            say(source.notice)
        split = getattr(source, config.split)
        for index in range(config.files):
            start, end = config.rows * index // config.files, config.rows * (index + 1) // config.files
            data = _parquet_file(source, split, config.seed, start, end)
            with refused("--output"):
                (output / f"part-{index:05d}.parquet").write(data)
            say(f"rows written: {end:,} of {config.rows:,}")
    except StorageError as error:
        raise RunError(f"--data {error}") from None
    except KeyboardInterrupt:
        raise RunInterrupted("some files are written; empty the folder, then the same command starts again") from None
    return output, source


def _parquet_file(source: Source, split: RowRanges, seed: int, row: int, end: int) -> pa.Buffer:
    """A Parquet file of rows of the endlessly repeated split; each round has other numbers."""
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, SCHEMA) as writer:
        while row < end:
            rounds, place = divmod(row, len(split))
            count = min(_ROW_GROUP_ROWS, len(split) - place, end - row)
            ids = split.at(np.arange(place, place + count))
            images, digits = source.data.fetch(ids)
            columns = [ids, pixels_array(images), random_numbers(seed, rounds, ids), digits]
            writer.write_table(pa.Table.from_arrays([pa.array(column) for column in columns], schema=SCHEMA))
            row += count
    return sink.getvalue()
