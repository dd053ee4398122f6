"""The output folder: the request that it holds, the parts that are done, and their counts.

OUTPUT/run.json                      the request, created first, and only if there is none
OUTPUT/predictions/                  the parts, each whole under its name, and nothing else
OUTPUT/files.parquet, report.html    about the whole run, written after all parts
OUTPUT/manifest.json                 written last: while it exists, the output is finished
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mnistsum_ray import __version__
from mnistsum_ray.config import ScoreConfig
from mnistsum_ray.data.images import DIGITS, ReasonCounts, decode_numbers, one_chunk
from mnistsum_ray.data.parquet import read_footer
from mnistsum_ray.errors import ConflictError, MissingFileError, RequestError, UnusableFileError
from mnistsum_ray.model.heads import HEADS
from mnistsum_ray.reporting.console import Console, Progress
from mnistsum_ray.reporting.report import REPORT
from mnistsum_ray.reporting.results import MANIFEST
from mnistsum_ray.scoring.parts import COUNTS_KEY, PREDICTIONS, STAMP_KEY, Part
from mnistsum_ray.scoring.request import Request
from mnistsum_ray.storage.store import Entry, Location, in_threads, is_hidden

RUN_FILE: Final = "run.json"
FILES_TABLE: Final = "files.parquet"

RUN_FORMAT: Final = "mnistsum_ray.score/3"
"""Format of run.json and the manifest, of the stamps, and of how files are cut into parts."""

_START_OVER: Final = "--overwrite deletes that output and scores everything again"
_NOT_OURS: Final = "is not a file of this program"
_AWAY: Final = "move it away, or choose another folder"


def read_run(output: Location) -> dict[str, Any] | None:
    """The request that an output folder holds, by flag, and its format; None where no run began.

    RequestError: another program wrote it.
    """
    try:
        run = (output / RUN_FILE).read_json()
        return {"format": run["format"]} | dict(run["request"])
    except MissingFileError:
        return None
    except (ValueError, TypeError, KeyError):
        raise _refusal(output, f"{RUN_FILE} {_NOT_OURS}; {_AWAY}") from None


def begin(request: Request) -> None:
    """Create run.json, or check that the one that is there holds this request.

    RequestError: another request was begun here, or files of other programs are. Nothing is changed
    then.
    """
    output = request.output
    if read_run(output) is None:
        others = list_files(output)
        # Asked again: a second run may have begun meanwhile, and the files are its own.
        if others and read_run(output) is None:
            raise _refusal(output, f"{next(iter(others))} {_NOT_OURS}; {_AWAY}")
        run = {"format": RUN_FORMAT, "version": __version__, "request": request.identity}
        with suppress(ConflictError):  # a second run began at the same time
            (output / RUN_FILE).create(run)
    begun = read_run(output) or {}
    for flag, value in ({"format": RUN_FORMAT} | request.identity).items():
        if begun.get(flag) != value:
            differs = f"was begun with {flag} {begun.get(flag)}, and this run has {value}"
            raise _refusal(output, f"{differs}; give the same again, or {_START_OVER}")


def list_files(folder: Location) -> dict[str, Entry]:
    """The files below a folder by their names there; hidden ones do not count."""
    found = {file.path.removeprefix(folder.path).lstrip("/"): file for file in folder.files()}
    return {name: file for name, file in found.items() if not is_hidden(name)}


def delete_output(output: Location, console: Console) -> None:
    """Delete an earlier output, run.json last: until then all files are known to be ours."""
    if read_run(output) is None:
        return
    names = [name for name, _, _ in _read_part_footers(output, console)]
    (output / MANIFEST).delete()
    output.delete_files([FILES_TABLE, REPORT, *(f"{PREDICTIONS}/{name}" for name in names)])
    (output / RUN_FILE).delete()


@dataclass
class RowCounts:
    """Counts over rows."""

    rows: int = 0
    bad: ReasonCounts = field(default_factory=ReasonCounts)
    """Rejected rows by reason."""
    rejected: Counter[str] = field(default_factory=Counter)
    """Rejected rows by input file."""
    consistent: int = 0
    """Scored rows whose predicted sum is the predicted digit + number."""
    labelled: int = 0
    """Scored rows whose label is known."""
    right: Counter[str] = field(default_factory=Counter)
    """Labelled rows that a head predicts right, by its name."""

    def add(self, part: Part, counts: Mapping[str, Any]) -> None:
        """Add what `count_part` has counted, as JSON gives it back, in place."""
        examples = [(file, row, reason) for file, row, reason in counts["examples"]]
        bad = ReasonCounts(Counter(counts["reasons"]), examples)
        self.rows += part.rows
        self.bad.add_reasons(bad)
        if bad.total:
            self.rejected[part.name] += bad.total
        self.consistent += counts["consistent"]
        self.labelled += counts["labelled"]
        self.right.update(counts["right"])


def count_part(output: pa.Table, part: Part, config: ScoreConfig) -> dict[str, Any]:
    """Counts of a part's rows, as its footer has them; `output` has the columns of its file."""
    is_bad = output["reason"].is_valid()
    bad_rows = part.first_row + np.flatnonzero(is_bad.to_numpy())
    reasons = output["reason"].drop_null().to_pylist()
    bad = [(part.name, row, reason) for row, reason in zip(bad_rows.tolist(), reasons, strict=True)]
    labelled = 0
    right = {}
    if config.label_column:
        predicted = [f"pred_{head.name}" for head in HEADS]
        columns = {config.number_column, config.label_column, *predicted}
        good = output.select(sorted(columns)).filter(pc.invert(is_bad))
        numbers, _ = decode_numbers(one_chunk(good[config.number_column]))
        labels, unknown = decode_numbers(one_chunk(good[config.label_column]), DIGITS)
        labelled = len(labels) - len(unknown)
        for head in HEADS:
            is_right = good[f"pred_{head.name}"].to_numpy() == head.target(labels, numbers)
            is_right[list(unknown)] = False
            right[head.name] = int(is_right.sum())
    bad_counts = ReasonCounts.of(bad)
    return {
        "reasons": bad_counts.reasons,
        "examples": bad_counts.examples,
        "consistent": pc.sum(output["consistent"]).as_py() or 0,
        "labelled": labelled,
        "right": right,
    }


