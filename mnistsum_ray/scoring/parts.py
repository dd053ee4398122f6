"""Parts: the consecutive rows of an input file that become one output file.

The file name is the state. A part's name and rows follow from its input file and
`--max-rows-per-file` alone, it is put whole, and only if there is none: a kill, a rerun and a
second run at the same time change nothing. Its footer says what it holds, and counts it.
"""

import json
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from math import ceil
from pathlib import PurePosixPath
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mnistsum_ray.config import ScoreConfig
from mnistsum_ray.data.images import DIGITS, ReasonCounts, decode_numbers, one_chunk
from mnistsum_ray.data.parquet import read_footer
from mnistsum_ray.errors import RequestError, UnusableFileError
from mnistsum_ray.model.heads import HEADS
from mnistsum_ray.reporting.console import Console, Progress
from mnistsum_ray.scoring.request import InputFile, ScoreRequest
from mnistsum_ray.storage.store import Entry, Location, in_threads, is_hidden

PREDICTIONS: Final = "predictions"
"""Folder of the parts in the output."""

NOT_OURS: Final = "is not a file of this program; move it away, or choose another folder"
START_OVER: Final = "--overwrite deletes that output and scores everything again"

_STAMP_KEY: Final = b"mnistsum_ray.part"
_COUNTS_KEY: Final = b"mnistsum_ray.counts"
"""Keys of a part's stamp, and of the counts of its rows, in the footer of its Parquet file."""

_LEAST_ROWS: Final = 8_192
_MOST_ROWS: Final = 32_768
"""Rows of a part by default: 32,768 rows are 10 s of a CPU core, which a kill costs."""

_FILE_ROWS: Final = 32
"""Fixed cost of a part, which is to open and to write files, in rows of work."""


class Part(NamedTuple):
    """Consecutive rows of one input file, which become one output file."""

    output: str
    """The output file, relative to the folder of predictions."""
    input: str
    """The input file, relative to the input's root; then its bytes and ETag when it was listed."""
    size: int
    e_tag: str
    first_row: int
    rows: int

    def stamp(self, run_id: str) -> dict[str, Any]:
        """For the output file's footer: the run, the input file, and the part's first row there."""
        rows = {"input": self.input, "e_tag": self.e_tag, "first_row": self.first_row}
        return {"run": run_id} | rows

    def entries(self, run_id: str, counts: Mapping[str, Any]) -> dict[bytes, str]:
        """For the output file's footer: the stamp, and what `count_part` has counted."""
        return {_STAMP_KEY: json.dumps(self.stamp(run_id)), _COUNTS_KEY: json.dumps(counts)}


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
        part = Part(
            output=str(path.with_name(path.stem + number + path.suffix)),
            input=file.name,
            size=file.entry.size,
            e_tag=file.entry.e_tag,
            first_row=index * size,
            rows=min(size, rows - index * size),
        )
        parts.append(part)
    return parts


def make_tasks(parts: Sequence[Part], max_rows: int, workers: int) -> list[list[Part]]:
    """Group consecutive parts: each worker gets several tasks of about `max_rows` or fewer."""
    total = sum(part.rows + _FILE_ROWS for part in parts)
    # Of several tasks per worker, none is a long one that is finished alone at the end. But a core
    # scores 4,096 rows while a worker starts: a worker for fewer would not pay.
    for_workers = max(4_096, ceil(total / (4 * workers)))
    # Ray Data takes 0.5 ms a task before the first starts: beyond 16,384 tasks they get longer.
    task_rows = max(ceil(total / 16_384), min(for_workers, max_rows))
    tasks: list[list[Part]] = []
    rows = task_rows  # so that the first part begins a task
    for part in parts:
        if rows >= task_rows:
            tasks.append([])
            rows = 0
        tasks[-1].append(part)
        rows += part.rows + _FILE_ROWS
    return tasks


def to_row(task: int, parts: Sequence[Part]) -> dict[str, Any]:
    """A task as a row of a Ray Dataset: its number, and a list for each field of its parts."""
    row: dict[str, Any] = {"task": task}
    for name in Part._fields:
        row[name] = [getattr(part, name) for part in parts]
    return row


def from_row(row: Mapping[str, Any]) -> list[Part]:
    """The parts of a task that `to_row` has made a row of."""
    columns = [row[name] for name in Part._fields]
    return [Part(*values) for values in zip(*columns, strict=True)]


def count_part(output: pa.Table, part: Part, config: ScoreConfig) -> dict[str, Any]:
    """Counts of a part's rows for its footer, as JSON; `output` has the columns of its file."""
    bad = []
    for row, reason in enumerate(output["reason"].to_pylist(), part.first_row):
        if reason is not None:
            bad.append((part.input, row, reason))
    totals = {"rows": len(output), "consistent": pc.sum(output["consistent"]).as_py() or 0}
    if config.label_column:
        totals |= _count_right(output, config.number_column, config.label_column)
    by_reason = ReasonCounts()
    by_reason.add(Counter(reason for _, _, reason in bad), bad)
    return {"totals": totals, "reasons": by_reason.reasons, "examples": by_reason.examples}


