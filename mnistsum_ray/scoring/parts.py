"""Parts, tasks and stamps. A part is the consecutive rows of one input file that become one output file.

A task is the parts that are scored at once. A stamp says in the Parquet metadata of an output file what it was made from.

The output needs no bookkeeping but the stamps: from them follow which parts are done, and whether all rows exist.
"""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Final

import numpy as np
import pyarrow as pa

from mnistsum_ray.data.parquet import read_footer
from mnistsum_ray.errors import UnusableFileError
from mnistsum_ray.storage.location import Location, is_hidden

PREDICTIONS: Final = "predictions"
"""Folder of the scored rows."""

REJECTED: Final = "rejected"
"""Folder of the rejected rows; its files have the names of the prediction files."""

_MAX_PART_BYTES: Final = 128 * 2**20
"""Largest part, decompressed, estimated from the footer's average row: a row may hold pictures that are larger than 28 x 28."""

_DEFAULT_ROWS: Final = (8_192, 32_768)
"""Least and most rows of a part, unless the user says otherwise. A kill costs each worker the part that it scores; 32,768 rows
are 10 s of a CPU core, and 180 MB of a worker more than 8,192, whose output file has 0.4 MB."""

_THREADS: Final = 16
_FILES_AT_ONCE: Final = 1000


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


PART_SCHEMA: Final = pa.schema(
    {field.name: pa.int64() if field.type is int else pa.string() for field in dataclasses.fields(Part)}
)


def split_into_parts(files: pa.Table, max_rows_per_file: int | None) -> tuple[pa.Table, dict[str, str]]:
    """Split the input files into parts, at the ends of their row groups where these are short and all of one size.

    The parts of a file follow from the file (`preflight.FOOTER_SCHEMA`) and `max_rows_per_file`
    alone: a later run plans the same ones. Without `max_rows_per_file` a part is a quarter of its
    file, within _DEFAULT_ROWS.

    Returns:
        A PART_SCHEMA table in the order of the files, which lacks those with an error; and the
        files that cannot have output files: name and reason.
    """
    errors: dict[str, str] = {}
    taken: dict[str, str] = {}  # input file by output file
    tables = []
    for batch in files.to_batches(max_chunksize=_FILES_AT_ONCE):
        rows: list[dict[str, Any]] = []
        for file in batch.to_pylist():
            if file["error"] is not None:
                continue
            parts = list(_parts_of_file(file, max_rows_per_file))
            outputs = [part["output"] for part in parts]
            if error := _name_error(file["name"], outputs, taken):
                errors[file["name"]] = error
                continue
            taken |= dict.fromkeys(outputs, file["name"])
            rows += parts
        tables.append(pa.Table.from_pylist(rows, PART_SCHEMA))
    return pa.concat_tables(tables), errors


def _name_error(name: str, outputs: list[str], taken: dict[str, str]) -> str | None:
    """Return why the output files of an input file cannot have their names; None if they can."""
    if ".." in name.split("/"):  # An object store allows such a key; a disk does not.
        return "would be written outside of the output; rename it"
    if is_hidden(name):
        return "would be written to a name that readers of Parquet skip, as all names with . or _ in front; rename it"
    for output in outputs:
        if output in taken:
            return f"would need the name {output} in the output, as does {taken[output]}; rename it"
    return None


