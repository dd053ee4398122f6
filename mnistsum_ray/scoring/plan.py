"""Which rows become which output file (a part), and which parts are worked on together (a unit)."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from mnistsum_ray.scoring.layout import MOST_NAME_BYTES, is_reserved

_PART_BYTES: Final = 128 * 2**20
"""Most bytes of a part, decompressed, by what the footer says of an average row: pictures may be larger than they should."""

# A unit should be worth its overhead; with several a worker, none is left to work alone for long.
_UNITS_PER_WORKER: Final = 4
_LEAST_ROWS: Final = 1024
_LEAST_FILES: Final = 8
_MOST_FILES: Final = 256

_UNITS_PER_GROUP: Final = 16
"""Each unit reads the row group from its start: more units would skip more rows than they score, fewer leave workers idle."""


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive rows of one input file, which become one output file."""

    name: str
    """The input file, relative to the input's root."""
    size: int
    modified: int
    footer: str
    output: str
    """The output file, relative to the output."""
    first_row: int
    rows: int
    first_group: int
    groups: int
    """How many row groups the rows lie in."""
    skip: int
    """Rows of the first row group before the first row."""


PART_SCHEMA: Final = pa.schema(
    {field.name: pa.int64() if field.type is int else pa.string() for field in dataclasses.fields(Part)}
)


def parts_of(table: pa.Table) -> list[Part]:
    """The rows of a PART_SCHEMA table as Parts."""
    return [Part(**row) for row in table.to_pylist()]


def plan_parts(files: pa.Table, max_rows_per_file: int) -> tuple[pa.Table, dict[str, str]]:
    """Cut large files at their row groups.

    The parts follow from the files and `max_rows_per_file` alone, so that a later run finds the same ones.

    Args:
        files: `inputs.FILE_SCHEMA` and `footers.FOOTER_SCHEMA`; files with an error are left out.
        max_rows_per_file: the most rows of a part.

    Returns:
        A PART_SCHEMA table in the order of the files, and for each file whose output cannot have its name, why.
    """
    clashes: dict[str, str] = {}
    taken: dict[str, str] = {}
    chunks = []
    for batch in files.to_batches(max_chunksize=10_000):
        rows: list[dict[str, Any]] = []
        for file in batch.to_pylist():
            if file["error"] is not None:
                continue
            if ".." in file["name"].split("/"):  # no disk has such a name, but an object store may
                clashes[file["name"]] = "would be written outside of the output; rename it"
                continue
            parts = list(_parts(file, max_rows_per_file))
            longest = max(len(name.encode()) for part in parts for name in part.output.split("/"))
            if longest > MOST_NAME_BYTES:
                clashes[file["name"]] = f"its output's name would have {longest} bytes, and most systems allow 255; rename it"
                continue
            clash = next((part for part in parts if part.output in taken or is_reserved(part.output)), None)
            if clash is not None:
                other = taken.get(clash.output)
                kept = f"as is {other}" if other else "a name that is kept for the run's own and hidden files"
                clashes[file["name"]] = f"would be written to {clash.output}, {kept}; rename it"
                continue
            taken |= {part.output: part.name for part in parts}
            rows += map(asdict, parts)
        chunks.append(pa.Table.from_pylist(rows, PART_SCHEMA))
    return pa.concat_tables(chunks), clashes


def units_of(parts: pa.Table, max_rows_per_file: int, workers: int) -> list[pa.Table]:
    """Put consecutive parts together so that each worker has several units to come, and no unit is many rows or files.

    Slices of one row group are spread over a few units only, since each unit reads the group from its start.
    """
    several = _UNITS_PER_WORKER * workers
    most_rows = min(max_rows_per_file, max(_LEAST_ROWS, _share(pc.sum(parts["rows"]).as_py() or 0, several)))
    most_files = min(_MOST_FILES, max(_LEAST_FILES, _share(parts.num_rows, several)))
    units = []
    for start, end, is_group in _runs(parts):
        if is_group:
            step = _share(end - start, min(_UNITS_PER_GROUP, several))
            units += [parts.slice(first, min(step, end - first)) for first in range(start, end, step)]
            continue
        rows, first = 0, start
        for index, count in enumerate(parts["rows"].slice(start, end - start).to_pylist(), start):
            if index > first and (rows + count > most_rows or index - first == most_files):
                units.append(parts.slice(first, index - first))
                rows, first = 0, index
            rows += count
        units.append(parts.slice(first, end - first))
    return units


def _share(amount: int, among: int) -> int:
    return -(-amount // among)


def _runs(parts: pa.Table) -> Iterator[tuple[int, int, bool]]:
    """Start, end, and whether these are the slices of one row group, of which there are at least two."""
    names, groups, sizes = (parts[name].to_pylist() for name in ("name", "first_group", "groups"))
    start = 0
    for _, members in itertools.groupby(range(parts.num_rows), key=lambda index: (names[index], groups[index])):
        first, *others = members
        if others and sizes[first] == 1:
            if start < first:
                yield start, first, False
            start = others[-1] + 1
            yield first, start, True
    if start < parts.num_rows:
        yield start, parts.num_rows, False


def _parts(file: dict[str, Any], max_rows_per_file: int) -> Iterable[Part]:
    average = file["bytes"] / file["rows"] if file["rows"] else 0
    limit = max(1, min(max_rows_per_file, int(_PART_BYTES / average) if average else max_rows_per_file))
    ranges = list(_ranges(file["groups"], limit)) or [(0, 0, 0, 0)]
    first_row = 0
    for index, (first_group, groups, skip, rows) in enumerate(ranges):
        yield Part(
            name=file["name"],
            size=file["size"],
            modified=file["modified"],
            footer=file["footer"],
            output=file["name"] if len(ranges) == 1 else _split_name(file["name"], index, len(ranges)),
            first_row=first_row,
            rows=rows,
            first_group=first_group,
            groups=groups,
            skip=skip,
        )
        first_row += rows


def _ranges(groups: list[int], limit: int) -> Iterator[tuple[int, int, int, int]]:
    """(first group, groups, rows to skip, rows) of each part: whole row groups where they fit, else slices of one."""
    first, rows = 0, 0
    for index, count in enumerate(groups):
        if rows and rows + count > limit:
            yield first, index - first, 0, rows
            first, rows = index, 0
        if count > limit:
            slices = -(-count // limit)
            bounds = [count * piece // slices for piece in range(slices + 1)]
            for start, end in itertools.pairwise(bounds):
                yield index, 1, start, end - start
            first = index + 1
        else:
            rows += count
    if rows:
        yield first, len(groups) - first, 0, rows


def _split_name(name: str, index: int, count: int) -> str:
    path = PurePosixPath(name)
    return str(path.with_name(f"{path.stem}-{index:05d}-of-{count:05d}{path.suffix}"))