def _count_right(output: pa.Table, number_column: str, label_column: str) -> dict[str, int]:
    """Scored rows whose label is known, and those among them that each head predicts right."""
    predicted = [f"pred_{head.name}" for head in HEADS]
    # Arrow cannot filter columns of all types that a user may have.
    read = output.select(sorted({number_column, label_column, *predicted}))
    scored = read.filter(output["reason"].is_null())
    numbers, _ = decode_numbers(one_chunk(scored[number_column]))
    labels, unknown = decode_numbers(one_chunk(scored[label_column]), DIGITS)
    is_known = np.ones(len(labels), bool)
    is_known[list(unknown)] = False
    counts = {"labelled": int(is_known.sum())}
    for head in HEADS:
        is_right = scored[f"pred_{head.name}"].to_numpy() == head.target(labels, numbers)
        counts[f"{head.name}_right"] = int((is_right & is_known).sum())
    return counts


@dataclass
class PartsThere:
    """What the output folder holds of a plan, by the footers of its parts."""

    done: set[str] = field(default_factory=set)
    """Names of the planned parts that are there, whole and of this run."""
    totals: Counter[str] = field(default_factory=Counter)
    """Over their rows: `rows`, `consistent`, and with labels `labelled` and `<head>_right`."""
    bad: ReasonCounts = field(default_factory=ReasonCounts)
    """Their rejected rows by reason."""
    useless: list[str] = field(default_factory=list)
    """Names of planned parts of files that turned out to be unusable."""
    stale: dict[str, str] = field(default_factory=dict)
    """Parts that are not planned, though their input file is there: it has changed since. By name,
    the input file."""
    gone: dict[str, str] = field(default_factory=dict)
    """Parts of input files that are not there now. By name, the input file."""
    rows: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    """Rows, and rejected ones, by input file, also of those that are gone."""


def read_parts(
    request: ScoreRequest,
    planned: Mapping[str, Part],
    console: Console,
    unusable: Container[str] = (),
) -> PartsThere:
    """Read the footers of all parts in the output folder, and compare them with the plan.

    RequestError: a part is of another run, or a file is of another program.
    """
    inputs = {file.name for file in request.files}
    there = PartsThere()
    for name, rows, stamp, counts in read_footers(request.output, console):
        if stamp["run"] != request.run_id:
            problem = f"{PREDICTIONS}/{name} is of another run than run.json"
            raise refusal(request.output, f"{problem}; {START_OVER}")
        file = stamp["input"]
        part = planned.get(name)
        is_planned = part and (stamp, rows) == (part.stamp(request.run_id), part.rows)
        if is_planned and file in unusable:
            there.useless.append(name)
            continue
        if is_planned:
            there.done.add(name)
            there.totals.update(counts["totals"])
            examples = [(file, row, reason) for file, row, reason in counts["examples"]]
            there.bad.add(counts["reasons"], examples)
        elif file in inputs:
            there.stale[name] = file
            continue
        else:
            there.gone[name] = file
        there.rows[file] += rows
        there.rejected[file] += sum(counts["reasons"].values())
    return there


Footer = tuple[str, int, dict[str, Any], dict[str, Any]]
"""Of a part: its name, its rows, its stamp and their counts."""


def read_footers(output: Location, console: Console) -> Iterator[Footer]:
    """Read the footers of all parts in an output folder. RequestError: a file is no part."""
    parts = list_files(output / PREDICTIONS)

    def read(name: str) -> Footer:
        with suppress(UnusableFileError, KeyError, TypeError, ValueError):
            metadata = read_footer(output / PREDICTIONS / name, parts[name]).metadata
            entries = metadata.metadata or {}
            stamp, counts = json.loads(entries[_STAMP_KEY]), json.loads(entries[_COUNTS_KEY])
            return name, metadata.num_rows, {"run": None} | stamp, counts
        raise refusal(output, f"{PREDICTIONS}/{name} {NOT_OURS}")

    progress = Progress(console.progress, "output files read", len(parts))
    return in_threads(output, read, list(parts), progress)


def list_files(folder: Location) -> dict[str, Entry]:
    """The files below a folder by their names there; hidden ones do not count."""
    found = {file.path.removeprefix(folder.path).lstrip("/"): file for file in folder.files()}
    return {name: file for name, file in found.items() if not is_hidden(name)}


def refusal(output: Location, problem: str) -> RequestError:
    """The error for an output folder that cannot be used."""
    return RequestError(f"--output {output.display}: {problem}")
