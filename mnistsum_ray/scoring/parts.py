"""Parts: the consecutive rows of an input file that become one output file.

The file name is the state. A part's name and rows follow from its input file and
`--max-rows-per-file` alone, it is put whole, and only if there is none: a kill, a rerun and a
second run at the same time change nothing.
"""

import json
from collections.abc import Sequence
from math import ceil
from pathlib import PurePosixPath
from typing import Final, NamedTuple

from mnistsum_ray.storage.store import Entry, is_hidden

PREDICTIONS: Final = "predictions"
"""Folder of the parts in the output."""

STAMP_KEY: Final = b"mnistsum_ray.part"
COUNTS_KEY: Final = b"mnistsum_ray.counts"
"""Keys of a part's stamp, and of the counts of its rows, in the footer of its Parquet file."""

_LEAST_ROWS: Final = 8_192
_MOST_ROWS: Final = 32_768
"""Rows of a part by default: 32,768 rows are 10 s of a CPU core, which a kill costs."""

CPU_TASK_ROWS: Final = 32_768
GPU_TASK_ROWS: Final = 262_144
"""Rows of a task, some seconds of work: a task costs the driver 7 to 9 ms."""

_MIN_TASK_ROWS: Final = 4_096
"""A CPU core scores so many rows while a worker starts. There is at most one worker a task:
smaller tasks would start workers that do not pay."""

_TASKS_PER_WORKER: Final = 4
"""With several tasks per worker, none has to finish a long one alone at the end."""

_MAX_TASKS: Final = 16_384
"""Ray Data takes 0.5 ms a task before the first starts. Tasks of more rows get longer instead."""

_FILE_ROWS: Final = 32
"""Fixed cost of a part, which is to open and to write files, in rows of work."""


class InputFile(NamedTuple):
    """An input file as it was when the run began."""

    name: str
    """Relative to the input's root."""
    entry: Entry
    rows: int | None
    """None where its footer cannot be read."""
    recast: tuple[str, ...] = ()
    """Columns whose type changes in the output."""
    lacks: str | None = None
    """A column that it should have."""
    error: str | None = None
    """Why it cannot be scored."""


class Part(NamedTuple):
    """Consecutive rows of one input file, which become one output file."""

    output: str
    """The output file, relative to the folder of predictions."""
    name: str
    """The input file, relative to the input's root."""
    entry: Entry
    first_row: int
    rows: int

    def stamp(self, request: str) -> bytes:
        """For the output file's footer: the request's digest, the input and its first row."""
        stamp = {"request": request, "input": self.name, "e_tag": self.entry.e_tag}
        return json.dumps(stamp | {"first_row": self.first_row}).encode()


def split_into_parts(
    files: Sequence[InputFile], max_rows_per_file: int | None
) -> tuple[list[Part], dict[str, str]]:
    """The parts of all files that can be used; and of the other files the name and the reason."""
    parts: list[Part] = []
    failures: dict[str, str] = {}
    taken: dict[str, str] = {}  # input file by output file
    for file in files:
        of_file = _parts_of(file, max_rows_per_file)
        same = [part.output for part in of_file if part.output in taken]
        if file.error:
            failures[file.name] = file.error
        elif is_hidden(file.name):
            skipped = "readers of Parquet skip, as all names with . or _ in front"
            failures[file.name] = f"would be written to a name that {skipped}; rename it"
        elif same:
            needed = f"would need the name {same[0]} in the output"
            failures[file.name] = f"{needed}, as does {taken[same[0]]}; rename it"
        else:
            taken.update((part.output, file.name) for part in of_file)
            parts += of_file
    return parts, failures


def _parts_of(file: InputFile, max_rows_per_file: int | None) -> list[Part]:
    """The parts of a file, of one size but for the last: one of no rows where it has none."""
    rows = file.rows or 0
    size = max_rows_per_file or min(_MOST_ROWS, max(_LEAST_ROWS, ceil(rows / 4)))
    count = max(1, ceil(rows / size))
    path = PurePosixPath(file.name)
    parts = []
    for index in range(count):
        number = f"-{index:05d}-of-{count:05d}" if count > 1 else ""
        output = str(path.with_name(path.stem + number + path.suffix))
        first_row = index * size
        part_rows = min(size, rows - first_row)
        parts.append(Part(output, file.name, file.entry, first_row, part_rows))
    return parts


def make_tasks(parts: Sequence[Part], max_rows: int, workers: int) -> list[list[Part]]:
    """Group consecutive parts: each worker gets several tasks of about `max_rows` or fewer."""
    total = sum(part.rows + _FILE_ROWS for part in parts)
    for_workers = max(_MIN_TASK_ROWS, ceil(total / (_TASKS_PER_WORKER * workers)))
    for_driver = ceil(total / _MAX_TASKS)
    task_rows = max(for_driver, min(for_workers, max_rows))
    tasks: list[list[Part]] = []
    rows = task_rows  # so that the first part begins a task
    for part in parts:
        if rows >= task_rows:
            tasks.append([])
            rows = 0
        tasks[-1].append(part)
        rows += part.rows + _FILE_ROWS
    return tasks
