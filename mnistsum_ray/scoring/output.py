"""The output folder: what is in it, what earlier runs have committed there, and whether all rows are in it exactly once.

OUTPUT/predictions/, OUTPUT/rejected/      files of parts, complete under their names; data alone, so that every reader of
                                           Parquet can take the folder
OUTPUT/files.parquet, report.html, *.png, *.svg   about the whole run, written after all predictions
OUTPUT/manifest.json                       written last: while it exists, the output is finished
OUTPUT/_unpublished/                       the same, of a run with --overwrite or --strict that has not been published
OUTPUT/_lock                               names the run that writes here
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from mnistsum_ray.cluster.map_files import map_files
from mnistsum_ray.data.inputs import FILE_SCHEMA
from mnistsum_ray.data.parquet import read_table
from mnistsum_ray.errors import MissingFileError, RequestError, RowCountError, RunError, UnusableFileError
from mnistsum_ray.reporting.console import Console, Progress
from mnistsum_ray.reporting.report import svg_name
from mnistsum_ray.scoring.parts import PART_SCHEMA, PREDICTIONS, REJECTED, read_stamps
from mnistsum_ray.scoring.preflight import STAGING, Plan, Request
from mnistsum_ray.storage.folder import OutputFolder
from mnistsum_ray.storage.location import Location, is_hidden, is_partial

FILES_TABLE: Final = "files.parquet"
MANIFEST: Final = "manifest.json"
FORMAT: Final = "mnistsum_ray.score/1"
"""`format` of the manifest."""
REPORT: Final = "report.html"

PICTURES: Final = {
    "probabilities.png": "Rows by predicted probability",
    "rejects.png": "Rejected rows by reason",
    "reliability.png": "Accuracy by predicted probability",
    "confusion.png": "Digits: confusion matrix",
}
"""Titles of the pictures by their file names."""

SUMMARIES: Final = (FILES_TABLE, *PICTURES, *map(svg_name, PICTURES), REPORT)
"""Files about the whole run. They are written after all predictions and before the manifest."""

FILES_SCHEMA: Final = pa.schema(
    {
        "file": pa.string(),
        "rows": pa.int64(),  # null if the footer cannot be read
        "scored": pa.int64(),
        "rejected": pa.int64(),
        "status": pa.string(),  # `scored` or `failed`
        "reason": pa.string(),  # why the file failed
    }
)
"""`files.parquet`: one row per input file."""

_FOREIGN: Final = "is not a file of this program"

_START_OVER: Final = "--overwrite scores everything again"


@dataclass(frozen=True)
class OutputFiles:
    """The files in an output folder or a staging folder, and their stamps."""

    folder: Location
    stamps: pa.Table
    """The files in `predictions/`: `parts.OUTPUT_SCHEMA` without errors, and `rejected_in_file`, the rows of the file of the same
    name in `rejected/`; null if that file is missing."""
    rejected: frozenset[str]
    """Names of files in `rejected/`, relative to it."""
    foreign: dict[str, str]
    """Files that are not whole files of this version of the program: name and what is wrong. Hidden files and those of the run do
    not count."""
    partial: tuple[str, ...]
    """Names of files whose writer was killed."""

    @classmethod
    def read(cls, folder: Location, console: Console) -> "OutputFiles":
        """List a folder and read all stamps in it. A folder that does not exist is empty."""
        listed, foreign, partial, summaries = [], {}, [], []
        for file in folder.files():
            name = file.path.removeprefix(folder.path).lstrip("/")
            top, _, below = name.partition("/")
            if is_partial(name.rpartition("/")[2]) and top != STAGING:
                partial.append(name)
            elif is_hidden(name):
                continue
            elif name in (*SUMMARIES, MANIFEST):
                summaries.append(name)
            elif top in (PREDICTIONS, REJECTED) and below:
                listed.append({"name": name, "size": file.size, "modified": file.modified})
            else:
                foreign[name] = _FOREIGN
        if summaries and not listed and folder.path.rpartition("/")[2] != STAGING and not _is_finished(folder):
            foreign |= dict.fromkeys(summaries, _FOREIGN)  # other programs use these names too
        files = pa.Table.from_pylist(listed, FILE_SCHEMA)
        found = map_files(read_stamps, folder, files, Progress(console.progress, "output files read", len(listed)))
        for row in found.filter(pc.is_valid(found["error"])).to_pylist():
            foreign[f"{row['folder']}/{row['output']}"] = row["error"]
        found = found.filter(pc.is_null(found["error"]))
        stamps, rejected = (found.filter(pc.equal(found["folder"], name)) for name in (PREDICTIONS, REJECTED))
        there = rejected["rows_in_file"].take(pc.index_in(stamps["output"], rejected["output"]))
        none = pc.if_else(pc.equal(stamps["rejected"], 0), 0, None)
        stamps = stamps.append_column("rejected_in_file", pc.coalesce(there, none))
        return cls(folder, stamps, frozenset(rejected["output"].to_pylist()), foreign, tuple(partial))

    def check(self, *, staged: bool) -> None:
        """Check that all files are whole and of this program.

        In a staging folder predictions may lack their rejected rows: a killed run may have published those already.

        Raises:
            RequestError: names the first other file.
        """
        lost = self.stamps["output"].filter(pc.is_null(self.stamps["rejected_in_file"])).to_pylist()
        broken = {} if staged else {f"{PREDICTIONS}/{name}": "has lost its rejected rows" for name in lost}
        for name, error in (self.foreign | broken).items():
            raise RequestError(f"--output {self.folder.display}: {name} {error}; move it away, or choose another folder")

    def clear_unfinished(self, folder: OutputFolder) -> None:
        """Delete in the folder, after `check`, what a killed run left: partial files, and rejected rows without predictions."""
        without_predictions = sorted(self.rejected - {*self.stamps["output"].to_pylist()})
        for name in (*self.partial, *(f"{REJECTED}/{name}" for name in without_predictions)):
            folder.delete(name)


def _is_finished(folder: Location) -> bool:
    """Whether the manifest of a run of this program is there."""
    try:
        return bool((folder / MANIFEST).read_json()["format"] == FORMAT)
    except (MissingFileError, ValueError, TypeError, KeyError):
        return False


def delete_parts(folder: OutputFolder, names: Iterable[str]) -> None:
    """Delete the files of parts. The predictions go first, because a part is done when its predictions exist."""
    for name in names:
        folder.delete(f"{PREDICTIONS}/{name}")
        folder.delete(f"{REJECTED}/{name}")


def unpublish(output: OutputFolder) -> None:
    """Delete the manifest, which marks the output as finished, and then the summaries."""
    for name in (MANIFEST, *SUMMARIES):
        output.delete(name)


def match(plan: Plan, stamps: pa.Table) -> pa.Table:
    """Join the planned parts with the output files (`OutputFiles.stamps`) that are of the same rows, input file and spec.

    Returns:
        One row per part, in the order of the plan: PART_SCHEMA; `rejected`, `rows_in_file`, `rejected_in_file` and `counts`, null
        where there is no such file; and `done`, whether there is one.
    """
    whole = stamps.filter(pc.and_(pc.equal(stamps["spec"], plan.spec), pc.is_valid(stamps["rejected_in_file"])))
    # A join does not keep the order.
    numbered = plan.parts.append_column("order", pa.array(range(plan.parts.num_rows), pa.int64()))
    values = whole.select([*PART_SCHEMA.names, "rejected", "rows_in_file", "rejected_in_file", "counts"])
    joined = numbered.join(values, PART_SCHEMA.names, join_type="left outer").sort_by("order")
    return joined.append_column("done", pc.is_valid(joined["rejected"]))


def will_hold(plan: Plan, published: OutputFiles, staged: OutputFiles | None) -> pa.Table:
    """Return the stamps of what the finished output will hold: the staged files, and those published ones that stay."""
    if staged is None:
        return published.stamps
    if plan.config.overwrite:
        return staged.stamps
    stay = pc.invert(pc.is_in(published.stamps["output"], staged.stamps["output"]))
    return pa.concat_tables([staged.stamps, published.stamps.filter(stay)])


@dataclass(frozen=True)
class Committed:
    """What earlier runs have committed."""

    published: OutputFiles
    """The output folder when this run began."""
    done: pa.Table
    """Parts of the plan that are committed, as `match` returns them."""
    todo: pa.Table
    """`parts.PART_SCHEMA`: the other parts of the plan."""
    unplanned: int
    """Number of published files whose input is not in the plan. They stay, but are not counted."""
    failures: dict[str, str]
    """Input files that an earlier run has reported as unusable: name and reason."""

    def resumed(self, plan: Plan) -> tuple[int, int]:
        """Rows of the parts of a plan that were done, and how many of the rows are rejected."""
        done = self.done.filter(pc.is_in(self.done["output"], plan.parts["output"]))
        return pc.sum(done["rows"]).as_py() or 0, pc.sum(done["rejected"]).as_py() or 0


def resume(plan: Plan, console: Console) -> Committed:
    """Compare the plan with the files in the output folder and the staging folder, and delete unfinished files there.

    Raises:
        RequestError: the output folder holds other files, or predictions that this run must not be mixed with.
        RunError: with `--overwrite`, an unusable input file has predictions in the output.
    """
    _check_folders(plan)
    published = OutputFiles.read(plan.output, console)
    published.check(staged=False)
    unplanned = 0
    if plan.config.overwrite:
        check_overwrite(plan, published)
    else:
        _check_compatible(plan, published.stamps)
        others = published.stamps.filter(pc.invert(pc.is_in(published.stamps["output"], plan.parts["output"])))
        unplanned = others.num_rows
        if unplanned:
            first = others["source"][0]
            console.say(f"left as they are: {unplanned:,} output files of input that is not there now, such as {first}")
    # Nothing is deleted before all files are known as this program's and the request has been found compatible.
    published.clear_unfinished(plan.held)
    staged = None
    if plan.staged:
        staged = OutputFiles.read(plan.folder.place, console)
        staged.check(staged=True)
        staged.clear_unfinished(plan.folder)
        # Nothing staged is published yet, so what is not a done part of this plan can be deleted.
        current = pc.is_in(staged.stamps["output"], match(plan, staged.stamps).filter(pc.field("done"))["output"])
        delete_parts(plan.folder, staged.stamps.filter(pc.invert(current))["output"].to_pylist())
        staged = replace(staged, stamps=staged.stamps.filter(current))
    matched = match(plan, will_hold(plan, published, staged))
    todo = matched.filter(pc.invert(matched["done"])).select(PART_SCHEMA.names)
    failures = {} if plan.config.overwrite else _earlier_failures(plan.output)
    return Committed(published, matched.filter(matched["done"]), todo, unplanned, failures)


def begun_precision(request: Request) -> str | None:
    """The precision that an earlier run has given the output's predictions of this model; None without such predictions."""
    for folder in (request.output, request.output / STAGING) if request.config.strict else (request.output,):
        for info in (folder / PREDICTIONS).files():
            name = info.path.removeprefix(folder.path).lstrip("/")
            if not is_hidden(name):
                files = pa.Table.from_pylist([{"name": name, "size": info.size, "modified": 0}], FILE_SCHEMA)
                spec = json.loads(read_stamps(folder, files)["spec"][0].as_py() or "{}")
                if spec.get("model") == request.card["sha256"]:
                    return str(spec["precision"])
                break
    return None


