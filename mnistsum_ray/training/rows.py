"""The rows of a run, by Ray Data: read, decoded, split, and dealt to the workers.

    read_parquet ─▶ map_batches(decode) ─▶ materialize ─┬─▶ train        randomize_block_order
    rows in memory ─▶ decode ─▶ from_blocks ────────────┼─▶ validation
                                                        └─▶ test

The three Datasets lie in Ray's object store, which spills to disk what memory does not hold. From
there `WholeShards` deals them to the workers, in whole blocks, and no task runs for that: workers
may hold all CPUs. PyTorch is not imported here, since the processes that read would wait for it.
"""

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray.data
import ray.exceptions
from ray.data import Dataset
from ray.data.datasource import Partitioning
from ray.train import DataConfig

from mnistsum_ray.cluster.workarounds import default_environment
from mnistsum_ray.data.columns import (
    Column,
    ReasonCounts,
    RejectedRow,
    decode_columns,
    one_chunk,
    rows_in,
)
from mnistsum_ray.data.inputs import SUFFIXES
from mnistsum_ray.data.parquet import open_parquet
from mnistsum_ray.data.randomness import Bits, RowTotals, split_keys
from mnistsum_ray.data.sources import SPLITS, DataFile, Source, held_out_rows
from mnistsum_ray.errors import (
    RequestError,
    RowCountError,
    TryAgainError,
    UnusableFileError,
    counted,
    root_cause,
)
from mnistsum_ray.storage.bucket import arrow_place
from mnistsum_ray.storage.store import in_threads

_BLOCKS_OF_RANK: Final = 64
_LEAST_BLOCK_ROWS: Final = 32
_MOST_BLOCK_BYTES: Final = 8 * 2**20
"""The rows are cut into some 64 blocks a rank, of 32 rows to 8 MiB. Ranks get whole blocks, so
their shards differ by the rows of a block or two; a block costs a worker 1 ms an epoch."""

_FILES_OF_ACTOR: Final = 1000
"""Footers that an actor of Ray Data reads. Ray would start 32 such actors, each a process, also for
one file: on two cores that takes seven seconds."""

_NAMED_ROWS: Final = 5
"""Rows that cannot be used and are named."""

Decoded: TypeAlias = "pa.Table | Dataset"
"""Rows as `decode` gives them, in memory or in the object store."""


@dataclass(frozen=True)
class Rows:
    """The rows of a run, by split: the task's columns, and `row_id` int64."""

    datasets: dict[str, Dataset]
    totals: dict[str, RowTotals]
    rejected: ReasonCounts  # of rows that are in no split, since they cannot be used


def read_rows(
    source: Source,
    columns: Mapping[str, Column],
    seed: int,
    *,
    skip_bad_rows: bool,
    workers: int = 1,
) -> Rows:
    """Read and decode the columns of all rows into the object store, and split the rows.

    `seed` is that of the order of the blocks; at most `workers` train with them.

    RequestError: a file or a row cannot be used, or too few rows can.
    RowCountError: files hold more or fewer rows than their footers say.
    """
    rows_of_block = source.train_rows // (_BLOCKS_OF_RANK * workers)
    most_rows = rows_in(_MOST_BLOCK_BYTES, columns.values())
    rows_of_block = min(max(rows_of_block, _LEAST_BLOCK_ROWS), most_rows)
    decoded: dict[str, Decoded] = {}
    for split, table in source.tables.items():
        decoded[split] = decode(table, columns, {key: key for key in columns})
    try:
        for split, files in source.files.items():
            if source.rows_of(split):
                decoded[split] = _read_files(files, columns)
        indexes = {split: _index(rows) for split, rows in decoded.items()}
    except (ray.exceptions.RayTaskError, OSError, ValueError) as error:
        cause = getattr(error, "cause", error)  # what a task has raised
        if not isinstance(cause, OSError | ValueError):
            raise  # no fault of the data, such as want of memory
        _refuse_damaged_file(source, str(error))
        problem = f"--data {source.location}: {root_cause(error)}"
        if isinstance(cause, ValueError | FileNotFoundError | PermissionError):
            raise RequestError(problem) from error
        raise TryAgainError(f"{problem}; no file is damaged") from error
    _check_counts(source, indexes)
    rejected = _rejected_rows(source, columns, indexes)
    if rejected.total and not skip_bad_rows:
        all_rows = counted(sum(index.num_rows for index in indexes.values()), "row")
        unusable = f"{rejected.total:,} of {all_rows} cannot be used: {rejected.describe()}"
        advice = "correct them, or train with --skip-bad-rows, which leaves them out"
        raise RequestError(f"--data {source.location}: {unusable}; {advice}")
    rows = Rows({}, {}, rejected)
    for split, key_range in _key_ranges(source, indexes).items():
        read_from = key_range.source_split
        ids = key_range.select(indexes[read_from])["row_id"].to_numpy()
        rows.totals[split] = RowTotals.of(ids)
        if len(ids):
            rows.datasets[split] = _dataset(decoded[read_from], key_range, rows_of_block)
    _check_splits(source, rows)
    # Files may be sorted by label. In a random order of blocks neither a rank nor the buffer in
    # which it shuffles gets one label alone.
    train = rows.datasets["train"].randomize_block_order(seed=seed)
    rows.datasets["train"] = train.materialize()
    return rows


