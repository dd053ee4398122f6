"""From rows as they are read to decoded rows: each with an id, its split, or why it is rejected.

An id follows from the content of a row alone, and a split is a range of ids. So the same rows have
the same ids and splits on a disk, in a bucket, and under other names; rows that are equal are in
one split. What a run must know of its rows is a summary a block, which `summarize` gives.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mnistsum_ray.data.columns import (
    Column,
    ReasonCounts,
    RejectedRow,
    decode_columns,
    one_chunk,
    rows_in,
)
from mnistsum_ray.data.parquet import open_parquet
from mnistsum_ray.data.randomness import RowTotals, content_ids, positions
from mnistsum_ray.data.sources import SPLITS, DataFile, Ranges, Source
from mnistsum_ray.errors import RequestError, UnusableFileError
from mnistsum_ray.storage.bucket import arrow_place
from mnistsum_ray.storage.store import in_threads

_NAMED_ROWS: Final = 5
"""Rejected rows that are named."""

_BATCH_BYTES: Final = 8 * 2**20

_NO_SPLIT: Final = -1
"""Of rejected rows, and of those beyond `--max-rows`."""


def decode(
    rows: pa.Table, columns: Mapping[str, Column], names: Mapping[str, str], ranges: Ranges
) -> pa.Table:
    """Decode columns, which have these names; `path` says where a row is from.

    Returns the columns by their names in the task; `row_id` int64; `split` int8, an index of
    `SPLITS` or -1; `reason`, which is null but in rejected rows; and `path`.
    """
    arrays, reasons = decode_columns(columns, rows, names)
    ids = content_ids(arrays)
    place = positions(ids)
    splits = np.full(len(ids), _NO_SPLIT, np.int8)
    for split, (start, stop) in ranges.items():
        splits[(start <= place) & (place < stop)] = SPLITS.index(split)
    splits[[*reasons]] = _NO_SPLIT
    decoded = {key: columns[key].to_arrow(values) for key, values in arrays.items()}
    decoded["row_id"] = pa.array(ids)
    decoded["split"] = pa.array(splits)
    decoded["reason"] = pa.array([reasons.get(row) for row in range(len(ids))], pa.string())
    decoded["path"] = one_chunk(rows["path"]).dictionary_encode()
    return pa.table(decoded)


def select(decoded: pa.Table, splits: list[str]) -> pa.Table:
    """The rows of these splits."""
    indexes = pa.array([SPLITS.index(split) for split in splits], pa.int8())
    return decoded.filter(pc.is_in(decoded["split"], indexes))


def without_origin(decoded: pa.Table) -> pa.Table:
    """What a worker needs of decoded rows: the task's columns and `row_id`."""
    return decoded.drop_columns(["split", "reason", "path"])


def summarize(decoded: pa.Table) -> pa.Table:
    """Count rows, and sum up their ids modulo 2**64, by `path`, `split` and `reason`."""
    keys = {"path": decoded["path"].cast(pa.string())}
    keys |= {key: decoded[key] for key in ("split", "reason", "row_id")}
    groups = pa.table(keys).group_by(["path", "split", "reason"])
    return groups.aggregate([("row_id", "count"), ("row_id", "sum")])


class Summary(NamedTuple):
    """What is known of all decoded rows of a run."""

    totals: dict[str, RowTotals]  # by split
    rows_of_paths: Counter[str]
    reasons: Counter[str]  # of rejected rows
    rejected_paths: set[str]

    @classmethod
    def of(cls, summaries: Iterable[Mapping[str, Any]]) -> "Summary":
        """Add up rows of the tables of `summarize`."""
        found = cls({}, Counter(), Counter(), set())
        for group in summaries:
            rows, path, reason = group["row_id_count"], group["path"], group["reason"]
            found.rows_of_paths[path] += rows
            if reason is not None:
                found.reasons[reason] += rows
                found.rejected_paths.add(path)
            elif group["split"] != _NO_SPLIT:
                split = SPLITS[group["split"]]
                before = found.totals.get(split, RowTotals(0, 0))
                found.totals[split] = before.plus(rows, group["row_id_sum"])
        totals: dict[str, RowTotals] = {}
        for split in SPLITS:
            if split in found.totals:
                totals[split] = found.totals[split]
        return found._replace(totals=totals)

    def rejected(self, source: Source, columns: Mapping[str, Column]) -> ReasonCounts:
        """The rejected rows by reason, with the first of them."""
        examples: list[RejectedRow] = []  # none of rows in memory, which the task has made
        for file in source.all_files:
            _, path = arrow_place(file.path)
            if path in self.rejected_paths and len(examples) < _NAMED_ROWS:
                with _refused_if_damaged(file):  # Ray Data does not check the CRC of pages
                    examples += _first_rejected_rows(file, columns, _NAMED_ROWS - len(examples))
        counts = ReasonCounts()
        counts.add(self.reasons, examples)
        return counts


def _first_rejected_rows(
    file: DataFile, columns: Mapping[str, Column], count: int
) -> list[RejectedRow]:
    """The first rejected rows of a file: so many at most.

    The file is read again, since Ray Data reads the row groups of a large one in another order.
    """
    of_folders = dict(re.findall(r"(?:^|(?<=/))([^/=]+)=([^/]*)/", file.name))
    batch_rows = rows_in(_BATCH_BYTES, columns.values())
    found: list[RejectedRow] = []
    first_row = 0
    with open_parquet(file.path) as parquet:
        for batch in parquet.iter_batches(batch_rows, columns=file.columns_in_file):
            table = pa.Table.from_batches([batch])
            for folder in file.of_folders:
                table = table.append_column(folder, pa.repeat(of_folders[folder], len(batch)))
            _, reasons = decode_columns(columns, table, file.columns)
            found += [(file.name, first_row + row, reason) for row, reason in reasons.items()]
            if len(found) >= count:
                break
            first_row += len(batch)
    return found[:count]


def refuse_damaged_file(source: Source, said: str) -> None:
    """RequestError that names the file which cannot be read, if there is one.

    Only the files that Ray Data's error names are read, or all if it names none.
    """
    files = source.all_files
    if not files:
        return
    named = [file for file in files if arrow_place(file.path)[1] in said]

    def read_again(file: DataFile) -> None:
        with _refused_if_damaged(file), open_parquet(file.path) as parquet:
            for _ in parquet.iter_batches(columns=file.columns_in_file):
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
