"""The output folder: what is in it, what earlier runs have committed there, and whether all rows are in it exactly once.

OUTPUT/predictions/, OUTPUT/rejected/      files of parts, complete under their names; data alone, so that every reader of
                                           Parquet can take the folder
OUTPUT/files.parquet, report.html, *.png   about the whole run, written after all predictions
OUTPUT/manifest.json                       written last: while it exists, the output is finished
OUTPUT/_unpublished/                       the staging folder: files of parts of a run with --overwrite or --strict
OUTPUT/_unpublished/list.parquet           they are complete: the files to move into the output, and those to delete there
OUTPUT/_lock                               names the run that writes here
"""

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from mnistsum_ray.cluster.map_files import map_files
from mnistsum_ray.data.parquet import read_table
from mnistsum_ray.errors import MissingFileError, RequestError, RowCountError, RunError, UnusableFileError
from mnistsum_ray.reporting.console import Console, Progress
from mnistsum_ray.reporting.report import REPORT
from mnistsum_ray.scoring.counts import RowCounts
from mnistsum_ray.scoring.parts import PREDICTIONS, REJECTED, digest, folders_above, read_stamp
from mnistsum_ray.scoring.preflight import STAGING, Plan, Request
from mnistsum_ray.storage.folder import OutputFolder
from mnistsum_ray.storage.location import Entry, Location, is_hidden, is_partial

FILES_TABLE: Final = "files.parquet"
LIST: Final = "list.parquet"
MANIFEST: Final = "manifest.json"
MANIFEST_FORMAT: Final = "mnistsum_ray.score/1"
"""`format` of the manifest."""

OUTPUT_PICTURES: Final = {
    "probabilities.png": "Rows by predicted probability",
    "reliability.png": "Accuracy by predicted probability",
    "confusion.png": "Digits: confusion matrix",
}
"""Titles of the pictures by their file names."""

SUMMARIES: Final = (FILES_TABLE, *OUTPUT_PICTURES, REPORT)
"""Files about the whole run. They are written after all predictions and before the manifest."""

