"""The rows of a run, by Ray Data: read, decoded, counted, split, and streamed to the workers.

    read_parquet ───┬─▶ map_batches(decode) ─▶ split ─▶ blocks of equal length ─▶ streaming_split
    rows in memory ─┘          │ materialize, if they are kept                 │
                               ▼                                               ▼
                           summary: counts, sums of ids                 EveryRow: workers

Training rows are kept decoded in Ray's object store, or are read and decoded anew in each epoch.
Both give each worker the same rows in the same order. PyTorch is not imported here, since the
processes that read would wait for it.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any, Final

import numpy as np
import ray.data
import ray.exceptions
from ray.data import Dataset
from ray.data.dataset import MaterializedDataset
from ray.train import DataConfig

from mnistsum_ray.cluster.workarounds import default_environment
from mnistsum_ray.data.columns.base import Column, ReasonCounts, rows_in
from mnistsum_ray.data.decoding import (
    RowTotals,
    Summary,
    decode,
    refuse_damaged_file,
    select,
    summarize,
    without_origin,
)
from mnistsum_ray.data.inputs import SUFFIXES
from mnistsum_ray.data.randomness import Purpose, seeds
from mnistsum_ray.data.sources import SPLITS, DataFile, Source
from mnistsum_ray.errors import RequestError, RowCountError, TryAgainError, counted, root_cause
from mnistsum_ray.reporting.console import Progress
from mnistsum_ray.storage.uri import arrow_place

_BLOCKS_OF_RANK: Final = 64
_LEAST_BLOCK_ROWS: Final = 32
_MOST_BLOCK_BYTES: Final = 8 * 2**20
"""The rows are cut into some 64 blocks a rank, of 32 rows to 8 MiB. Ranks get whole blocks, so
their shards differ by the rows of a block or two; a block costs a worker 1 ms an epoch."""

_FILES_OF_ACTOR: Final = 1000
"""Footers that an actor of Ray Data reads. Ray would start 32 processes for that, in seconds."""


@dataclass(frozen=True)
class Rows:
    """The rows of a run, by split: the task's columns, and `row_id` int64."""

    datasets: dict[str, Dataset]
    totals: dict[str, RowTotals]
    rows_of_block: int  # of all blocks of a split but its last one
    rejected: ReasonCounts  # of rows that are in no split
    missing: dict[str, set[int]]  # by column, the classes that no training row has

    @property
    def fingerprint(self) -> str:
        """Return a SHA-256 of the rows in each split. It does not depend on where the files are."""
        found = [(split, totals.rows, totals.id_sum) for split, totals in self.totals.items()]
        return hashlib.sha256(repr(sorted(found)).encode()).hexdigest()