def _check_folders(plan: Plan) -> None:
    """Check that the folders of this program in a local output are folders, and hold no links to folders.

    What is written or deleted through a link is written or deleted elsewhere, and no listing follows it.
    """
    for name in (PREDICTIONS, REJECTED, *([STAGING] if plan.staged else [])) if plan.output.is_local else ():
        top = Path(plan.output.path) / name
        below = (Path(folder, entry) for folder, entries, _ in os.walk(top) for entry in entries)
        for path in (top, *below):
            if path.is_symlink() or (path.exists() and not path.is_dir()):
                raise RequestError(
                    f"--output {plan.output.display}: {path} is not a folder of this program, but a link or a file; remove it"
                )


def _earlier_failures(output: Location) -> dict[str, str]:
    """The unusable files of the run that finished the output; none where it is not finished."""
    try:
        table = read_table(output / FILES_TABLE, ["file", "status", "reason"])
    except (MissingFileError, UnusableFileError):
        return {}
    failed = table.filter(pc.equal(table["status"], "failed"))
    return dict(zip(failed["file"].to_pylist(), failed["reason"].to_pylist(), strict=True))


def check_overwrite(plan: Plan, published: OutputFiles) -> None:
    """With `--overwrite`, refuse to delete published predictions of an input file that cannot be scored again.

    Raises:
        RunError: names the first such file.
    """
    lost = _with_predictions(plan, plan.files.filter(pc.is_valid(plan.files["error"])), published.stamps)
    if lost.num_rows:
        raise RunError(
            f"--overwrite: nothing was replaced: {lost['name'][0]} cannot be used, and the output holds its predictions; "
            "repair it, or take it out of the input"
        )


