"""From rows as they are read to decoded rows: each with an id, its split, or why it is rejected.

An id follows from the content of a row alone, and a split is a range of ids. So the same rows have
the same ids and splits on a disk, in a bucket, and under other names; rows that are equal are in
one split. What a run must know of its rows is a summary a block, which `summarize` gives.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mnistsum_ray.data.columns.base import (
    Column,
    ReasonCounts,
    RejectedRow,
    decode_columns,
    one_chunk,
    rows_in,
)
from mnistsum_ray.data.parquet import open_parquet
from mnistsum_ray.data.randomness import RowIds
from mnistsum_ray.data.sources import SPLITS, DataFile, Ranges, Source
from mnistsum_ray.errors import RequestError, RowCountError, UnusableFileError
from mnistsum_ray.storage.uri import arrow_place

_NAMED_ROWS: Final = 5
"""Rejected rows that are named."""

_BATCH_BYTES: Final = 8 * 2**20
"""Decoded at once, where a file is read again."""

_NO_SPLIT: Final = -1
"""Of rejected rows, and of those beyond `--max-rows`."""


def content_ids(arrays: Mapping[str, npt.NDArray[Any]]) -> RowIds:
    """Return ids of decoded rows, int64[n]: 64 bits of the BLAKE2b of a row's values.

    Equal rows have one id. That any two of a billion other rows share theirs has odds of 3 %.
    """
    values_of_columns = []
    for values in arrays.values():
        if values.dtype == object:  # encoded pictures, of any length
            framed = (len(value).to_bytes(8, "little") + value for value in values)
            values_of_columns.append(framed)
        else:
            values_of_columns.append(value.tobytes() for value in values)
    rows = zip(*values_of_columns, strict=True)
    digests = (hashlib.blake2b(b"".join(row), digest_size=8).digest() for row in rows)
    return np.frombuffer(b"".join(digests), "<i8").astype(np.int64)


def positions(row_ids: RowIds) -> npt.NDArray[np.float64]:
    """Return where ids lie among all ids, 0..1 without 1: a split is a range of it."""
    upper_bits = (row_ids.view(np.uint64) >> np.uint64(11)).astype(np.float64)
    return upper_bits * 2.0**-53


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
    """Return the rows of these splits."""
    indexes = pa.array([SPLITS.index(split) for split in splits], pa.int8())
    return decoded.filter(pc.is_in(decoded["split"], indexes))


def without_origin(decoded: pa.Table) -> pa.Table:
    """Return what a worker needs of decoded rows: the task's columns and `row_id`."""
    return decoded.drop_columns(["split", "reason", "path"])


def _classes(columns: Mapping[str, Column]) -> dict[str, set[int]]:
    """Return the class numbers of columns that have classes; the driver keeps each number."""
    names = {key: column.class_names for key, column in columns.items()}
    return {key: {*range(len(of_column))} for key, of_column in names.items() if of_column}


def summarize(decoded: pa.Table, columns: Mapping[str, Column]) -> pa.Table:
    """Count rows, sum up their ids modulo 2**64, and list classes, by path, split and reason."""
    classes = _classes(columns)
    keys = {"path": decoded["path"].cast(pa.string())}
    keys |= {key: decoded[key] for key in ("split", "reason", "row_id", *classes)}
    groups = pa.table(keys).group_by(["path", "split", "reason"])
    values = [(key, "distinct") for key in classes]
    return groups.aggregate([("row_id", "count"), ("row_id", "sum"), *values])


@dataclass(frozen=True)
class RowTotals:
    """What all workers together must see of a split: the number of its rows, and which they are."""

    rows: int
    id_sum: int  # of their ids, modulo 2**64

    @classmethod
    def of(cls, ids: RowIds) -> "RowTotals":
        return cls(len(ids), int(ids.sum()) % 2**64)

    def plus(self, rows: int, id_sum: int) -> "RowTotals":
        return RowTotals(self.rows + rows, (self.id_sum + id_sum) % 2**64)

    def check(self, rows: int, id_sum: int, where: str) -> None:
        """Raise RowCountError unless the rows seen, by count and sum of ids, are these."""
        if rows == self.rows and (id_sum - self.id_sum) % 2**64 == 0:
            return
        seen = "other rows than planned"
        if rows != self.rows:
            seen = f"{rows:,} rows, where the plan has {self.rows:,}"
        lost = "rows were lost or repeated, so this run cannot be trusted"
        raise RowCountError(f"{where} saw {seen}: {lost}")


class Summary(NamedTuple):
    """What is known of all decoded rows of a run."""

    totals: dict[str, RowTotals]  # by split
    rows_of_paths: Counter[str]
    reasons: Counter[str]  # of rejected rows
    rejected_paths: set[str]
    missing: dict[str, set[int]]  # by column, the classes that no training row has

    @classmethod
    def of(cls, summaries: Iterable[Mapping[str, Any]], columns: Mapping[str, Column]) -> "Summary":
        """Add up rows of the tables of `summarize`."""
        found = cls({}, Counter(), Counter(), set(), _classes(columns))
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
                for key, missing in found.missing.items() if split == "train" else ():
                    missing.difference_update(group[f"{key}_distinct"])
        in_order = sorted(found.totals, key=SPLITS.index)
        return found._replace(totals={split: found.totals[split] for split in in_order})

    def rejected(self, source: Source, columns: Mapping[str, Column]) -> ReasonCounts:
        """Return the rejected rows by reason, with the first of them.

        They are read or decoded again, since Ray Data says no row's place in its file.
        """
        examples: list[RejectedRow] = []
        for split, table in source.tables.items():
            name = f"{source.name} ({split})"
            if name in self.rejected_paths:
                _, reasons = decode_columns(columns, table, {key: key for key in columns})
                examples += [(name, row, reason) for row, reason in reasons.items()]
        for file in source.all_files:
            if arrow_place(file.path)[1] not in self.rejected_paths:
                continue
            first_row = 0
            for batch in _read_again(file, columns):
                if len(examples) >= _NAMED_ROWS:
                    break
                _, reasons = decode_columns(columns, batch, file.columns)
                examples += [(file.name, first_row + row, reasons[row]) for row in reasons]
                first_row += len(batch)
        counts = ReasonCounts()
        counts.add(self.reasons, examples)
        return counts


def refuse_damaged_file(source: Source, columns: Mapping[str, Column], said: str) -> None:
    """Raise RequestError that names the file which cannot be read, if there is one.

    Only the files that Ray Data's error names are read, or all if it names none.
    """
    files = source.all_files
    for file in [one for one in files if arrow_place(one.path)[1] in said] or files:
        for _ in _read_again(file, columns):
            pass


def _read_again(file: DataFile, columns: Mapping[str, Column]) -> Iterator[pa.RecordBatch]:
    """Yield batches of the task's columns. RequestError: the file is damaged.

    Unlike Ray Data this checks the CRC of pages.
    """
    rows = rows_in(_BATCH_BYTES, columns.values())
    try:
        with open_parquet(file.path) as parquet:
            yield from parquet.iter_batches(rows, columns=[*file.columns.values()])
    except UnusableFileError as error:
        raise RequestError(f"--data {file.path.display}: {error}") from None
