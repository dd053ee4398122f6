"""Export example input for scoring: images of MNIST, each with a number, as Parquet files."""

from collections.abc import Callable, Iterator
from itertools import count
from typing import Final

import numpy as np
import pyarrow as pa

from mnistsum_ray.config import ExportPairsConfig
from mnistsum_ray.data.images import IMAGE_TYPE, pixels_array
from mnistsum_ray.data.randomness import BLOCK_ROWS, NUMBERS, RowIds, integer_type, random_numbers
from mnistsum_ray.data.parquet import to_parquet
from mnistsum_ray.data.sources import Source, open_source
from mnistsum_ray.errors import RunError, RunInterrupted, StorageError
from mnistsum_ray.storage.store import Location
from mnistsum_ray.storage.uri import as_request_error, empty_output

SCHEMA: Final = pa.schema(
    {
        "row_id": pa.int64(),  # position of the image in its source
        "image": IMAGE_TYPE,
        "number": integer_type(NUMBERS),
        "digit": pa.int8(),  # the true one, to measure the accuracy
    }
)


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
        pairs = _pairs(source, getattr(source, config.split), config.seed)
        rest = SCHEMA.empty_table()
        for index in range(config.files):
            start = config.rows * index // config.files
            end = config.rows * (index + 1) // config.files
            tables = [rest]
            while sum(table.num_rows for table in tables) < end - start:
                tables.append(next(pairs))
            table = pa.concat_tables(tables)
            rest = table.slice(end - start)
            with as_request_error("--output"):
                data = to_parquet(table.slice(0, end - start), row_group_size=BLOCK_ROWS)
                (output / f"part-{index:05d}.parquet").write(data)
            say(f"rows written: {end:,} of {config.rows:,}")
    except StorageError as error:
        raise RunError(f"--data {error}") from None
    except KeyboardInterrupt:
        begins = "empty the folder, then the same command starts again"
        raise RunInterrupted(f"some files are written; {begins}") from None
    return output, source


def _pairs(source: Source, split: RowIds, seed: int) -> Iterator[pa.Table]:
    """The rows of a split, again and again; each round has other numbers."""
    for rounds in count():
        first = 0  # id of a block's first row
        for group in source.groups:
            end = first + group.rows
            if not np.any((split >= first) & (split < end)):
                first = end  # no file is read for other splits
                continue
            for block in group.blocks():
                bad = {first + row: why for row, why in block.bad.items()}
                source.refuse(bad)
                ids = split[(split >= first) & (split < first + len(block.digits))]
                digits = block.digits[ids - first]
                images = pixels_array(block.images[ids - first])
                columns = [ids, images, random_numbers(seed, rounds, ids), digits]
                yield pa.Table.from_arrays([pa.array(column) for column in columns], schema=SCHEMA)
                first += len(block.digits)
