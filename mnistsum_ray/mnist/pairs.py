"""Example input for scoring: images of MNIST, each with a number, as Parquet files."""

from collections.abc import Callable, Iterator
from itertools import count
from typing import Final, Literal

import pyarrow as pa
from pydantic import Field, ValidationInfo, field_validator

from mnistsum_ray.config import JobConfig
from mnistsum_ray.data.columns.base import one_chunk
from mnistsum_ray.data.decoding import decode, select
from mnistsum_ray.data.parquet import to_parquet
from mnistsum_ray.data.randomness import RowRandom
from mnistsum_ray.data.sources import Source, open_source
from mnistsum_ray.errors import RequestError, RunInterrupted
from mnistsum_ray.mnist import NUMBERS, SIDE
from mnistsum_ray.mnist.task import MnistSum
from mnistsum_ray.storage.store import Location
from mnistsum_ray.storage.uri import as_request_error, empty_output

SCHEMA: Final = pa.schema(
    {
        "row_id": pa.int64(),  # as training names the image
        "image": pa.binary(SIDE * SIDE),  # row by row, 0 is background, 255 is ink
        "number": pa.int8(),
        "digit": pa.int8(),  # the true one, to measure the accuracy
    }
)


class ExportPairsConfig(JobConfig):
    """Config of an export of pairs."""

    data: str = "auto"
    """auto (full MNIST, else the bundled sample), sample, mnist, or a folder of MNIST's files"""
    split: Literal["train", "validation", "test"] = "test"
    """split whose rows are exported, in their order"""
    output: str
    """folder or URI for the files; it must be empty or not exist"""
    rows: int = Field(default=10_000, ge=1)
    """total rows; beyond the end of the split it repeats with other numbers"""
    files: int = Field(default=8, ge=1, le=1_000_000)
    """number of files, of about equal size"""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """seed of the numbers"""

    @field_validator("files")
    @classmethod
    def _fill_each_file(cls, files: int, info: ValidationInfo) -> int:
        rows = info.data.get("rows", files)  # missing there if they are wrong
        if files > rows:
            raise ValueError(f"more files than --rows {rows}; lower --files")
        return files


def export_pairs(config: ExportPairsConfig, say: Callable[[str], None]) -> tuple[Location, Source]:
    """Write the files, the same for the same flags; return their folder, and the images' source."""
    output = empty_output(config.output)
    try:
        source = open_source(MnistSum(), config.data, lambda _: {})
        if source.files:
            problem = "is Parquet already; give it a column of numbers, and score it"
            raise RequestError(f"--data {config.data}: {problem}")
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
                data = to_parquet(table[:rows], row_group_size=8192)
                (output / f"part-{index:05d}.parquet").write(data)
            table = table[rows:]
            say(f"rows written: {rows_so_far:,} of {config.rows:,}")
    except KeyboardInterrupt:
        how = "files may be written already; empty the folder, then the same command starts again"
        raise RunInterrupted(how) from None
    return output, source


def _pairs(source: Source, split: str, seed: int) -> Iterator[pa.Table]:
    """Yield the rows of a split, again and again; each repetition has other numbers."""
    columns = MnistSum().training_columns
    names = {key: key for key in columns}
    rows = pa.concat_tables(
        select(decode(table, columns, names, source.ranges(named)), [split])
        for named, table in source.tables.items()
    )
    ids = rows["row_id"].to_numpy()
    images = [image.tobytes() for image in one_chunk(rows["image"]).to_numpy_ndarray()]
    for repetition in count():
        numbers = RowRandom(seed, repetition, ids).whole(1, NUMBERS)
        yield pa.table([ids, images, numbers, rows["digit"]], schema=SCHEMA)
