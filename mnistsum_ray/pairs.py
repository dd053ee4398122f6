"""Example input for scoring: images of MNIST, each with a number, as Parquet files."""

from collections.abc import Callable, Iterator
from itertools import count
from typing import Final

import pyarrow as pa

from mnistsum_ray.config import ExportPairsConfig, LabelledDataConfig
from mnistsum_ray.data.images import IMAGE_TYPE, one_chunk
from mnistsum_ray.data.parquet import to_parquet
from mnistsum_ray.data.randomness import random_numbers
from mnistsum_ray.data.sources import Source, open_source
from mnistsum_ray.errors import RequestError, RunInterrupted
from mnistsum_ray.storage.store import Location
from mnistsum_ray.storage.uri import as_request_error, empty_output

SCHEMA: Final = pa.schema(
    {
        "row_id": pa.int64(),  # as training names the image
        "image": IMAGE_TYPE,
        "number": pa.int8(),
        "digit": pa.int8(),  # the true one, to measure the accuracy
    }
)

_ROW_GROUP: Final = 8192


def export_pairs(config: ExportPairsConfig, say: Callable[[str], None]) -> tuple[Location, Source]:
    """Write the files, the same for the same flags; return their folder, and the images' source."""
    output = empty_output(config.output)
    try:
        source = open_source(LabelledDataConfig(data=config.data))
        if source.files:
            advice = "is Parquet already; give it a column of numbers, and score it"
            raise RequestError(f"--data {config.data}: {advice}")
        if source.notice:
            say(source.notice)
        pairs = _pairs(source, config.split, config.seed)
        table = SCHEMA.empty_table()
        for index in range(config.files):
            rows_so_far = config.rows * (index + 1) // config.files
            rows = rows_so_far - config.rows * index // config.files
            while table.num_rows < rows:
                table = pa.concat_tables([table, next(pairs)])
            with as_request_error("--output"):
                data = to_parquet(table[:rows], row_group_size=_ROW_GROUP)
                (output / f"part-{index:05d}.parquet").write(data)
            table = table[rows:]
            say(f"rows written: {rows_so_far:,} of {config.rows:,}")
    except KeyboardInterrupt:
        raise RunInterrupted(
            "files may be written already; empty the folder, then the same command starts again"
        ) from None
    return output, source


def _pairs(source: Source, split: str, seed: int) -> Iterator[pa.Table]:
    """The rows of a split, again and again; each repetition has other numbers."""
    from mnistsum_ray.training.rows import rows_in_memory  # imports Ray

    rows = rows_in_memory(source)[split]
    ids = rows["row_id"].to_numpy()
    images = one_chunk(rows["image"]).to_numpy_ndarray()
    columns = {
        "row_id": ids,
        "image": [image.tobytes() for image in images],
        "digit": rows["digit"],
    }
    for repetition in count():
        numbers = random_numbers(seed, repetition, ids)
        yield pa.table(columns | {"number": numbers}).select(SCHEMA.names).cast(SCHEMA)
