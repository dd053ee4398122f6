"""Parts, the consecutive rows of one input file that become one output file; and tasks, the parts that are scored at once."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from mnistsum_ray.storage.listing import is_hidden

MAX_NAME_BYTES: Final = 255
"""Longest file name, without its folder, on most file systems."""

_MAX_PART_BYTES: Final = 128 * 2**20
"""Largest part, decompressed, estimated from the footer's average row: a row may hold pictures that are larger than 28 x 28."""


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive rows of one input file, which become one output file."""

    name: str
    """The input file, relative to the input's root."""
    size: int
    """Bytes of the input file."""
    modified: int
    """When the input file was last modified, in nanoseconds since 1970."""
    footer_sha256: str
    """SHA-256 of the input file's footer."""
    output: str
    """The output file, relative to the output folder."""
    first_row: int
    """Index of the first row in the input file."""
    rows: int
    first_group: int
    """Index of the row group that holds the first row."""
    num_groups: int
    """Number of row groups that hold the rows."""
    skip_rows: int
    """Rows of the first row group before the first row."""


PART_SCHEMA: Final = pa.schema(
    {field.name: pa.int64() if field.type is int else pa.string() for field in dataclasses.fields(Part)}
)


def parts_of(table: pa.Table) -> list[Part]:
    """Convert a PART_SCHEMA table to Parts."""
    return [Part(**row) for row in table.to_pylist()]


def split_into_parts(files: pa.Table, max_rows_per_file: int) -> tuple[pa.Table, dict[str, str]]:
    """Split the input files into parts, at their row groups where these are small enough.

    The parts follow from the files and `max_rows_per_file` alone, so that a later run plans the same ones.

    Args:
        files: `inputs.FILE_SCHEMA` and `footers.FOOTER_SCHEMA`; files with an error get no parts.
        max_rows_per_file: the most rows of a part.

    Returns:
        A PART_SCHEMA table in the order of the files, and the files that cannot have output files: name and reason.
    """
    errors: dict[str, str] = {}
    planned: dict[str, str] = {}  # input file by output file
    tables = []
    for batch in files.to_batches(max_chunksize=10_000):
        rows: list[dict[str, Any]] = []
        for file in batch.to_pylist():
            if file["error"] is not None:
                continue
            parts = list(_parts_of_file(file, max_rows_per_file))
            error = _name_error(file["name"], parts, planned)
            if error:
                errors[file["name"]] = error
                continue
            planned |= {part.output: part.name for part in parts}
            rows += map(asdict, parts)
        tables.append(pa.Table.from_pylist(rows, PART_SCHEMA))
    return pa.concat_tables(tables), errors


def _name_error(name: str, parts: list[Part], planned: dict[str, str]) -> str | None:
    """Return why the output files of an input file cannot have their names; None if they can."""
    if ".." in name.split("/"):  # An object store allows such a key; a disk does not.
        return "would be written outside of the output; rename it"
    longest = max(len(component.encode()) for part in parts for component in part.output.split("/"))
    if longest > MAX_NAME_BYTES:
        return f"its output's name would have {longest} bytes, and most systems allow {MAX_NAME_BYTES}; rename it"
    for part in parts:
        if part.output in planned:
            return f"would be written to {part.output}, as is {planned[part.output]}; rename it"
        if is_hidden(part.output):
            return (
                f"would be written to {part.output}, which readers of Parquet skip, as all names with . or _ in front; rename it"
            )
    return None


def _parts_of_file(file: dict[str, Any], max_rows_per_file: int) -> Iterable[Part]:
    row_bytes = file["bytes"] / file["rows"] if file["rows"] else 0
    limit = max(1, min(max_rows_per_file, int(_MAX_PART_BYTES / row_bytes) if row_bytes else max_rows_per_file))
    ranges = list(_row_ranges(file["group_rows"], limit)) or [(0, 0, 0, 0)]  # a file without rows has one empty part
    first_row = 0
    for index, (first_group, num_groups, skip_rows, rows) in enumerate(ranges):
        yield Part(
            name=file["name"],
            size=file["size"],
            modified=file["modified"],
            footer_sha256=file["footer_sha256"],
            output=file["name"] if len(ranges) == 1 else _split_name(file["name"], index, len(ranges)),
            first_row=first_row,
            rows=rows,
            first_group=first_group,
            num_groups=num_groups,
            skip_rows=skip_rows,
        )
        first_row += rows


