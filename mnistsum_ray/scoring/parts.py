"""Parts, tasks and stamps. A part is the consecutive rows of one input file that become one output file. A task is the parts that
are scored at once. A stamp says in the Parquet metadata of an output file what it was made from.

The output needs no bookkeeping but the stamps: from them follow which parts are done, and whether all rows exist.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from mnistsum_ray.data.parquet import read_footer
from mnistsum_ray.errors import UnusableFileError, one_line
from mnistsum_ray.storage.location import Location, is_hidden

PREDICTIONS: Final = "predictions"
"""Folder of the scored rows."""

REJECTED: Final = "rejected"
"""Folder of the rejected rows; its files have the names of the prediction files."""

MAX_NAME_BYTES: Final = 255
"""Longest file name, without its folder, on most file systems."""

_MAX_PART_BYTES: Final = 128 * 2**20
"""Largest part, decompressed, estimated from the footer's average row: a row may hold pictures that are larger than 28 x 28."""

_DEFAULT_ROWS: Final = (8_192, 32_768)
"""Least and most rows of a part, unless the user says otherwise. A kill costs each worker the part that it scores; 32,768 rows
are 10 s of a CPU core, and 180 MB of a worker more than 8,192, whose output file has 0.4 MB."""

_MIN_PART_ROWS: Final = 8
"""Least rows of a part, which may then be larger: what the footer says of bytes may be wrong."""


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
    longest_group: int
    """Rows of the longest row group of the input file."""
    output: str
    """The output file, relative to the output folder."""
    first_row: int
    """Index of the first row in the input file."""
    rows: int


PART_SCHEMA: Final = pa.schema(
    {field.name: pa.int64() if field.type is int else pa.string() for field in dataclasses.fields(Part)}
)

PLAN_SCHEMA: Final = PART_SCHEMA.append(pa.field("digest", pa.binary(16)))
"""Parts, each with its `digest`."""


def digest(part: Mapping[str, Any]) -> bytes:
    """Digest of the fields of a part: a stamp with the same one is of the same rows of the same input file."""
    return hashlib.blake2b(repr([part[name] for name in PART_SCHEMA.names]).encode(), digest_size=16).digest()


def split_into_parts(files: pa.Table, max_rows_per_file: int | None) -> tuple[pa.Table, dict[str, str]]:
    """Split the input files into parts, at the ends of their row groups where these are short and all of one size.

    The parts follow from the files (`preflight.FOOTER_SCHEMA`) and `max_rows_per_file` alone, and those of a file from that file:
    a later run plans the same ones. Without `max_rows_per_file` a part is a quarter of its file, within _DEFAULT_ROWS.

    Returns:
        A PLAN_SCHEMA table in the order of the files, which lacks those with an error; and the files that cannot have output
        files: name and reason.
    """
    errors: dict[str, str] = {}
    planned: dict[str, str] = {}  # input file by output file, and one by folder of output files, with / at its end
    tables = []
    for batch in files.to_batches(max_chunksize=1000):
        rows: list[dict[str, Any]] = []
        for file in batch.to_pylist():
            if file["error"] is not None:
                continue
            parts = list(_parts_of_file(file, max_rows_per_file))
            outputs = [part["output"] for part in parts]
            if error := _name_error(file["name"], outputs, planned):
                errors[file["name"]] = error
                continue
            planned |= dict.fromkeys((*outputs, *(f"{folder}/" for folder in folders_above(file["name"]))), file["name"])
            rows += parts
        tables.append(pa.Table.from_pylist(rows, PLAN_SCHEMA))
    return pa.concat_tables(tables), errors


def _name_error(name: str, outputs: list[str], planned: dict[str, str]) -> str | None:
    """Return why the output files of an input file cannot have their names; None if they can."""
    if ".." in name.split("/"):  # An object store allows such a key; a disk does not.
        return "would be written outside of the output; rename it"
    longest = max(len(component.encode()) for output in outputs for component in output.split("/"))
    if longest > MAX_NAME_BYTES:
        return f"its output's name would have {longest} bytes, and most systems allow {MAX_NAME_BYTES}; rename it"
    # No file has the name of a file or a folder, no folder that of a file.
    for key in itertools.chain(outputs, (f"{output}/" for output in outputs), folders_above(name)):
        if key in planned:
            return f"would need the name {key.rstrip('/')} in the output, as does {planned[key]}; rename it"
    if is_hidden(name):
        return "would be written to a name that readers of Parquet skip, as all names with . or _ in front; rename it"
    return None


def folders_above(name: str) -> Iterator[str]:
    """The folders above a file: `a` and `a/b` of `a/b/c.parquet`."""
    return itertools.accumulate(name.split("/")[:-1], "{}/{}".format)