def read_parts(
    request: Request, planned: Mapping[str, Part], console: Console
) -> tuple[set[str], RowCounts, int]:
    """Read the footers of all parts in the output folder, and compare them with the plan.

    Returns:
        Names of the planned parts that are there, whole and of this request; the counts of their
        rows; and the number of parts whose input file is not there now.

    RequestError: a part is of another request, its input has changed since or has another name now,
    or a file is of another program.
    """
    input_names = {file.name for file in request.files}
    done: set[str] = set()
    counts = RowCounts()
    gone = 0
    gone_names: dict[str, str] = {}  # of input files, by e_tag
    for name, footer, rows in _read_part_footers(request.output, console):
        part = planned.get(name)
        stamp = json.loads(footer[STAMP_KEY])
        input_name = stamp["input"]
        if part and (footer[STAMP_KEY], rows) == (part.stamp(request.digest), part.rows):
            done.add(name)
            counts.add(part, json.loads(footer[COUNTS_KEY]))
        elif input_name in input_names:
            problem = f"has rows of {input_name}, which has changed since, or of another request"
            raise _refusal(request.output, f"{PREDICTIONS}/{name} {problem}; {_START_OVER}")
        else:
            gone += 1
            if rows:  # two files without rows have the same bytes, and so the same ETag
                gone_names[stamp["e_tag"]] = input_name
    _check_not_renamed(request, {planned[name].name for name in done}, gone_names)
    return done, counts, gone


def _check_not_renamed(request: Request, scored: set[str], gone_names: dict[str, str]) -> None:
    """Check that no input file is one that was scored by a name which is gone, by its e_tag."""
    for file in request.files:
        name_then = gone_names.get(file.entry.e_tag)
        if name_then and file.name not in scored:
            was = f"holds the rows of {file.name}, which was {name_then} then"
            twice = "and would have them twice; give the same --input as then"
            raise _refusal(request.output, f"{was}, {twice}, or {_START_OVER}")


def _read_part_footers(
    output: Location, console: Console
) -> Iterator[tuple[str, Mapping[bytes, bytes], int]]:
    """Yield the name of each part, the entries of its footer, and the rows in its file.

    RequestError: it is no part.
    """
    parts = list_files(output / PREDICTIONS)

    def read(name: str) -> tuple[str, Mapping[bytes, bytes], int]:
        with suppress(UnusableFileError):
            metadata = read_footer(output / PREDICTIONS / name, parts[name]).metadata
            entries = metadata.metadata or {}
            if STAMP_KEY in entries:
                return name, entries, metadata.num_rows
        raise _refusal(output, f"{PREDICTIONS}/{name} {_NOT_OURS}; {_AWAY}")

    progress = Progress(console.progress, "output files read", len(parts))
    return in_threads(output, read, list(parts), progress)


def _refusal(output: Location, problem: str) -> RequestError:
    return RequestError(f"--output {output.display}: {problem}")