def _row_ranges(group_rows: list[int], limit: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield (first group, number of groups, rows to skip, rows) per part: whole row groups if they fit, else slices of one."""
    first, rows = 0, 0
    for index, count in enumerate(group_rows):
        if rows and rows + count > limit:
            yield first, index - first, 0, rows
            first, rows = index, 0
        if count > limit:
            slices = -(-count // limit)
            bounds = [count * number // slices for number in range(slices + 1)]
            for start, end in itertools.pairwise(bounds):
                yield index, 1, start, end - start
            first = index + 1
        else:
            rows += count
    if rows:
        yield first, len(group_rows) - first, 0, rows


def _split_name(name: str, index: int, count: int) -> str:
    path = PurePosixPath(name)
    return str(path.with_name(f"{path.stem}-{index:05d}-of-{count:05d}{path.suffix}"))


Task = dict[str, int]
"""Parts `first`..`first + count - 1` of a table of parts."""

CPU_TASK_ROWS: Final = 8_192
GPU_TASK_ROWS: Final = 65_536
"""Most rows of a task of small parts; a task costs the driver some milliseconds."""

_TASKS_PER_WORKER: Final = 4
"""With several tasks per worker, none has to finish a long one alone at the end."""

# A task with fewer rows and fewer parts is not worth its overhead.
_MIN_ROWS: Final = 1024
_MIN_PARTS: Final = 8
_MAX_PARTS: Final = 256

_MAX_TASKS_PER_GROUP: Final = 16
"""Each task reads the row group from its start: with more tasks they would skip more rows than they score, with fewer, workers
would idle."""


def make_tasks(parts: pa.Table, max_rows: int, workers: int) -> list[Task]:
    """Group consecutive parts so that each worker gets several tasks, and no task has very many rows or parts.

    The slices of one row group go into a few tasks only, since each task reads the group from its start.

    Args:
        parts: PART_SCHEMA.
        max_rows: of a task with several parts.
        workers: that score at the same time.

    Returns:
        Each part in one task, in their order.
    """
    wanted = _TASKS_PER_WORKER * workers
    max_rows = min(max_rows, max(_MIN_ROWS, _ceil_divide(pc.sum(parts["rows"]).as_py() or 0, wanted)))
    max_parts = min(_MAX_PARTS, max(_MIN_PARTS, _ceil_divide(parts.num_rows, wanted)))
    tasks: list[Task] = []
    for start, end, is_one_group in _stretches(parts):
        if is_one_group:
            step = _ceil_divide(end - start, min(_MAX_TASKS_PER_GROUP, wanted))
            tasks += [{"first": first, "count": min(step, end - first)} for first in range(start, end, step)]
            continue
        rows, first = 0, start
        for index, count in enumerate(parts["rows"].slice(start, end - start).to_pylist(), start):
            if index > first and (rows + count > max_rows or index - first == max_parts):
                tasks.append({"first": first, "count": index - first})
                rows, first = 0, index
            rows += count
        tasks.append({"first": first, "count": end - first})
    return tasks


def _ceil_divide(amount: int, count: int) -> int:
    return -(-amount // count)


def _stretches(parts: pa.Table) -> Iterator[tuple[int, int, bool]]:
    """Yield (start, end, whether the parts are slices of one row group, at least two of them), which together cover `parts`."""
    names, first_groups, num_groups = (parts[name].to_pylist() for name in ("name", "first_group", "num_groups"))
    start = 0
    for _, members in itertools.groupby(range(parts.num_rows), key=lambda index: (names[index], first_groups[index])):
        first, *others = members
        if others and num_groups[first] == 1:
            if start < first:
                yield start, first, False
            start = others[-1] + 1
            yield first, start, True
    if start < parts.num_rows:
        yield start, parts.num_rows, False
