"""Parts, the consecutive rows of one input file that become one output file; tasks, the parts that are scored at once; and the
counter of the processes that die at a part."""

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Iterator
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
    """Index of the row group that holds the first row. Parts that share it are slices of that row group."""


PART_SCHEMA: Final = pa.schema(
    {field.name: pa.int64() if field.type is int else pa.string() for field in dataclasses.fields(Part)}
)


def split_into_parts(files: pa.Table, max_rows_per_file: int) -> tuple[pa.Table, dict[str, str]]:
    """Split the input files into parts, at their row groups where these are small enough.

    The parts follow from the files and `max_rows_per_file` alone, so that a later run plans the same ones.

    Args:
        files: `preflight.FOOTER_SCHEMA`; files with an error get no parts.
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


def _parts_of_file(file: dict[str, Any], max_rows_per_file: int) -> Iterator[Part]:
    row_bytes = file["bytes"] / file["rows"] if file["rows"] else 0
    limit = max(1, min(max_rows_per_file, int(_MAX_PART_BYTES / row_bytes) if row_bytes else max_rows_per_file))
    ranges = list(_row_ranges(file["group_rows"], limit)) or [(0, 0)]  # a file without rows has one empty part
    first_row = 0
    for index, (first_group, rows) in enumerate(ranges):
        yield Part(
            name=file["name"],
            size=file["size"],
            modified=file["modified"],
            footer_sha256=file["footer_sha256"],
            output=file["name"] if len(ranges) == 1 else _split_name(file["name"], index, len(ranges)),
            first_row=first_row,
            rows=rows,
            first_group=first_group,
        )
        first_row += rows


def _row_ranges(group_rows: list[int], limit: int) -> Iterator[tuple[int, int]]:
    """Yield (first row group, rows) of each part: whole row groups where they fit, else slices of one."""
    first, rows = 0, 0
    for index, count in enumerate(group_rows):
        if rows and rows + count > limit:
            yield first, rows
            first, rows = index, 0
        if count > limit:
            slices = _ceil_divide(count, limit)
            bounds = [count * number // slices for number in range(slices + 1)]
            yield from ((index, end - start) for start, end in itertools.pairwise(bounds))
            first = index + 1
        else:
            rows += count
    if rows:
        yield first, rows


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
    names, groups, counts = (parts[name].to_pylist() for name in ("name", "first_group", "rows"))
    starts: list[int] = []  # the first part of each task
    rows = max_rows  # of the last task, which takes more parts while it has fewer than `max_rows`
    for _, members in itertools.groupby(range(parts.num_rows), key=lambda index: (names[index], groups[index])):
        first, *others = members
        if others:  # slices of one row group
            count = 1 + len(others)
            starts += range(first, first + count, _ceil_divide(count, min(_MAX_TASKS_PER_GROUP, wanted)))
            rows = max_rows
        elif not starts or rows + counts[first] > max_rows or first - starts[-1] == max_parts:
            starts.append(first)
            rows = counts[first]
        else:
            rows += counts[first]
    return [{"first": start, "count": end - start} for start, end in itertools.pairwise([*starts, parts.num_rows])]


def _ceil_divide(amount: int, count: int) -> int:
    return -(-amount // count)


class CrashCounter:
    """Counts how often each key was begun without being ended. An actor, because the process that began it may have died."""

    def __init__(self) -> None:
        self._begun: dict[str, list[str]] = defaultdict(list)
        """The node of each attempt."""

    def begin(self, key: str, node: str) -> int:
        """Count an attempt on a node; return the number of attempts that have not ended, this one included.

        An attempt that ended with its node does not count: the node was lost, and not for what it worked on.
        """
        import ray

        attempts = self._begun[key]
        if attempts:
            lost = {entry["NodeID"] for entry in ray.nodes() if not entry["Alive"]}
            attempts[:] = [attempt for attempt in attempts if attempt not in lost]
        attempts.append(node)
        return len(attempts)

    def end(self, key: str) -> None:
        """Forget the attempts: the process survived the work."""
        del self._begun[key]


def start_crash_counter() -> Any:
    """Start a `CrashCounter` actor on the driver's node, so that losing another node does not lose the counts."""
    import ray  # Takes a second, and a request that is refused early does not need it.
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    this_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(CrashCounter).options(num_cpus=0, scheduling_strategy=this_node).remote()