def read_rows(
    source: Source,
    columns: Mapping[str, Column],
    seed: int,
    *,
    skip_bad_rows: bool,
    is_kept: bool = True,
    workers: int = 1,
    show_progress: Callable[..., None] = lambda **_: None,
) -> Rows:
    """Read, decode and split all rows; those of the training are kept if `is_kept`.

    `seed` is that of the order of files; at most `workers` train with the rows. `show_progress` is
    called as `Console.progress`.

    RequestError: a file or a row cannot be used, or too few rows can.
    RowCountError: files hold more or fewer rows than their footers say.
    """
    decoded: dict[str, Dataset] = {}
    groups: list[dict[str, Any]] = []
    progress = Progress(show_progress, "rows read", sum(map(source.rows_of, SPLITS)))
    try:
        for named_split in SPLITS:
            if source.rows_of(named_split):
                dataset = _decoded(source, named_split, columns, seed)
                is_kept_now = is_kept or named_split != "train"
                if is_kept_now:
                    dataset = _keep(dataset, progress)
                decoded[named_split] = dataset
                summaries = dataset.map_batches(summarize, fn_args=[columns], **_BLOCKS)
                for group in summaries.iter_rows():
                    groups.append(group)
                    if not is_kept_now:
                        progress(group["row_id_count"])
    except (ray.exceptions.RayTaskError, OSError, ValueError) as error:
        cause = getattr(error, "cause", error)  # what a task has raised
        if not isinstance(cause, OSError | ValueError):
            raise  # no fault of the data, such as want of memory
        refuse_damaged_file(source, columns, str(error))
        problem = f"--data {source.location}: {root_cause(error)}"
        if isinstance(cause, ValueError | FileNotFoundError | PermissionError):
            raise RequestError(problem) from error
        raise TryAgainError(f"{problem}; no file is damaged") from error
    summary = Summary.of(groups, columns)
    _check_counts(source, summary)
    rejected = summary.rejected(source, columns)
    if rejected.total and not skip_bad_rows:
        all_rows = summary.rows_of_paths.total()
        share = f"{rejected.total:,} of {counted(all_rows, 'row')}"
        unusable = f"{share} cannot be used: {rejected.describe()}"
        advice = "correct them"
        if rejected.total < all_rows:
            advice += ", or train with --skip-bad-rows, which leaves them out"
        raise RequestError(f"--data {source.location}: {unusable}; {advice}")
    _check_splits(source, summary, rejected)
    rows_of_block = summary.totals["train"].rows // (_BLOCKS_OF_RANK * workers)
    rows_of_block = max(rows_of_block, _LEAST_BLOCK_ROWS)
    rows_of_block = min(rows_of_block, rows_in(_MOST_BLOCK_BYTES, columns.values()))
    rows = Rows({}, summary.totals, rows_of_block, rejected, summary.missing)
    for named_split, dataset in decoded.items():
        splits = [split for split in source.ranges(named_split) if split != "train"]
        held_out = dataset
        if named_split == "train" and not is_kept and splits:
            # Read once for both of them.
            held_out = dataset.map_batches(select, fn_kwargs={"splits": splits}, **_BLOCKS)
            held_out = held_out.materialize()
        for split in splits:
            rows.datasets[split] = _in_blocks(held_out, split, rows).materialize()
        if named_split == "train":
            train = _in_blocks(dataset, "train", rows)
            rows.datasets["train"] = train.materialize() if is_kept else train
    return rows


_BLOCKS: Final[Mapping[str, Any]] = {"batch_size": None, "batch_format": "pyarrow"}
"""Arguments of `map_batches` for functions of whole blocks, as tables of Arrow."""


def _keep(dataset: Dataset, progress: Progress) -> Dataset:
    """Do what `materialize` does, and count the rows of each block as soon as it is ready."""
    blocks = []
    for bundle in dataset.iter_internal_ref_bundles():
        blocks += bundle.block_refs
        progress(bundle.num_rows())
    kept = ray.data.from_arrow_refs(blocks)
    kept.context.execution_options.preserve_order = True
    kept.context.enable_progress_bars = kept.context.print_on_execution_start = False
    kept.set_name("read-rows")
    return kept


def _in_blocks(decoded: Dataset, split: str, rows: Rows) -> Dataset:
    """Return rows of a split, as workers need them, in blocks of one length but for the last."""
    needed = decoded.map_batches(select, fn_kwargs={"splits": [split]}, **_BLOCKS)
    needed = needed.map_batches(without_origin, **_BLOCKS)
    return needed.repartition(target_num_rows_per_block=rows.rows_of_block, strict=True)


def _check_counts(source: Source, summary: Summary) -> None:
    """Check that Ray Data has read each row of the footers."""
    read, planned = summary.rows_of_paths.total(), sum(map(source.rows_of, SPLITS))
    of_files = {arrow_place(file.path)[1]: file.rows for file in source.all_files if file.rows}
    if read != planned or (of_files and of_files != summary.rows_of_paths):
        problem = f"read {read:,} rows of files that hold {planned:,}, or some twice"
        raise RowCountError(f"--data {source.location}: {problem}")


