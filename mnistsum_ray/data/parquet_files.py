"""Parquet files of a data source as a table of their footers, and their row groups as arrays.

A million files take some hundred megabytes, and none of it grows with their rows.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mnistsum_ray.data.parts import PART_ROWS, ParquetPart
from mnistsum_ray.data.row_ranges import RowRanges
from mnistsum_ray.data.sampling import RowIds, split_order
from mnistsum_ray.storage.location import Location

FILE_SCHEMA: Final = pa.schema(
    {
        "name": pa.string(),  # relative to the folder; "" for a source of one file
        "size": pa.int64(),  # bytes
        "modified": pa.int64(),  # nanoseconds since 1970
        "footer_sha256": pa.string(),
        "rows": pa.int64(),
        "group_rows": pa.list_(pa.int64()),  # rows of each row group
        "digit_column": pa.string(),
    }
)
"""One row per file, in the order of the row ids."""

_SAMPLED_GROUPS: Final = 100
"""Row groups that a sample of rows is taken from: each has to be read, from its beginning."""


@dataclass(frozen=True)
class RowGroups:
    """The row groups of all files, in the order of the row ids; arrays of n entries."""

    file: npt.NDArray[np.int64]
    """Index of the file."""
    index: npt.NDArray[np.int64]
    """Index of the group in the file."""
    bounds: npt.NDArray[np.int64]
    """int64[n + 1]: group i holds the row ids bounds[i]..bounds[i + 1]-1."""

    def __len__(self) -> int:
        return len(self.file)

    @property
    def largest(self) -> int:
        """Rows of the largest group."""
        return int(np.diff(self.bounds).max(initial=0))

    def counts(self, rows: RowRanges) -> npt.NDArray[np.int64]:
        """Number of `rows` in each group: int64[n]."""
        return np.diff(rows.count_below(self.bounds))

    def held_out(self, rows: RowRanges, count: int) -> RowRanges:
        """`count` of the rows to hold out: the first ones of each of some row groups, so that few groups have to be read.

        The choice depends only on the row ids, not on a seed, so that runs with different seeds can be compared.
        """
        counts = self.counts(rows)
        order = split_order(self.bounds[:-1])
        order = order[counts[order] > 0]
        enough = int(np.searchsorted(np.cumsum(counts[order]), count)) + 1
        chosen = order[: max(_SAMPLED_GROUPS, enough)]
        # Of each group about as many; of those that have fewer, all.
        each = -(-count // len(chosen))
        while np.minimum(counts[chosen], each).sum() < count:
            each *= 2
        taken = np.minimum(counts[chosen], each)
        taken = np.minimum(taken, np.maximum(0, count - (np.cumsum(taken) - taken)))
        first = rows.count_below(self.bounds[:-1])[chosen]
        indices = np.concatenate([np.arange(start, start + n) for start, n in zip(first, taken, strict=True)])
        return RowRanges.from_ids(rows.at(np.sort(indices)))

    def sample(self, rows: RowRanges, limit: int) -> RowRanges:
        """At most `limit` of the rows: stretches that are evenly spaced, so that few row groups have to be read."""
        if len(rows) <= limit:
            return rows
        stretches = min(_SAMPLED_GROUPS, limit)
        starts = np.arange(stretches) * len(rows) // stretches
        return RowRanges.from_ids(rows.at((starts[:, None] + np.arange(limit // stretches)).ravel()))


@dataclass(frozen=True)
class ParquetFiles:
    """Files with images and digits below one folder, or one file."""

    root: Location
    table: pa.Table
    """FILE_SCHEMA."""

    @cached_property
    def groups(self) -> RowGroups:
        """The row groups that have rows."""
        lists = self.table["group_rows"].combine_chunks()
        rows = lists.flatten().to_numpy().astype(np.int64)
        numbers = lists.value_lengths().to_numpy()
        file = np.repeat(np.arange(len(numbers)), numbers)
        index = np.arange(len(rows)) - np.repeat(np.cumsum(numbers) - numbers, numbers)
        filled = rows > 0
        return RowGroups(file[filled], index[filled], np.concatenate([np.zeros(1, np.int64), np.cumsum(rows[filled])]))

    @cached_property
    def first_ids(self) -> RowIds:
        """Row id of the first row of each file."""
        rows = self.table["rows"].to_numpy()
        return np.cumsum(rows) - rows  # type: ignore[no-any-return]

    def location(self, name: str) -> Location:
        """The file of this name in `table`."""
        return self.root / name if name else self.root

    def parts(self, rows: RowRanges | None = None) -> Iterator[ParquetPart]:
        """The parts that hold any of `rows`, None: all parts. Row groups of a file are put together up to PART_ROWS."""
        first_id = 0
        for file in self.table.to_pylist():
            groups, count, first_row = [], 0, 0
            for group, rows_of_group in enumerate(file["group_rows"]):
                groups.append(group)
                count += rows_of_group
                if count and (count >= PART_ROWS or group == len(file["group_rows"]) - 1):
                    start = first_id + first_row
                    if rows is None or len(rows.within(start, start + count)):
                        location = self.location(file["name"])
                        yield ParquetPart(location, tuple(groups), first_row, count, file["digit_column"], start)
                    groups, count, first_row = [], 0, first_row + count
            first_id += file["rows"]

    def fingerprint(self, splits: tuple[RowRanges, ...]) -> str:
        """SHA-256 over the sizes and footers of all files in the order of their row ids, and over the rows of the splits.

        Names and times are left out, so that a copy of the data has the same.
        """
        digest = hashlib.sha256()
        for size, footer in zip(self.table["size"].to_pylist(), self.table["footer_sha256"].to_pylist(), strict=True):
            digest.update(f"{size} {footer}\n".encode())
        for split in splits:
            digest.update(f"{len(split)} rows".encode() + split.starts.tobytes() + split.ends.tobytes())
        return digest.hexdigest()

    def changed_file(self, earlier: pa.Table, *, same_place: bool) -> str | None:
        """What differs from an earlier table of the files, as `FILE: reason`; None where nothing does.

        Args:
            earlier: FILE_SCHEMA.
            same_place: the earlier files lay in the same folder, so their times must be the same too. A copy has other times.
        """
        compared = ["name", "size", "footer_sha256"] + (["modified"] if same_place else [])
        if self.table.select(compared).equals(earlier.select(compared)):
            return None
        now, then = ({row["name"]: row for row in table.to_pylist()} for table in (self.table, earlier))
        for name in sorted(now.keys() | then.keys()):
            reason = _difference(then.get(name), now.get(name), compared)
            if reason:
                return f"{self.location(name).display}: {reason}"
        return None


def _difference(then: dict[str, Any] | None, now: dict[str, Any] | None, compared: list[str]) -> str | None:
    if then is None:
        return "is new since the run began"
    if now is None:
        return "is missing; it was there when the run began"
    return "has changed since the run began" if any(then[name] != now[name] for name in compared) else None


def groups_holding(groups: RowGroups, rows: RowRanges) -> tuple[npt.NDArray[np.int64], RowIds, RowIds, npt.NDArray[np.int64]]:
    """The groups that hold any of `rows`: group index, first id, end id and number of the rows, int64[m] each."""
    counts = groups.counts(rows)
    filled = np.flatnonzero(counts)
    before = rows.count_below(groups.bounds[:-1])[filled]
    counts = counts[filled]
    return filled, rows.at(before), rows.at(before + counts - 1) + 1, counts
