"""Example input for scoring: images of a split of MNIST, each with a number, as Parquet files. Nothing of Ray."""

from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mnistsum_ray.config import ExportPairsConfig
from mnistsum_ray.data.decoding import IMAGE_TYPE
from mnistsum_ray.data.parquet_parts import ParquetPart, read_whole
from mnistsum_ray.data.sampling import RowIds, random_numbers
from mnistsum_ray.data.sources import Source, open_source
from mnistsum_ray.errors import RequestError, RunInterrupted, one_line
from mnistsum_ray.reporting.progress import Progress
from mnistsum_ray.storage.location import Location, empty_folder

SCHEMA = pa.schema({"row_id": pa.int64(), "image": IMAGE_TYPE, "number": pa.int8(), "digit": pa.int8()})
"""`row_id` is the image's place in its source; `digit` the true digit, for measuring accuracy."""

_GROUP_ROWS = 8192


def export_pairs(config: ExportPairsConfig, say: Callable[[str], None]) -> tuple[Location, Source]:
    """Write the files.

    The numbers are those of (seed, round, row_id), as in training (pairs.py), so the same flags write the same files.

    Raises:
        RequestError: the data cannot be read, or the output is not an empty folder.
        RunInterrupted: it was interrupted.
    """
    output = empty_folder(config.output)
    try:
        source = open_source(config.data)
        if source.notice:
            say(source.notice)
        written = Progress(say, "rows written", config.rows)
        rows = _stream(source, getattr(source, config.split), config.seed)
        ready: list[pa.Table] = []
        for index in range(config.files):
            end, start = config.rows * (index + 1) // config.files, config.rows * index // config.files
            sink = pa.BufferOutputStream()
            with pq.ParquetWriter(sink, SCHEMA) as writer:
                missing = end - start
                while missing:
                    table = ready.pop() if ready else next(rows)
                    writer.write_table(table.slice(0, missing), row_group_size=_GROUP_ROWS)
                    if table.num_rows > missing:
                        ready.append(table.slice(missing))
                    missing -= min(missing, table.num_rows)
            (output / f"part-{index:05d}.parquet").write_bytes(sink.getvalue())
            written(end - start)
    except OSError as error:
        raise RequestError(f"--output {output.display}: {one_line(error)}") from None
    except KeyboardInterrupt:
        raise RunInterrupted("some of the files are written; the same command begins again once the folder is empty") from None
    return output, source


def _stream(source: Source, row_ids: RowIds, seed: int) -> Iterator[pa.Table]:
    """The split's rows in the order of their ids, round after round, each round with other numbers."""
    rounds = 0
    while True:
        first = 0
        for part in source.parts:
            here = row_ids[(row_ids >= first) & (row_ids < first + _rows_of(part))]
            if len(here):
                table = read_whole(part).take(pa.array(here - first))
                yield _pairs(table, here, random_numbers(seed, rounds, here))
            first += _rows_of(part)
        rounds += 1


def _rows_of(part: pa.Table | ParquetPart) -> int:
    return part.rows if isinstance(part, ParquetPart) else part.num_rows


def _pairs(table: pa.Table, row_ids: RowIds, numbers: np.ndarray) -> pa.Table:
    columns = [pa.array(row_ids), table["image"], pa.array(numbers, pa.int8()), table["digit"]]
    return pa.Table.from_arrays(columns, schema=SCHEMA)