def _check_splits(source: Source, summary: Summary, rejected: ReasonCounts) -> None:
    if all(split in summary.totals for split in SPLITS):
        return
    counts = [f"{totals.rows:,} {split}" for split, totals in summary.totals.items()]
    present = ", ".join(counts) or "none"
    problem = f"has too few rows ({present}); each split needs some"
    if rejected.total:
        problem += f"; {rejected.total:,} cannot be used: {rejected.describe()}"
    raise RequestError(f"--data {source.location}: {problem}")


def _decoded(source: Source, split: str, columns: Mapping[str, Column], seed: int) -> Dataset:
    """Return the decoded rows that are named for a split."""
    if split in source.tables:
        table = source.tables[split]
        rows = rows_in(_MOST_BLOCK_BYTES, columns.values())
        starts = range(0, table.num_rows, rows)
        dataset = ray.data.from_blocks([table.slice(start, rows) for start in starts])
        datasets = [(dataset, {key: key for key in columns})]
    else:
        datasets = _read_files(source.files[split], seed)
    decoded = []
    for dataset, names in datasets:
        # Else the blocks stand as their tasks ended, and each run has other bits.
        dataset.context.execution_options.preserve_order = True
        # The console says what is read; Ray's bars and plans would repeat it.
        dataset.context.enable_progress_bars = dataset.context.print_on_execution_start = False
        arguments = {"columns": columns, "names": names, "ranges": source.ranges(split)}
        decoded.append(dataset.map_batches(decode, batch_format="pyarrow", fn_kwargs=arguments))
    union = decoded[0].union(*decoded[1:]) if len(decoded) > 1 else decoded[0]
    union.set_name("read-rows")
    return union


def _read_files(files: list[DataFile], seed: int) -> list[tuple[Dataset, dict[str, str]]]:
    """Return Datasets of Parquet files, in an order by seed, and their columns' names."""
    # Files may be sorted by label: else a rank, or its buffer for shuffling, had one label alone.
    order = np.argsort(seeds(seed, 0, Purpose.FILE_ORDER, range(len(files))))
    groups: dict[tuple[object, ...], list[DataFile]] = {}
    for file in (files[index] for index in order):
        key = (file.schema, *file.columns.items())
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
                partitioning=None,  # else a folder `label=3` would replace the column of this name
                filesystem=filesystem,
                file_extensions=[suffix.lstrip(".") for suffix in SUFFIXES],  # else .parquet
                include_paths=True,
            )
        datasets.append((rows.select_columns([*first.columns.values(), "path"]), first.columns))
    return datasets


class EveryRow(DataConfig):
    """Gives whole blocks to the ranks, always in one order. Ray's default drops up to a row a rank.

    Training rows are streamed by an actor that deals their blocks. It costs 3 s once, and 0.4 s an
    epoch, so rows that lie in the object store do without it where they need not be dealt in turn:
    held-out rows, and those of a single worker.
    """

    def configure(self, datasets: Any, world_size: int, *_: Any, **__: Any) -> list[dict[str, Any]]:
        """Return the shard of each rank, by the name of the dataset."""
        shards: list[dict[str, Any]] = [{} for _ in range(world_size)]
        for name, dataset in datasets.items():
            is_kept = isinstance(dataset, MaterializedDataset)
            if name == "train" and not (is_kept and world_size == 1):
                of_ranks = dataset.streaming_split(world_size, equal=False)
            else:
                of_ranks = [shard.iterator() for shard in dataset.split(world_size)]
            for rank, shard in enumerate(of_ranks):
                shards[rank][name] = shard
        return shards


def shards_of(rows: int, rows_of_block: int, ranks: int) -> tuple[int, ...]:
    """Return the rows of each rank. Ray gives the next block to the rank with the fewest rows.

    So workers know the steps of an epoch before they have seen its rows, which they count.
    """
    full, rest = divmod(rows, rows_of_block)
    shards = [ceil((full - rank) / ranks) * rows_of_block for rank in range(ranks)]
    shards[full % ranks] += rest
    return tuple(shards)
