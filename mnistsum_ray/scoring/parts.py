"""Parts: the consecutive rows of an input file that become one output file.

The file name is the state. A part's name and rows follow from its input file and
`--max-rows-per-file` alone, it is put whole, and only if there is none: a kill, a rerun and a
second run at the same time change nothing. Its footer says what it holds, and counts it.
"""

import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from math import ceil
from pathlib import PurePosixPath
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np

from mnistsum_ray.data.columns import ReasonCounts
from mnistsum_ray.data.parquet import read_footer
from mnistsum_ray.errors import RequestError, UnusableFileError, shortened
from mnistsum_ray.model.calls import calling
from mnistsum_ray.reporting.console import Console, Progress
from mnistsum_ray.scoring.request import InputFile, ScoreRequest
from mnistsum_ray.storage.store import Entry, Location, in_threads

PREDICTIONS: Final = "predictions"
"""Folder of the parts in the output."""

PART_KEY: Final = b"mnistsum_ray.part"
"""Key in the footer of a part's Parquet file, where it says as JSON what it is: the `run`, the
`part`, `counts` of its rows, sums of their `metrics`, and its rejected rows by `reasons` with
`examples`."""

Footers: TypeAlias = dict[Entry, tuple[int, bytes]]
"""Rows of parts, and what stands under PART_KEY: a part that is replaced has another ETag."""

NOT_OURS: Final = "is not a file of this program; move it away, or choose another folder"
START_OVER: Final = "--overwrite deletes that output and scores everything again"

MIB: Final = 2**20

_PART_COST_BYTES: Final = MIB // 32
"""Fixed cost of a part, which is to open and to write files, in bytes of rows that take as long."""


class Part(NamedTuple):
    """Consecutive rows of one input file, which become one output file."""

    output: str  # relative to the folder of predictions
    input: str  # relative to the input's root
    size: int  # of the input file, in bytes, when it was listed
    e_tag: str  # of the input file, when it was listed
    first_row: int
    rows: int


def split_into_parts(request: ScoreRequest) -> dict[str, Part]:
    """The parts of usable files by the names of their output. RequestError: two need one name."""
    parts: dict[str, Part] = {}
    for file in request.files:
        if file.error is None:
            for part in _parts_of(file, request):
                if part.output in parts:
                    both = f"{parts[part.output].input} and {part.input}"
                    raise RequestError(f"--input: {both} need one name in the output; rename one")
                parts[part.output] = part
    for output, part in parts.items():
        for folder in map(str, PurePosixPath(output).parents):
            if folder in parts:
                problem = f"{parts[folder].input} needs the name of a folder of {part.input}"
                raise RequestError(f"--input: {problem} in the output; rename one")
    return parts


def _parts_of(file: InputFile, request: ScoreRequest) -> Iterator[Part]:
    """The parts of a file, equally long but for the last; a file of no rows is one part."""
    rows = file.rows or 0
    # A kill costs the rows of a part: at most 10 s of a CPU core, if the network is small.
    least, most = request.rows_in(8 * MIB), request.rows_in(32 * MIB)
    part_rows = request.config.max_rows_per_file or min(most, max(least, ceil(rows / 4)))
    count = max(1, ceil(rows / part_rows))
    path = PurePosixPath(file.name)
    for index in range(count):
        number = f"-{index:05d}-of-{count:05d}" if count > 1 else ""
        output = str(path.with_name(path.stem + number + path.suffix))
        start, end = index * part_rows, min(rows, (index + 1) * part_rows)
        yield Part(output, file.name, file.entry.size, file.entry.e_tag, start, end - start)


def make_tasks(
    request: ScoreRequest, parts: Sequence[Part], usual_bytes: int, workers: int
) -> list[list[Part]]:
    """Group consecutive parts into tasks of Ray Data: several a worker, of this size or less.

    Or larger: parts that begin in one row group are one task, since a reader begins with the
    group's first row. A disk reads it again for idle workers, but from a bucket that is traffic.
    """
    part_cost = request.rows_in(_PART_COST_BYTES)
    total = sum(part.rows + part_cost for part in parts)
    # Four tasks a worker, so that no long one runs alone at the end; but a core scores 4 MiB while
    # a worker starts, so a worker for less would not pay.
    balanced_rows = max(request.rows_in(4 * MIB), ceil(total / (4 * workers)))
    # Ray Data needs 0.5 ms a task before the first one starts: 16,384 tasks at most.
    task_rows = max(ceil(total / 16_384), min(balanced_rows, request.rows_in(usual_bytes)))
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
        rows += part.rows + part_cost
    return tasks


