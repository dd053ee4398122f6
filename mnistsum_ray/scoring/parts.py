"""Parts: the consecutive rows of an input file that become one output file.

The file name is the state. A part's name and rows follow from its input file and
`--max-rows-per-file` alone, it is put whole, and only if there is none: a kill, a rerun and a
second run at the same time change nothing. Its footer says what it holds, and counts it.
"""

import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from math import ceil
from pathlib import PurePosixPath
from typing import Final, NamedTuple

from mnistsum_ray.data.parquet import read_footer
from mnistsum_ray.errors import RequestError, UnusableFileError
from mnistsum_ray.reporting.console import Console, Progress
from mnistsum_ray.scoring.request import InputFile, ScoreRequest
from mnistsum_ray.storage.store import Entry, Location, in_threads

PREDICTIONS: Final = "predictions"
"""Folder of the parts in the output."""

PART_KEY: Final = b"mnistsum_ray.part"
"""Key in the footer of a part's Parquet file, where it says as JSON what it is: the `run`, the
`part`, `counts` of its rows, sums of their `metrics`, and its rejected rows by `reasons` with
`examples`."""

NOT_OURS: Final = "is not a file of this program; move it away, or choose another folder"
START_OVER: Final = "--overwrite deletes that output and scores everything again"

MIB: Final = 2**20

_TASK_BYTES: Final = 128 * MIB
"""Some seconds of a GPU, and a half-minute of a CPU core, which a kill costs. A task costs the
driver 7 to 9 ms."""


class Part(NamedTuple):
    """Consecutive rows of one input file, which become one output file."""

    output: str  # relative to the folder of predictions
    input: str  # relative to the input's root
    size: int  # of the input file, in bytes, when it was listed
    e_tag: str  # of the input file, when it was listed
    first_row: int
    rows: int


def split_into_parts(request: ScoreRequest) -> dict[str, Part]:
    """Return the parts of all files but rejected ones, by the names of their output.

    RequestError: two need one name.
    """
    parts: dict[str, Part] = {}
    for file in request.files:
        if file.error:
            continue
        for part in _parts_of(file, request):
            other = parts.setdefault(part.output, part)
            if other is not part:
                both = f"{other.input} and {part.input}"
                raise RequestError(f"--input: {both} need one name in the output; rename one")
    return parts


def _parts_of(file: InputFile, request: ScoreRequest) -> Iterator[Part]:
    """Yield the parts of a file, equally long but for the last; a file of no rows is one part."""
    rows = file.rows or 0
    least, most = request.rows_in(8 * MIB), request.rows_in(32 * MIB)
    part_rows = request.config.max_rows_per_file or min(most, max(least, ceil(rows / 4)))
    count = max(1, ceil(rows / part_rows))
    path = PurePosixPath(file.name)
    for index in range(count):
        number = f"-{index:05d}-of-{count:05d}" if count > 1 else ""
        output = str(path.with_name(path.stem + number + path.suffix))
        start, end = index * part_rows, min(rows, (index + 1) * part_rows)
        yield Part(output, file.name, file.entry.size, file.entry.e_tag, start, end - start)


def make_tasks(request: ScoreRequest, parts: Sequence[Part], workers: int) -> list[list[Part]]:
    """Group consecutive parts into tasks of Ray Data: several a worker, of some _TASK_BYTES.

    Or larger: parts that begin in one row group are one task, since a reader begins with the
    group's first row. A disk reads it again for idle workers, but from a bucket that is traffic.
    """
    total = sum(part.rows for part in parts)
    # Four tasks a worker, so that no long one runs alone at the end; but a core scores 4 MiB while
    # a worker starts, so a worker for less would not pay.
    balanced_rows = max(request.rows_in(4 * MIB), ceil(total / (4 * workers)))
    # Ray Data needs 0.5 ms a task before the first one starts: 16,384 tasks at most.
    task_rows = max(ceil(total / 16_384), min(balanced_rows, request.rows_in(_TASK_BYTES)))
    most_rows = max(task_rows, ceil(total / workers)) if request.root.is_local else total
    groups = {file.name: file.groups for file in request.files}
    tasks: list[list[Part]] = []
    group: tuple[str, int] | None = None
    rows = task_rows  # so that the first part begins a task
    for part in parts:
        before, group = group, (part.input, bisect_right(groups[part.input], part.first_row))
        if rows >= (most_rows if group == before else task_rows):
            tasks.append([])
            rows = 0
        tasks[-1].append(part)
        rows += part.rows
    return tasks