FILES_TABLE_SCHEMA: Final = pa.schema(
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

OUTPUT_SCHEMA: Final = pa.schema(
    [
        ("output", pa.string()),  # relative to the folder of predictions, and to that of rejected rows
        ("unusable", pa.string()),  # name of a file that is not a whole one of this version of the program
        ("error", pa.string()),  # what is wrong with it
        ("unfinished", pa.bool_()),  # there are rejected rows, and no predictions with their stamp
        # Of whole predictions, as in their stamp; null where there are none:
        ("name", pa.string()),  # the input file
        ("source", pa.string()),  # the input file in full; null of a part of the plan
        ("rows", pa.int64()),
        ("rejected", pa.int64()),  # those of the rows that are in the file of rejected rows
        # Of whole predictions:
        ("rows_in_file", pa.int64()),
        ("rejected_in_file", pa.int64()),
        ("planned", pa.bool_()),  # whether they are of a part of the plan
        ("counts", pa.string()),  # `RowCounts.as_json` of parts of the plan that were read at once; in one row of these
    ]
)
"""One row for each output file of predictions, of rejected rows, or of both. 1.3 million have to fit into the driver."""


@dataclass(frozen=True)
class OutputFiles:
    """The files in an output folder or a staging folder."""

    folder: Location
    stamps: pa.Table
    """OUTPUT_SCHEMA of whole predictions, sorted by `output`."""
    counts: RowCounts
    """Of those that are of parts of the plan."""
    unfinished: tuple[str, ...]
    """Names of files that a killed run has left: partial ones, and rejected rows without predictions of the same stamp."""
    foreign: dict[str, str]
    """Files that are not whole files of this version of the program: name and what is wrong. Hidden files and those of the run do
    not count."""

    @classmethod
    def read(cls, folder: Location, plan: Plan, console: Console) -> "OutputFiles":
        """List a folder, read all stamps in it, and compare them with the plan. A folder that does not exist is empty."""
        sizes: dict[str, dict[str, int]] = {PREDICTIONS: {}, REJECTED: {}}
        partials: list[str] = []
        summaries: list[str] = []
        foreign: dict[str, str] = {}
        for name, file in files_below(folder, console):
            top, _, below = name.partition("/")
            if is_partial(file.name) and top != STAGING:
                partials.append(name)
            elif is_hidden(name):
                continue
            elif name in (*SUMMARIES, MANIFEST):
                summaries.append(name)
            elif top in sizes and below:
                sizes[top][below] = file.size
            else:
                foreign[name] = _FOREIGN
        outputs = pa.array(sorted({*sizes[PREDICTIONS], *sizes[REJECTED]}), pa.string())
        if summaries and not len(outputs) and not _is_finished(folder):
            foreign |= dict.fromkeys(summaries, _FOREIGN)  # other programs use these names too
        # The files of each output, and the digest of the part that it should be.
        digests = plan.parts["digest"].take(pc.index_in(outputs, plan.parts["output"]))
        columns = {top: pa.array(map(of_top.get, outputs.to_pylist()), pa.int64()) for top, of_top in sizes.items()}
        files = pa.table({"name": outputs, "digest": digests} | columns)
        progress = Progress(console.progress, "output files read", len(outputs))
        found = map_files(partial(read_stamps, spec=plan.spec), folder, files, progress)
        for row in found.filter(pc.is_valid(found["error"])).to_pylist():
            foreign[row["unusable"]] = row["error"]
        unfinished = (f"{REJECTED}/{name}" for name in found["output"].filter(found["unfinished"]).to_pylist())
        counts = RowCounts.sum(found["counts"].drop_null().to_pylist())
        return cls(folder, found.filter(pc.is_valid(found["planned"])), counts, (*partials, *unfinished), foreign)

    def check(self) -> None:
        """Check that all files are whole and of this program.

        Raises:
            RequestError: names the first other file.
        """
        if self.foreign:
            name, error = next(iter(self.foreign.items()))
            raise RequestError(f"--output {self.folder.display}: {name} {error}; move it away, or choose another folder")


def read_stamps(folder: Location, files: pa.Table, spec: str) -> pa.Table:
    """Read the stamps of output files, and compare them with the parts that they should be.

    `files` has the `name` of each output, the size of its files in PREDICTIONS and in REJECTED, or null, and the `digest` of its
    part. `spec` is `preflight.Plan.spec`. OUTPUT_SCHEMA is in the same order. StorageError: the storage does not give a file.
    """
    rows: list[dict[str, Any]] = []
    counts: list[str] = []
    for file in files.to_pylist():
        row: dict[str, Any] = {"output": file["name"]}
        found = {}
        for top in (PREDICTIONS, REJECTED):
            name = f"{top}/{file['name']}"
            try:
                found[top] = read_stamp(folder, name, file[top]) if file[top] is not None else ({}, 0, "")
            except UnusableFileError as error:
                found[top] = ({}, 0, "")
                row |= {"unusable": name, "error": str(error)}
        (stamp, rows_in_file, of_part), (of_rejected, rejected_in_file, _) = found.values()
        # By their whole stamps: files of one name may come from two runs.
        row["unfinished"] = bool(of_rejected) and of_rejected != stamp
        if stamp and stamp["rejected"] and of_rejected != stamp:
            row = {"unusable": f"{PREDICTIONS}/{file['name']}", "error": "has lost its rejected rows"} | row
        elif stamp:
            row |= {key: stamp[key] for key in ("name", "source", "rows", "rejected")}
            row |= {"rows_in_file": rows_in_file, "rejected_in_file": rejected_in_file if stamp["rejected"] else 0}
            row["planned"] = (digest(stamp), stamp["spec"]) == (file["digest"], spec)
            if row["planned"]:
                row["source"] = None
                counts.append(of_part)
        rows.append(row)
    if counts:
        rows[0]["counts"] = RowCounts.sum(counts).as_json()
    return pa.Table.from_pylist(rows, OUTPUT_SCHEMA)


def files_below(folder: Location, console: Console) -> Iterator[tuple[str, Entry]]:
    """The files below a folder, with their names relative to it."""
    with console.waiting_for(f"the listing of {folder.display}", lambda: "it is long, or the storage is slow"):
        files = folder.files()
    for file in files:
        yield file.path.removeprefix(folder.path).lstrip("/"), file


def _is_finished(folder: Location) -> bool:
    """Whether the manifest of a run of this program is there."""
    try:
        return bool((folder / MANIFEST).read_json()["format"] == MANIFEST_FORMAT)
    except (MissingFileError, ValueError, TypeError, KeyError):
        return False


def delete_parts(folder: OutputFolder, names: list[str], console: Console) -> None:
    """Delete the files of parts. The predictions go first, because a part is done when its predictions exist."""
    progress = Progress(console.progress, "files deleted", 2 * len(names))
    for top in (PREDICTIONS, REJECTED):
        folder.delete_files([f"{top}/{name}" for name in names], progress)


def unpublish(output: OutputFolder) -> None:
    """Delete the manifest, which marks the output as finished, and then the summaries."""
    output.delete(MANIFEST)
    output.delete_files(SUMMARIES)


def all_but(table: pa.Table, outputs: pa.ChunkedArray) -> pa.Table:
    """The parts, or the stamps, of all other output files than these."""
    return table.filter(pc.invert(pc.is_in(table["output"], outputs)))


@dataclass(frozen=True)
class Committed:
    """What earlier runs have committed."""

    published: OutputFiles
    """The output folder when this run began."""
    todo: pa.Table
    """`parts.PLAN_SCHEMA`: the parts of the plan that are not committed."""
    unplanned: int
    """Number of published files whose input is not in the plan. They stay, but are not counted."""
    failures: dict[str, str]
    """Input files that an earlier run has reported as unusable: name and reason."""


def resume(plan: Plan, console: Console, *, replaced: bool = False) -> tuple[Plan, Committed]:
    """Compare the plan with the files in the output folder and the staging folder, and delete unfinished files there.

    `replaced` says whether a killed run with `--overwrite` has replaced the output, see `publish.move_listed`.

    Returns:
        The plan, which no longer replaces the output if a killed run has published all that it asks for; and what is committed.

    Raises:
        RequestError: the output folder holds other files, or predictions that this run must not be mixed with.
        RunError: with `--overwrite`, an unusable input file has predictions in the output.
    """
    output = OutputFiles.read(plan.output, plan, console)
    output.check()
    published = output.stamps
    if replaced and pc.all(published["planned"], min_count=0).as_py():
        plan = replace(plan, overwrite=False)
    unplanned = 0
    if plan.overwrite:
        check_overwrite(plan, published)
    else:
        different = published.filter(pc.invert(published["planned"]))
        _check_compatible(plan, different)
        others = all_but(different, plan.parts["output"])
        unplanned = others.num_rows
        if unplanned:
            first = others["source"][0]
            console.say(f"left as they are: {unplanned:,} output files of input that is not there now, such as {first}")
    # Nothing is deleted before all files are known as this program's and the request has been found compatible.
    plan.held.delete_files(output.unfinished)
    failures = {} if plan.overwrite else _earlier_failures(plan.output)
    todo = plan.parts if plan.overwrite else all_but(plan.parts, published["output"].filter(published["planned"]))
    if (plan.staged or todo.num_rows) and (plan.held.place / STAGING / LIST).exists():
        plan.held.delete_folder(STAGING)  # its files have been moved, and the list does not know what is scored from now on
    if plan.staged:
        staged = OutputFiles.read(plan.folder.place, replace(plan, parts=todo), console)
        staged.check()
        plan.folder.delete_files(staged.unfinished)
        done = staged.stamps["output"].filter(staged.stamps["planned"])
        delete_parts(plan.folder, all_but(staged.stamps, done)["output"].to_pylist(), console)
        todo = all_but(todo, done)
    return plan, Committed(output, todo, unplanned, failures)


def begun_with(request: Request, console: Console) -> dict[str, Any]:
    """The flags that an earlier run has given predictions of this model in the output: `precision` and `max_rows_per_file`; none
    without such predictions."""
    for folder in (request.output, request.output / STAGING) if request.config.strict else (request.output,):
        for name, file in files_below(folder / PREDICTIONS, console):
            if not is_hidden(name):
                with suppress(UnusableFileError):
                    stamp, _, _ = read_stamp(folder, f"{PREDICTIONS}/{name}", file.size)
                    spec = json.loads(stamp["spec"])
                    if spec["model"] == request.card["sha256"]:
                        return {"precision": spec["precision"], "max_rows_per_file": stamp["max_rows_per_file"]}
                break
    return {}


def check_folders(output: Location) -> None:
    """Check that the folders of this program in a local output are folders, and hold no links to folders.

    What is written or deleted through a link is written or deleted elsewhere, and no listing follows it.
    """
    for name in (PREDICTIONS, REJECTED, STAGING) if output.is_local else ():
        top = Path(output.path) / name
        below = (Path(folder, entry) for folder, entries, _ in os.walk(top) for entry in entries)
        for path in (top, *below):
            if path.is_symlink() or (path.exists() and not path.is_dir()):
                raise RequestError(
                    f"--output {output.display}: {path} is not a folder of this program, but a link or a file; remove it"
                )


def _earlier_failures(output: Location) -> dict[str, str]:
    """The unusable files of the run that finished the output; none where it is not finished."""
    try:
        table = read_table(output / FILES_TABLE, ["file", "status", "reason"])
    except (MissingFileError, UnusableFileError):
        return {}
    failed = table.filter(pc.equal(table["status"], "failed"))
    return dict(zip(failed["file"].to_pylist(), failed["reason"].to_pylist(), strict=True))


def check_overwrite(plan: Plan, published: pa.Table) -> None:
    """With `--overwrite`, refuse to delete published predictions of an input file that cannot be scored again.

    Raises:
        RunError: names the first such file, or a name that a file and a folder would have while files are moved.
    """
    for files, others in ((plan.parts, published), (published, plan.parts)):
        folders = {folder for name in others["output"].to_pylist() for folder in folders_above(name)}
        if clash := _first(files.filter(pc.is_in(files["output"], pa.array(folders, pa.string())))):
            raise RunError(
                f"--overwrite: nothing was replaced: {clash['output']} would be a file and a folder; choose another folder"
            )
    if lost := _first(_with_predictions(plan, plan.files.filter(pc.is_valid(plan.files["error"])), published)):
        raise RunError(
            f"--overwrite: nothing was replaced: {lost['name']} cannot be used, and the output holds its predictions; "
            "repair it, or take it out of the input"
        )


def _first(table: pa.Table) -> dict[str, Any] | None:
    """The first row of a table; None of an empty one."""
    return next(iter(table.slice(0, 1).to_pylist()), None)


def _with_predictions(plan: Plan, files: pa.Table, stamps: pa.Table) -> pa.Table:
    """Return those of the input files that some stamps name.

    The input may have moved, or its root may be another folder now: a file is the same if its name or its full path is.
    """
    sources = pc.binary_join_element_wise(plan.source(""), files["name"], "")
    return files.filter(pc.or_(pc.is_in(files["name"], stamps["name"]), pc.is_in(sources, stamps["source"])))


def _check_compatible(plan: Plan, others: pa.Table) -> None:
    """Refuse to put predictions beside those of another model, of changed input files, or of parts that were cut differently.

    `others` are those of `OutputFiles.stamps` that are not of the plan.

    Raises:
        RequestError: says what differs and what to do.
    """
    conflict = None
    if file := _first(_with_predictions(plan, plan.files, others)):
        of_file = pc.or_(pc.equal(others["name"], file["name"]), pc.equal(others["source"], plan.source(file["name"])))
        stamp, _, _ = read_stamp(plan.output, f"{PREDICTIONS}/{others['output'].filter(of_file)[0]}")
        conflict = _conflict(plan, file, stamp)
    elif other := _first(others.filter(pc.is_in(others["output"], plan.parts["output"]))):
        conflict = f"{other['output']} has rows of {other['source']}; {_START_OVER}"
    if conflict:
        raise RequestError(f"--output {plan.output.display}: {conflict}")


def _conflict(plan: Plan, file: dict[str, Any], stamp: dict[str, Any]) -> str:
    """Why an input file (`preflight.FOOTER_SCHEMA`) cannot be scored beside the output file of it that has a stamp."""
    name = file["name"]
    if file["error"]:
        return f"holds predictions of {name}, which now cannot be used ({file['error']}); repair it, or take it out of the input"
    if stamp["spec"] != plan.spec:
        return f"{_spec_difference(json.loads(stamp['spec']), json.loads(plan.spec))} {_START_OVER}"
    if any(file[key] != stamp[key] for key in ("size", "modified", "footer_sha256")):
        if stamp["source"] != plan.source(name):
            return f"holds the rows of {stamp['source']} as {stamp['output']}; choose another folder, or {_START_OVER}"
        return f"{name} has changed since it was scored; {_START_OVER}"
    return (
        f"holds the rows of {name} as {stamp['output']}, since it was started with another --max-rows-per-file or --input; "
        f"give the same again, or {_START_OVER}"
    )


def _spec_difference(committed: dict[str, Any], current: dict[str, Any]) -> str:
    """How two `Plan.spec` differ, before _START_OVER; where they do in several ways, the first one explains the others."""
    committed, current = ({"probabilities": None} | spec for spec in (committed, current))
    key = next(key for key in current if committed[key] != current[key])
    old, new = committed[key], current[key]
    if key == "model":
        return f"holds predictions of another model (SHA-256 {old[:12]}…, --model has {new[:12]}…);"
    if key == "prediction_columns":
        return "holds predictions with other columns, of another version of this program;"
    if key == "int8":
        return "holds predictions of the same model quantized otherwise;"
    was, has = (f"no --{key}" if value is None else f"--{key} {'' if value is True else value}".strip() for value in (old, new))
    return f"was started with {was}, and this run has {has}; give the same again, or"


def reconcile(plan: Plan, stamps: pa.Table) -> pa.Table:
    """Check that every row of every usable file is in the output exactly once; return FILES_TABLE_SCHEMA in the files' order.

    `plan` lacks the files that could not be read, and `stamps` (`OutputFiles.stamps`) are read after all files were written.

    Raises:
        RowCountError: names the first file with missing or duplicate rows.
    """
    counted = ("rows", "rows_in_file", "rejected_in_file")
    parts, there = plan.parts.select(["name", "output", "first_row", "rows"]), stamps.filter(stamps["planned"])
    places = pc.index_in(parts["output"], there["output"])  # a join or a sort of so many strings fails, or takes gigabytes
    for name in ("rejected", *counted[1:]):
        parts = parts.append_column(name, there[name].take(places))
    complete = pc.and_(
        pc.equal(parts["rejected"], parts["rejected_in_file"]),
        pc.equal(parts["rows"], pc.add(parts["rows_in_file"], parts["rejected_in_file"])),
    )
    if part := _first(parts.filter(pc.invert(pc.fill_null(complete, False)))):
        place = f"{part['name']}: rows {part['first_row']:,} to {part['first_row'] + part['rows'] - 1:,}"
        found = f"{part['rows_in_file'] or 0:,} predictions and {part['rejected_in_file'] or 0:,} rejected rows"
        raise RowCountError(f"{place} should be in {PREDICTIONS}/{part['output']}, which has {found}")
    sums = parts.group_by("name").aggregate([(name, "sum") for name in counted])
    places = pc.index_in(plan.files["name"], sums["name"])
    rows, scored, rejected = (pc.fill_null(sums[f"{name}_sum"].take(places), 0) for name in counted)
    files = plan.files.select(["name", "rows", "error"])
    usable = pc.is_null(files["error"])
    if lost := _first(files.append_column("found", rows).filter(pc.and_(usable, pc.not_equal(files["rows"], rows)))):
        raise RowCountError(f"{lost['name']}: has {lost['rows']:,} rows, of which {lost['found']:,} are accounted for")
    columns = (files["name"], files["rows"], scored, rejected, pc.if_else(usable, "scored", "failed"), files["error"])
    return pa.table(dict(zip(FILES_TABLE_SCHEMA.names, columns, strict=True)), FILES_TABLE_SCHEMA)