def _check_counts(source: Source, indexes: dict[str, pa.Table]) -> None:
    """Check that Ray Data has read each row of the footers, and none twice."""
    for split, index in indexes.items():
        planned, ids = source.rows_of(split), index["row_id"].to_numpy()
        if len(ids) != planned or len(np.unique(ids)) != planned:
            read = f"read {len(ids):,} rows of files that hold {planned:,}"
            raise RowCountError(f"--data {source.location}: {read}, or some twice")


def _check_splits(source: Source, rows: Rows) -> None:
    if all(split in rows.datasets for split in SPLITS):
        return
    counts = {split: rows.totals[split].rows for split in SPLITS if split in rows.totals}
    present = ", ".join(f"{count:,} {split}" for split, count in counts.items()) or "none"
    problem = f"has too few rows ({present}); each split needs some"
    if rows.rejected.total:
        problem += f"; {rows.rejected.total:,} cannot be used: {rows.rejected.describe()}"
    raise RequestError(f"--data {source.location}: {problem}")


def rows_in_memory(source: Source, columns: Mapping[str, Column]) -> dict[str, pa.Table]:
    """The rows of a source that is in memory, by split, without Ray."""
    names = {key: key for key in columns}
    decoded = {split: decode(rows, columns, names) for split, rows in source.tables.items()}
    selected = {}
    for split, key_range in _key_ranges(source, decoded).items():
        selected[split] = key_range.select(decoded[key_range.source_split])
    return selected