def as_numbers(counted: Mapping[str, Any]) -> dict[str, Any]:
    """What a task has counted or summed, as numbers and lists of them, which can be added up.

    ValueError: it is something else, or infinite or NaN.
    """
    numbers = {}
    for name, count in counted.items():
        values = np.asarray(count)
        if values.dtype.kind not in "biuf" or not np.isfinite(values).all():
            raise ValueError(f"{name} is {shortened(str(count))}, and must be of finite numbers")
        numbers[name] = (values + 0).tolist()  # True + True is True, and 2 is meant
    return numbers


@dataclass
class FoundParts:
    """What the output folder holds of a plan, by the footers of its parts."""

    done: set[str] = field(default_factory=set)  # planned parts that are whole and of this run
    # Sums of the counts of `done`, numbers and arrays, and of the metrics (actor.count_part).
    counts: dict[str, Any] = field(default_factory=dict)
    metrics: Counter[str] = field(default_factory=Counter)
    rejected: ReasonCounts = field(default_factory=ReasonCounts)  # the rejected rows of `done`
    stale: dict[str, str] = field(default_factory=dict)  # by part, its file that has changed
    gone: dict[str, str] = field(default_factory=dict)  # by part, its file that is not in --input
    rows_by_file: Counter[str] = field(default_factory=Counter)  # of `done` and `gone`
    rejected_by_file: Counter[str] = field(default_factory=Counter)

    def add_counts(self, counts: Mapping[str, Any]) -> None:
        """Add the counts of a part. ValueError: a task has counted lists of different lengths."""
        for name, count in counts.items():
            values = np.array(count)
            total = self.counts.setdefault(name, np.zeros_like(values))
            if values.shape != total.shape:  # NumPy would repeat a list of one number
                raise ValueError(f"{name} has different lengths; give np.bincount a minlength")
            self.counts[name] = total + values


def read_parts(
    request: ScoreRequest, planned: Mapping[str, Part], known: Footers, console: Console
) -> FoundParts:
    """Read the footers of all parts in the output folder, and compare them with the plan.

    RequestError: a part is of another run, or has the name that another file needs; or a file is of
    another program.
    """
    inputs = {file.name for file in request.files}
    found = FoundParts()
    for name, rows, footer in read_footers(request.output, known, console):
        if footer.get("run") != request.run_id:
            problem = f"{PREDICTIONS}/{name} is of another run than run.json; {START_OVER}"
            raise refusal(request.output, problem)
        part = Part(**footer["part"])
        if part == planned.get(name) and rows == part.rows:
            found.done.add(name)
            with calling(request.task, "count"):
                found.add_counts(footer["counts"])
            found.metrics.update(footer["metrics"])
            examples = [tuple(example) for example in footer["examples"]]
            found.rejected.add(footer["reasons"], examples)
        elif part.input in inputs:
            found.stale[name] = part.input
        elif name in planned:
            both = f"rows of {part.input}, which is gone, and {planned[name].input} needs its name"
            problem = f"{PREDICTIONS}/{name} has {both}; rename it, or {START_OVER}"
            raise refusal(request.output, problem)
        else:
            found.gone[name] = part.input
        if name not in found.stale:
            found.rows_by_file[part.input] += rows
            found.rejected_by_file[part.input] += footer["counts"]["rejected_rows"]
    return found


def read_footers(
    output: Location, known: Footers, console: Console
) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Names of all parts in an output folder, their rows, and what stands under PART_KEY.

    Only footers that are not `known` are read, and added to it. RequestError: a file is no part.
    """
    parts = (output / PREDICTIONS).visible_files()

    def read(name: str) -> tuple[str, int, dict[str, Any]]:
        with suppress(UnusableFileError, KeyError, TypeError, ValueError):
            if parts[name] not in known:
                metadata = read_footer(output / PREDICTIONS / name, parts[name]).metadata
                known[parts[name]] = metadata.num_rows, metadata.metadata[PART_KEY]
            rows, footer = known[parts[name]]
            return name, rows, dict(json.loads(footer))
        raise refusal(output, f"{PREDICTIONS}/{name} {NOT_OURS}")

    progress = Progress(console.progress, "output files read", len(parts))
    return in_threads(output, read, list(parts), progress)


def refusal(output: Location, problem: str) -> RequestError:
    """The error for an output folder that cannot be used."""
    return RequestError(f"--output {output.display}: {problem}")