def _with_predictions(plan: Plan, files: pa.Table, stamps: pa.Table) -> pa.Table:
    """Return those of the input files that some stamps name.

    The input may have moved, or its root may be another folder now: a file is the same if its name or its full path is.
    """
    sources = pc.binary_join_element_wise(plan.source(""), files["name"], "")
    return files.filter(pc.or_(pc.is_in(files["name"], stamps["name"]), pc.is_in(sources, stamps["source"])))


def _check_compatible(plan: Plan, stamps: pa.Table) -> None:
    """Refuse to put predictions beside those of another model, of changed input files, or of parts that were cut differently.

    Raises:
        RequestError: says what differs and what to do.
    """
    done = match(plan, stamps).filter(pc.field("done"))["output"]
    others = stamps.filter(pc.invert(pc.is_in(stamps["output"], done)))
    for file in _with_predictions(plan, plan.files, others).slice(0, 1).to_pylist():
        of_file = pc.or_(pc.equal(others["name"], file["name"]), pc.equal(others["source"], plan.source(file["name"])))
        conflict = _conflict(plan, file, others.filter(of_file).slice(0, 1).to_pylist()[0])
        raise RequestError(f"--output {plan.output.display}: {conflict}")
    for stamp in others.filter(pc.is_in(others["output"], plan.parts["output"])).slice(0, 1).to_pylist():
        raise RequestError(f"--output {plan.output.display}: {stamp['output']} has rows of {stamp['source']}; {_START_OVER}")