class StoredPart(NamedTuple):
    """A part in the output folder, as its footer describes it."""

    entry: Entry
    rows: int  # that the file has
    run: str  # the id of the run that has put it
    part: Part  # what it was made of
    rejected_rows: int
    footer: bytes  # all that stands under PART_KEY


def read_parts(
    output: Location, known: Mapping[str, StoredPart], console: Console
) -> dict[str, StoredPart]:
    """Return all parts in an output folder by name. Footers that are `known` are not read.

    RequestError: a file there is no part.
    """
    entries = (output / PREDICTIONS).visible_files()

    def read(name: str) -> StoredPart:
        entry = entries[name]
        if name in known and known[name].entry == entry:
            return known[name]
        with suppress(UnusableFileError, KeyError, TypeError, ValueError):
            metadata = read_footer(output / PREDICTIONS / name, entry).metadata
            footer = metadata.metadata[PART_KEY]
            says = json.loads(footer)
            part, counts = Part(**says["part"]), says["counts"]
            rejected_rows = sum(says["reasons"].values())
            if (counts["rows"], counts["rejected_rows"]) != (part.rows, rejected_rows):
                raise ValueError("counts")  # they would be added up
            if not {"metrics", "examples"} <= says.keys():
                raise KeyError("metrics")
            return StoredPart(entry, metadata.num_rows, says["run"], part, rejected_rows, footer)
        raise refusal(output, f"{PREDICTIONS}/{name} {NOT_OURS}")

    progress = Progress(console.progress, "output files read", len(entries))
    found = in_threads(output, read, list(entries), progress)
    return dict(zip(entries, found, strict=True))


@dataclass
class Run:
    """A run: the parts that its output needs, those that exist, and what is rejected."""

    request: ScoreRequest
    planned: dict[str, Part] = field(default_factory=dict)  # by the names of their output
    rejected_files: dict[str, str] = field(default_factory=dict)  # why they cannot be scored
    # The parts that exist, by the same names: planned ones that are whole; others of files of
    # the input, which have changed; and those of files that are not in the input now.
    done: dict[str, StoredPart] = field(default_factory=dict)
    stale: dict[str, StoredPart] = field(default_factory=dict)
    gone: dict[str, StoredPart] = field(default_factory=dict)
    resumed: frozenset[str] = frozenset()  # what was done when the run began
    in_work: dict[int, Sequence[Part]] = field(default_factory=dict)  # tasks that have begun
    rows_per_second: float = 0.0  # from the first answer of a worker to the last one

    @property
    def stored(self) -> dict[str, StoredPart]:
        """All parts that exist."""
        return {**self.done, **self.stale, **self.gone}

    def read(self, console: Console) -> None:
        """Read which parts exist, or raise RequestError if a file is no part."""
        found = read_parts(self.request.output, self.stored, console)
        inputs = {file.name for file in self.request.files}
        self.done, self.stale, self.gone = {}, {}, {}
        for name, stored in found.items():
            is_whole = stored.rows == stored.part.rows and stored.run == self.request.run_id
            if is_whole and stored.part == self.planned.get(name):
                self.done[name] = stored
            elif stored.part.input in inputs:
                self.stale[name] = stored
            else:
                self.gone[name] = stored


def refusal(output: Location, problem: str) -> RequestError:
    """Return the error for an output folder that cannot be used."""
    return RequestError(f"--output {output.display}: {problem}")