def _read_files(files: list[DataFile], columns: Mapping[str, Column]) -> Dataset:
    """Read and decode Parquet files by the tasks of Ray Data."""
    groups: dict[tuple[object, ...], list[DataFile]] = {}
    for file in files:
        key = (file.schema, *file.columns.items(), file.of_folders)
        groups.setdefault(key, []).append(file)
    datasets = []
    for group in groups.values():
        first = group[0]
        places = [arrow_place(file.path) for file in group]
        filesystem, _ = places[0]
        actors = min(32, 1 + len(group) // _FILES_OF_ACTOR)
        with default_environment({"RAY_DATA_PARQUET_FOOTER_NUM_ACTORS": str(actors)}):
            rows = ray.data.read_parquet(  # noqa: TID251 - it refuses pickles: test_security.py
                [path for _, path in places],
                schema=first.schema,  # the types of other columns may differ from file to file
                # Else a folder `label=3` would replace the column of this name.
                partitioning=Partitioning("hive") if first.of_folders else None,
                filesystem=filesystem,
                file_extensions=[suffix.lstrip(".") for suffix in SUFFIXES],  # else .parquet
                include_paths=True,
                include_row_hash=True,
            )
        # Else the blocks stand as their tasks ended, and each run has other bits.
        rows.context.execution_options.preserve_order = True
        # The console says what is read; Ray's bars and plans would repeat it.
        rows.context.enable_progress_bars = rows.context.print_on_execution_start = False
        rows = rows.select_columns([*first.columns.values(), "path", "row_hash"])
        arguments = {"columns": columns, "names": first.columns}
        datasets.append(rows.map_batches(decode, batch_format="pyarrow", fn_kwargs=arguments))
    decoded = datasets[0].union(*datasets[1:]) if len(datasets) > 1 else datasets[0]
    decoded.set_name("read-rows")
    return decoded.materialize()


def decode(rows: pa.Table, columns: Mapping[str, Column], names: Mapping[str, str]) -> pa.Table:
    """Decode columns, which have these names; `path` and `row_hash` are those of Ray Data.

    Returns the columns by their names in the task; `row_id` int64; `path`; and `reason`, which is
    null but in rows that cannot be used.
    """
    arrays, reasons = decode_columns(columns, rows, names)
    decoded = {key: columns[key].to_arrow(values) for key, values in arrays.items()}
    decoded["row_id"] = one_chunk(rows["row_hash"]).to_numpy().view(np.int64)
    decoded["reason"] = pa.array([reasons.get(row) for row in range(len(rows))], pa.string())
    decoded["path"] = one_chunk(rows["path"]).dictionary_encode()
    return pa.table(decoded)


def _index(decoded: Decoded) -> pa.Table:
    """What the driver knows of a row, in 20 bytes: its id, its file, why it cannot be used."""
    names = ["row_id", "reason", "path"]
    if isinstance(decoded, pa.Table):
        return decoded.select(names)
    tables = decoded.select_columns(names).iter_batches(batch_size=None, batch_format="pyarrow")
    return pa.concat_tables(tables)


class _KeyRange(NamedTuple):
    """The good rows in the files of `source_split` whose key is in first_key..last_key.

    The key of a row is a random number that follows from its id (`split_keys`).
    """

    source_split: str
    first_key: int
    last_key: int

    def select(self, rows: pa.Table) -> pa.Table:
        """The rows of this range, of those in the files of its split."""
        keys = split_keys(rows["row_id"].to_numpy())
        is_between = (np.uint64(self.first_key) <= keys) & (keys <= np.uint64(self.last_key))
        kept = [name for name in rows.column_names if name not in ("reason", "path")]
        selected = rows.filter(pc.and_(pa.array(is_between), rows["reason"].is_null()))
        return selected.select(kept)


def _key_ranges(source: Source, indexes: dict[str, pa.Table]) -> dict[str, _KeyRange]:
    """Which rows each split has: those of its own files, or some that are held out of `train`."""
    ranges: dict[str, _KeyRange] = {}
    for source_split, index in indexes.items():
        good = index.filter(index["reason"].is_null())
        keys = np.sort(split_keys(good["row_id"].to_numpy()))
        held_out = {}
        count = held_out_rows(len(keys))  # for each split that no file is named for
        if source_split == "train" and count:
            # The smallest keys are those of the first of these splits, the next ones of the second.
            for split in source.held_out_splits:
                held_out[split] = _range_of(source_split, keys[:count], source.max_rows)
                keys = keys[count:]
        ranges[source_split] = _range_of(source_split, keys, source.max_rows)
        ranges |= held_out  # after train, as the console names them
    return ranges


def _range_of(source_split: str, keys: Bits, max_rows: int | None) -> _KeyRange:
    """The range of these sorted keys, or of the smallest of them."""
    keys = keys[:max_rows]
    if not len(keys):
        return _KeyRange(source_split, first_key=1, last_key=0)  # no row
    return _KeyRange(source_split, int(keys[0]), int(keys[-1]))


def _dataset(decoded: Decoded, key_range: _KeyRange, rows_of_block: int) -> Dataset:
    """The rows of a range as a Dataset in the object store, in blocks of so many rows."""
    if isinstance(decoded, pa.Table):
        rows = key_range.select(decoded)
        starts = range(0, rows.num_rows, rows_of_block)
        return ray.data.from_blocks([rows.slice(start, rows_of_block) for start in starts])
    of_split = decoded.map_batches(key_range.select, batch_format="pyarrow")
    return of_split.repartition(target_num_rows_per_block=rows_of_block).materialize()


def _rejected_rows(
    source: Source, columns: Mapping[str, Column], indexes: dict[str, pa.Table]
) -> ReasonCounts:
    """Count the rows that cannot be used by reason, and name the first of them."""
    counts = ReasonCounts()
    for split, index in indexes.items():
        is_rejected = index["reason"].is_valid().to_numpy()
        if not is_rejected.any():
            continue
        rejected = index.filter(is_rejected)
        examples: list[RejectedRow] = []  # none of rows in memory, which the task has made
        paths = {*pc.unique(rejected["path"]).to_pylist()}
        for file in source.files.get(split, []):
            _, path = arrow_place(file.path)
            if path in paths and len(examples) < _NAMED_ROWS:
                with _refused_if_damaged(file):  # Ray Data does not check the CRC of pages
                    examples += _first_rejected_rows(file, columns, _NAMED_ROWS - len(examples))
        counts.add(Counter(rejected["reason"].to_pylist()), examples)
    return counts


def _first_rejected_rows(
    file: DataFile, columns: Mapping[str, Column], count: int
) -> list[RejectedRow]:
    """The first rows of a file that cannot be used: so many at most.

    The file is read again, since Ray Data reads the row groups of a large one in another order.
    """
    of_folders = dict(re.findall(r"(?:^|(?<=/))([^/=]+)=([^/]*)/", file.name))
    in_file = [name for name in file.columns.values() if name not in file.of_folders]
    batch_rows = rows_in(_MOST_BLOCK_BYTES, columns.values())
    found: list[RejectedRow] = []
    first_row = 0
    with open_parquet(file.path) as parquet:
        for batch in parquet.iter_batches(batch_rows, columns=in_file):
            table = pa.Table.from_batches([batch])
            for folder in file.of_folders:
                table = table.append_column(folder, pa.repeat(of_folders[folder], len(batch)))
            _, reasons = decode_columns(columns, table, file.columns)
            found += [(file.name, first_row + row, reason) for row, reason in reasons.items()]
            if len(found) >= count:
                break
            first_row += len(batch)
    return found[:count]


def _refuse_damaged_file(source: Source, said: str) -> None:
    """RequestError that names the file which cannot be read, if there is one.

    Only the files that Ray Data's error names are read, or all if it names none.
    """
    files = [*itertools.chain(*source.files.values())]
    named = [file for file in files if arrow_place(file.path)[1] in said]

    def read_again(file: DataFile) -> None:
        with _refused_if_damaged(file), open_parquet(file.path) as parquet:
            in_file = [name for name in file.columns.values() if name not in file.of_folders]
            for _ in parquet.iter_batches(columns=in_file):
                pass

    for _ in in_threads(files[0].path, read_again, named or files):
        pass


@contextmanager
def _refused_if_damaged(file: DataFile) -> Iterator[None]:
    """RequestError that names the file if the block cannot read it."""
    try:
        yield
    except UnusableFileError as error:
        raise RequestError(f"--data {file.path.display}: {error}") from None


class WholeShards(DataConfig):
    """Deals whole blocks to the ranks, so that no row is dropped.

    Ray's default makes all shards equal, and for that drops up to a row a worker.
    """

    def configure(self, datasets: Any, world_size: int, *_: Any, **__: Any) -> list[dict[str, Any]]:
        """The shard of each rank, by the name of the dataset."""
        shards: list[dict[str, Any]] = [{} for _ in range(world_size)]
        for name, dataset in datasets.items():
            for rank, shard in enumerate(dataset.split(world_size)):  # no task runs for this
                shards[rank][name] = shard.iterator()  # as Ray's own DataConfig does
        return shards