def _conflict(plan: Plan, file: dict[str, Any], stamp: dict[str, Any]) -> str:
    """Why an input file (`preflight.FOOTER_SCHEMA`) cannot be scored beside the output file of it that has a stamp."""
    if file["error"]:
        return (
            f"holds predictions of {file['name']}, which now cannot be used ({file['error']}); repair it, or take it out of the "
            "input"
        )
    if stamp["spec"] != plan.spec:
        return f"{_spec_difference(json.loads(stamp['spec']), json.loads(plan.spec))} {_START_OVER}"
    if any(file[name] != stamp[name] for name in ("size", "modified", "footer_sha256")):
        if stamp["source"] != plan.source(file["name"]):
            return f"holds the rows of {stamp['source']} as {stamp['output']}; choose another folder, or {_START_OVER}"
        return f"{file['name']} has changed since it was scored; {_START_OVER}"
    return (
        f"holds the rows of {file['name']} as {stamp['output']}, since it was started with another --max-rows-per-file or "
        f"--input; give the same again, or {_START_OVER}"
    )


def _spec_difference(committed: dict[str, Any], current: dict[str, Any]) -> str:
    """How two `Plan.spec` differ, before _START_OVER; where they do in several ways, the first one explains the others."""
    key = next(key for key in current if committed[key] != current[key])
    old, new = committed[key], current[key]
    if key == "model":
        return f"holds predictions of another model (SHA-256 {old[:12]}…, --model has {new[:12]}…);"
    if key == "prediction_columns":
        return "holds predictions with other columns, of another version of this program;"
    if key == "int8":
        return "holds predictions of the same model quantized otherwise;"
    was, has = (f"no --{key}" if value is None else f"--{key} {value}" for value in (old, new))
    return f"was started with {was}, and this run has {has}; give the same again, or"


def reconcile(plan: Plan, stamps: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Check that every row of every usable file is in the output exactly once.

    Args:
        plan: without the files that could not be read.
        stamps: `OutputFiles.stamps` of what the finished output holds, read again from its files.

    Returns:
        A FILES_SCHEMA table in the order of the files; and `match` of the plan.

    Raises:
        RowCountError: names the first file with missing or duplicate rows.
    """
    matched = match(plan, stamps)
    complete = pc.and_(
        pc.equal(matched["rejected"], matched["rejected_in_file"]),
        pc.equal(matched["rows"], pc.add(matched["rows_in_file"], matched["rejected_in_file"])),
    )
    for part in matched.filter(pc.invert(pc.fill_null(complete, False))).slice(0, 1).to_pylist():
        place = f"{part['name']}: rows {part['first_row']:,} to {part['first_row'] + part['rows'] - 1:,}"
        there = f"{part['rows_in_file'] or 0:,} predictions and {part['rejected_in_file'] or 0:,} rejected rows"
        raise RowCountError(f"{place} should be in {PREDICTIONS}/{part['output']}, which has {there}")
    sums = matched.group_by("name").aggregate([(name, "sum") for name in ("rows", "rows_in_file", "rejected_in_file")])
    files = plan.files.select(["name", "rows", "error"]).append_column("order", pa.array(range(plan.files.num_rows), pa.int64()))
    files = files.join(sums, "name", join_type="left outer").sort_by("order")
    usable = pc.is_null(files["error"])
    lost = pc.and_(usable, pc.invert(pc.fill_null(pc.equal(files["rows"], files["rows_sum"]), False)))
    for file in files.filter(lost).slice(0, 1).to_pylist():
        raise RowCountError(f"{file['name']}: has {file['rows']:,} rows, of which {file['rows_sum'] or 0:,} are accounted for")
    scored, rejected = (pc.if_else(usable, files[f"{name}_in_file_sum"], 0) for name in ("rows", "rejected"))
    status = pc.if_else(usable, "scored", "failed")
    columns = (files["name"], files["rows"], scored, rejected, status, files["error"])
    return pa.table(dict(zip(FILES_SCHEMA.names, columns, strict=True)), FILES_SCHEMA), matched