def _parts_of_file(file: dict[str, Any], max_rows_per_file: int | None) -> Iterator[dict[str, Any]]:
    """The rows of PLAN_SCHEMA."""
    rows, path = file["rows"], PurePosixPath(file["name"])
    least, most = _DEFAULT_ROWS
    limit = max_rows_per_file or min(most, max(least, _ceil_divide(rows, 4)))
    limit = min(limit, max(_MIN_PART_ROWS, _MAX_PART_BYTES * rows // max(1, file["bytes"])))
    group = file["longest_group"]
    # Whole row groups, which mostly are all of one size; or slices of one, of nearly equal size.
    size = limit - limit % group if 0 < group <= limit else _ceil_divide(rows, max(1, _ceil_divide(rows, limit)))
    bounds = [*range(0, rows, size), rows] if rows else [0, 0]  # a file without rows has one empty part
    count = len(bounds) - 1
    of_file = {name: file[name] for name in ("name", "size", "modified", "footer_sha256", "longest_group")}
    for index, (start, end) in enumerate(itertools.pairwise(bounds)):
        output = file["name"] if count == 1 else str(path.with_name(f"{path.stem}-{index:05d}-of-{count:05d}{path.suffix}"))
        part = of_file | {"output": output, "first_row": start, "rows": end - start}
        yield part | {"digest": digest(part)}


Task = dict[str, int]
"""Parts `first`..`first + count - 1` of a table of parts."""

CPU_TASK_ROWS: Final = 32_768
GPU_TASK_ROWS: Final = 262_144
"""Rows of a task, some seconds of work: a task costs the driver 7 to 9 ms."""

_MIN_TASK_ROWS: Final = 1024

_TASKS_PER_WORKER: Final = 4
"""With several tasks per worker, none has to finish a long one alone at the end."""

WORKER_ROWS: Final = 4_096
"""Rows that a CPU core scores while a worker starts: with fewer rows a worker, fewer workers end sooner."""

_MAX_TASKS: Final = 16_384
"""With more rows the tasks get longer: Ray Data takes 0.5 ms a task before the first starts, and says nothing meanwhile."""

_TASKS_PER_GROUP: Final = 16
"""Each task reads a row group from its start: with more tasks they would skip more rows than they score, with fewer, workers
would idle."""

PART_ROWS: Final = 32
"""Rows that take as long as to open and to write the files of a part."""


def make_tasks(parts: pa.Table, max_rows: int, workers: int) -> list[Task]:
    """Group consecutive parts (PART_SCHEMA) so that each worker gets several tasks: each part is in one task, in their order.

    A task takes no more parts from `max_rows` rows on, in long row groups later.
    """
    wanted = _TASKS_PER_WORKER * workers
    rows = pc.add(parts["rows"], PART_ROWS)
    total = pc.sum(rows).as_py() or 0
    max_rows = max(_ceil_divide(total, _MAX_TASKS), min(max_rows, max(_MIN_TASK_ROWS, _ceil_divide(total, wanted))))
    starts: list[int] = []  # the first part of each task
    in_task = 0
    for index, (count, longest_group) in enumerate(zip(rows.to_pylist(), parts["longest_group"].to_pylist(), strict=True)):
        of_group = longest_group / min(_TASKS_PER_GROUP, wanted) + PART_ROWS * (index - starts[-1] if starts else 0)
        if not starts or in_task >= max(max_rows, of_group):
            starts.append(index)
            in_task = 0
        in_task += count
    return [{"first": start, "count": end - start} for start, end in itertools.pairwise([*starts, parts.num_rows])]


def _ceil_divide(amount: int, count: int) -> int:
    return -(-amount // count)


KEY: Final = b"mnistsum_ray.score"
"""Key of the stamp in the Parquet metadata."""

STAMP_FORMAT: Final = 9
"""Version of the stamp, of the counts and of how files are split. An output of another version is
refused."""

COUNTS_KEY: Final = b"mnistsum_ray.counts"
"""Key of `counts.RowCounts`, which are for the report."""

STAMP_FIELDS: Final = (
    *PART_SCHEMA.names,
    "source",  # the input file in full: a path, or a URI without its query
    "rejected",  # how many of the rows are in the file of rejected rows
    "spec",  # `preflight.Plan.spec`: model and settings
    "max_rows_per_file",
)
"""A stamp: what one part was made from; in its file of predictions and in its file of rejected rows."""


def to_metadata(stamp: dict[str, Any], counts: str) -> dict[bytes, bytes]:
    """A stamp and the JSON of `counts.RowCounts` as entries of Parquet metadata."""
    return {KEY: json.dumps({"format": STAMP_FORMAT} | stamp).encode(), COUNTS_KEY: counts.encode()}


def from_metadata(metadata: Mapping[bytes, bytes] | None) -> dict[str, Any]:
    """The stamp in Parquet metadata.

    Raises:
        UnusableFileError: there is none, it is damaged, or another version of this program wrote it.
    """
    if not metadata or KEY not in metadata:
        raise UnusableFileError("is not a file of this program")
    try:
        stamp: dict[str, Any] = json.loads(metadata[KEY])
        if stamp["format"] == STAMP_FORMAT and COUNTS_KEY in metadata:
            return {name: stamp[name] for name in STAMP_FIELDS}
    except (KeyError, TypeError, ValueError) as error:
        raise UnusableFileError(f"cannot be read: {one_line(error)}") from None
    raise UnusableFileError("was written by another version of this program")


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