def _parts_of_file(file: dict[str, Any], max_rows_per_file: int | None) -> Iterator[dict[str, Any]]:
    """The rows of PART_SCHEMA."""
    rows, path = file["rows"], PurePosixPath(file["name"])
    least, most = _DEFAULT_ROWS
    limit = max_rows_per_file or min(most, max(least, _ceil_divide(rows, 4)))
    # Not fewer than eight: what the footer says of bytes may be wrong.
    limit = min(limit, max(8, _MAX_PART_BYTES * rows // max(1, file["bytes"])))
    group = file["longest_group"]
    # Whole row groups, which mostly are all of one size; or slices of one, of nearly equal size.
    size = limit - limit % group if 0 < group <= limit else _ceil_divide(rows, max(1, _ceil_divide(rows, limit)))
    bounds = [*range(0, rows, size), rows] if rows else [0, 0]  # a file without rows has one empty part
    count = len(bounds) - 1
    of_file = {name: file[name] for name in ("name", "size", "modified", "footer_sha256")}
    for index, (start, end) in enumerate(itertools.pairwise(bounds)):
        output = file["name"] if count == 1 else str(path.with_name(f"{path.stem}-{index:05d}-of-{count:05d}{path.suffix}"))
        yield of_file | {"output": output, "first_row": start, "rows": end - start}


Task = dict[str, int]
"""Parts `first`..`first + count - 1` of a table of parts."""

CPU_TASK_ROWS: Final = 32_768
GPU_TASK_ROWS: Final = 262_144
"""Rows of a task, some seconds of work: a task costs the driver 7 to 9 ms."""

_MIN_TASK_ROWS: Final = 4_096
"""Rows that a CPU core scores while a worker starts: with fewer rows a worker, fewer workers end sooner."""

_TASKS_PER_WORKER: Final = 4
"""With several tasks per worker, none has to finish a long one alone at the end."""

_MAX_TASKS: Final = 16_384
"""With more rows the tasks get longer: Ray Data takes 0.5 ms a task before the first starts, and says nothing meanwhile."""

_PART_ROWS: Final = 32
"""Rows that take as long as to open and to write the files of a part."""


def make_tasks(parts: pa.Table, max_rows: int, workers: int) -> list[Task]:
    """Group consecutive parts (PART_SCHEMA) so that each worker gets several tasks of about `max_rows` or fewer."""
    rows = parts["rows"].to_numpy() + _PART_ROWS
    total = int(rows.sum())
    task_rows = max(_MIN_TASK_ROWS, _ceil_divide(total, _TASKS_PER_WORKER * workers))
    task_rows = max(min(task_rows, max_rows), _ceil_divide(total, _MAX_TASKS))
    rows_before = np.cumsum(rows) - rows
    _, starts = np.unique(rows_before // task_rows, return_index=True)
    bounds = [*starts.tolist(), parts.num_rows]
    return [{"first": start, "count": end - start} for start, end in itertools.pairwise(bounds)]


def _ceil_divide(amount: int, count: int) -> int:
    return -(-amount // count)


def map_files(
    read: Callable[[dict[str, Any]], dict[str, Any]], folder: Location, files: pa.Table, on_progress: Callable[[int], None]
) -> Iterator[list[dict[str, Any]]]:
    """Apply `read` to each row of a table of files in a folder; yield the results in order, many at once."""
    # An object store answers slowly but takes many requests at once. A local disk answers at once,
    # and threads slow it down.
    with ThreadPoolExecutor(1 if folder.is_local else _THREADS) as pool:
        for batch in files.to_batches(max_chunksize=_FILES_AT_ONCE):
            yield list(pool.map(read, batch.to_pylist()))
            on_progress(batch.num_rows)


KEY: Final = b"mnistsum_ray.score"
"""Key of the stamp in the Parquet metadata."""

STAMP_FORMAT: Final = 10
"""Version of the stamp, of the counts and of how files are split. An output of another version is
refused."""

COUNTS_KEY: Final = b"mnistsum_ray.counts"
"""Key of `counts.RowCounts`, which are for the report."""


def to_metadata(stamp: dict[str, Any], counts: str) -> dict[bytes, bytes]:
    """A stamp and the JSON of `counts.RowCounts` as entries of Parquet metadata.

    The stamp is what a part was made from, in its predictions and in its rejected rows: the fields
    of `Part`; `source`, the input file in full; `rejected`, how many of the rows are; and `spec`,
    the model and settings (`preflight.Plan.spec`).
    """
    return {KEY: json.dumps({"format": STAMP_FORMAT} | stamp).encode(), COUNTS_KEY: counts.encode()}


def from_metadata(metadata: Mapping[bytes, bytes] | None) -> dict[str, Any]:
    """The stamp in Parquet metadata; an UnusableFileError where none of this version is there."""
    if not metadata or KEY not in metadata:
        raise UnusableFileError("is not a file of this program")
    stamp: dict[str, Any] = json.loads(metadata[KEY])
    if stamp.pop("format") != STAMP_FORMAT:
        raise UnusableFileError("was written by another version of this program")
    return stamp


def read_stamp(folder: Location, file: str, size: int | None = None) -> tuple[dict[str, Any], int, str]:
    """Read the footer of a file in an output folder; its size is asked for where it is not known.

    Returns:
        The stamp, in which `output` is the file's own name; the rows of the file; and the JSON of its `counts.RowCounts`.

    Raises:
        UnusableFileError: it is not a whole file of this version of the program.
        StorageError: the storage does not give the file.
    """
    place = folder / file
    if size is None:
        found = place.status()
        size = found.size if found else 0
    footer = read_footer(place, size).metadata
    stamp = from_metadata(footer.metadata) | {"output": file.partition("/")[2]}
    return stamp, footer.num_rows, footer.metadata[COUNTS_KEY].decode()
