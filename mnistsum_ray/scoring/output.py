"""The output folder: what is in it, what earlier runs have committed there, and whether all rows are in it exactly once.

OUTPUT/predictions/, OUTPUT/rejected/      files of parts, complete under their names; data alone, so that every reader of
                                           Parquet can take the folder
OUTPUT/files.parquet, report.html, *.png   about the whole run, written after all predictions
OUTPUT/manifest.json                       written last: while it exists, the output is finished
OUTPUT/_lock                               names the run that writes here
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from mnistsum_ray.cluster.tasks import map_files
from mnistsum_ray.errors import MissingFileError, RequestError, RowCountError, UnusableFileError
from mnistsum_ray.reporting.console import Console, Progress
from mnistsum_ray.reporting.report import REPORT
from mnistsum_ray.scoring.counts import RowCounts
from mnistsum_ray.scoring.parts import PREDICTIONS, REJECTED, digest, read_stamp
from mnistsum_ray.scoring.preflight import Plan, Request
from mnistsum_ray.storage.folder import PARTIAL, OutputFolder
from mnistsum_ray.storage.location import Entry, Location, is_hidden

FILES_TABLE: Final = "files.parquet"
MANIFEST: Final = "manifest.json"
MANIFEST_FORMAT: Final = "mnistsum_ray.score/1"
"""`format` of the manifest."""

SUMMARIES: Final = (FILES_TABLE, "confusion.png", "reliability.png", REPORT)
"""Files about the whole run. They are written after all predictions and before the manifest."""

FILES_TABLE_SCHEMA: Final = pa.schema(
    {
        "file": pa.string(),
        "rows": pa.int64(),  # null if the footer cannot be read
        "scored": pa.int64(),
        "rejected": pa.int64(),
        "failed": pa.int64(),  # all rows of a file that failed, else 0
        "status": pa.string(),  # `scored` or `failed`
        "reason": pa.string(),  # why the file failed
    }
)
"""`files.parquet`: one row per input file; rows == scored + rejected + failed."""

_FOREIGN: Final = "is not a file of this program"

_START_OVER: Final = "--overwrite scores everything again"

OUTPUT_SCHEMA: Final = pa.schema(
    [
        ("output", pa.string()),  # relative to the folder of predictions, and to that of rejected rows
        ("error", pa.string()),  # a file that is not a whole one of this version of the program, and what is wrong with it
        ("unfinished", pa.bool_()),  # there are rejected rows, and no predictions with their stamp
        # As in the stamp of predictions of which all rows are there; null where there are none:
        ("name", pa.string()),  # the input file
        ("source", pa.string()),  # the input file in full; null of a part of the plan
        ("rows", pa.int64()),
        ("rejected", pa.int64()),  # those of the rows that are in the file of rejected rows
        ("planned", pa.bool_()),  # whether they are of a part of the plan
        ("counts", pa.string()),  # `RowCounts.as_json` of parts of the plan that were read at once; in one row of these
    ]
)
"""One row for each output file of predictions, of rejected rows, or of both. 1.3 million have to fit into the driver."""


@dataclass(frozen=True)
class OutputFiles:
    """The files in an output folder."""

    folder: Location
    stamps: pa.Table
    """OUTPUT_SCHEMA of whole predictions, sorted by `output`."""
    counts: RowCounts
    """Of those that are of parts of the plan."""
    unfinished: list[str]
    """Names of files that a killed run has left: partial ones, and rejected rows without predictions of the same stamp."""
    errors: list[str]
    """Names of files that are not whole files of this version of the program, and what is wrong with them. Hidden files and those
    of the run do not count."""

    @classmethod
    def read(cls, plan: Plan, console: Console) -> "OutputFiles":
        """List the output folder, read all stamps in it, and compare them with the plan."""
        folder = plan.output
        sizes: dict[str, dict[str, int]] = {PREDICTIONS: {}, REJECTED: {}}
        unfinished: list[str] = []
        summaries: list[str] = []
        errors: list[str] = []
        for name, file in files_below(folder, console):
            top, _, below = name.partition("/")
            if file.name.startswith(PARTIAL):
                unfinished.append(name)
            elif is_hidden(name):
                continue
            elif name in (*SUMMARIES, MANIFEST):
                summaries.append(f"{name} {_FOREIGN}")
            elif top in sizes and below:
                sizes[top][below] = file.size
            else:
                errors.append(f"{name} {_FOREIGN}")
        outputs = pa.array(sorted({*sizes[PREDICTIONS], *sizes[REJECTED]}), pa.string())
        if summaries and not len(outputs) and not _is_finished(folder):
            errors += summaries  # other programs use these names too
        # The files of each output, and the digest of the part that it should be.
        digests = plan.parts["digest"].take(pc.index_in(outputs, plan.parts["output"]))
        columns = {top: pa.array(map(of_top.get, outputs.to_pylist()), pa.int64()) for top, of_top in sizes.items()}
        files = pa.table({"name": outputs, "digest": digests} | columns)
        progress = Progress(console.progress, "output files read", len(outputs))
        found = map_files(partial(read_stamps, spec=plan.spec), folder, files, progress)
        errors = [*found["error"].drop_null().to_pylist(), *errors]  # first that the output is of another version
        unfinished += [f"{REJECTED}/{name}" for name in found["output"].filter(found["unfinished"]).to_pylist()]
        counts = RowCounts.sum(found["counts"].drop_null().to_pylist())
        return cls(folder, found.filter(pc.is_valid(found["planned"])), counts, unfinished, errors)

    def check(self) -> None:
        """Check that all files are whole and of this program; else raise a RequestError that names the first other one."""
        if self.errors:
            raise RequestError(f"--output {self.folder.display}: {self.errors[0]}; move it away, or choose another folder")


def read_stamps(folder: Location, files: pa.Table, spec: dict[str, Any]) -> pa.Table:
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
                row["error"] = f"{name} {error}"
        (stamp, scored, of_part), (of_rejected, rejected, _) = found.values()
        # By their whole stamps: files of one name may come from two runs.
        row["unfinished"] = bool(of_rejected) and of_rejected != stamp
        if stamp:
            rejected = 0 if row["unfinished"] else rejected
            if (scored + rejected, rejected) == (stamp["rows"], stamp["rejected"]):
                row |= {key: stamp[key] for key in ("name", "source", "rows", "rejected")}
                row["planned"] = (digest(stamp), stamp["spec"]) == (file["digest"], spec)
                if row["planned"]:
                    row["source"] = None
                    counts.append(of_part)
            else:
                lost = f"{scored:,} predictions and {rejected:,} rejected rows of {stamp['rows']:,} rows"
                row = {"error": f"{PREDICTIONS}/{file['name']} has {lost}"} | row
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


def resume(plan: Plan, console: Console) -> tuple[OutputFiles, pa.Table]:
    """Compare the plan with the files in the output folder, and delete unfinished files there. With
    `--overwrite`, also delete the earlier output.

    Returns:
        The output folder as it was; and those of the plan's parts that are to be scored
        (`parts.PLAN_SCHEMA`).

    Raises:
        RequestError: the output folder holds other files, or predictions that this run must not be
            mixed with; or all of the input is unusable, and `--overwrite` would only delete. Nothing
            is deleted then.
    """
    output = OutputFiles.read(plan, console)
    output.check()
    planned = output.stamps["planned"]
    done, others = output.stamps.filter(planned), output.stamps.filter(pc.invert(planned))
    if plan.config.overwrite:
        done = _overwrite(plan, output.stamps, done, console)
    else:
        _check_compatible(plan, others)
        if others.num_rows:
            first = others["source"][0]
            console.say(f"left as they are: {others.num_rows:,} output files of input that is not there now, such as {first}")
    plan.held.delete_files(output.unfinished)
    return output, all_but(plan.parts, done["output"])


def _overwrite(plan: Plan, stamps: pa.Table, done: pa.Table, console: Console) -> pa.Table:
    """Delete an earlier output; return the stamps of the parts that stay, which are some of `done`."""
    if not plan.parts.num_rows:
        raise RequestError("--overwrite: nothing was deleted, since no file of --input can be used")
    if _is_finished(plan.output):
        done = done.slice(0, 0)
    # Without a manifest this command may have been killed: it goes on, or a job that is restarted
    # again and again would never end.
    unpublish(plan.held)
    delete_parts(plan.held, all_but(stamps, done["output"])["output"].to_pylist(), console)
    return done


def follow_output(request: Request, console: Console) -> Request:
    """The request of an output that goes on: with the precision and the rows a file that its first
    file says it was begun with, where the request has none and has the same model."""
    files = files_below(request.output / PREDICTIONS, console)
    first = next(((name, file.size) for name, file in files if not is_hidden(name)), None)
    if first is None:
        return request
    name, size = first
    try:
        stamp, _, _ = read_stamp(request.output, f"{PREDICTIONS}/{name}", size)
    except UnusableFileError:
        return request  # `resume` refuses it
    if stamp["spec"]["model"] != request.card["sha256"]:
        return request
    begun = {
        "precision": stamp["spec"]["precision"],
        "max_rows_per_file": stamp["max_rows_per_file"],
    }
    unset = {name: value for name, value in begun.items() if getattr(request.config, name) is None}
    return replace(request, config=request.config.model_copy(update=unset))


def check_folders(output: Location) -> None:
    """Check that the folders of this program in a local output are folders, and hold no links to folders.

    What is written or deleted through a link is written or deleted elsewhere, and no listing follows it.
    """
    for name in (PREDICTIONS, REJECTED) if output.is_local else ():
        top = Path(output.path) / name
        below = (Path(folder, entry) for folder, entries, _ in os.walk(top) for entry in entries)
        for path in (top, *below):
            if path.is_symlink() or (path.exists() and not path.is_dir()):
                raise RequestError(
                    f"--output {output.display}: {path} is not a folder of this program, but a link or a file; remove it"
                )


def _first(table: pa.Table) -> dict[str, Any] | None:
    """The first row of a table; None of an empty one."""
    return next(iter(table.slice(0, 1).to_pylist()), None)


def _check_compatible(plan: Plan, others: pa.Table) -> None:
    """Refuse to put predictions beside those of another model, of changed input files, or of parts that were cut differently.

    `others` are those of `OutputFiles.stamps` that are not of the plan.

    Raises:
        RequestError: says what differs and what to do.
    """
    # The input may have moved, or its root may be another folder now: a file is the same if its name
    # or its full path is.
    files = plan.files
    sources = pc.binary_join_element_wise(plan.source(""), files["name"], "")
    same = pc.or_(pc.is_in(files["name"], others["name"]), pc.is_in(sources, others["source"]))
    if file := _first(files.filter(same)):
        of_file = pc.or_(
            pc.equal(others["name"], file["name"]),
            pc.equal(others["source"], plan.source(file["name"])),
        )
        output = others["output"].filter(of_file)[0]
        stamp, _, _ = read_stamp(plan.output, f"{PREDICTIONS}/{output}")
        raise RequestError(f"--output {plan.output.display}: {_conflict(plan, file, stamp)}")
    if other := _first(others.filter(pc.is_in(others["output"], plan.parts["output"]))):
        raise RequestError(f"--output {plan.output.display}: {other['output']} has rows of {other['source']}; {_START_OVER}")


def _conflict(plan: Plan, file: dict[str, Any], stamp: dict[str, Any]) -> str:
    """Why an input file (`preflight.FOOTER_SCHEMA`) cannot be scored beside the output file of it that has a stamp."""
    name = file["name"]
    if file["error"]:
        return f"holds predictions of {name}, which now cannot be used ({file['error']}); repair it, or take it out of the input"
    if stamp["spec"] != plan.spec:
        return f"{_spec_difference(stamp['spec'], plan.spec)} {_START_OVER}"
    identity = ("size", "modified", "footer_sha256")
    if stamp["source"] == plan.source(name) and any(file[key] != stamp[key] for key in identity):
        return f"{name} has changed since it was scored; {_START_OVER}"
    return (
        f"holds the rows of {stamp['source']} as {stamp['output']}, since it was started with another "
        f"--max-rows-per-file or --input; give the same again, or {_START_OVER}"
    )


def _spec_difference(committed: dict[str, Any], current: dict[str, Any]) -> str:
    """How two `Plan.spec` differ, before _START_OVER; where they do in several ways, the first one explains the others."""
    key = next(key for key in current if committed[key] != current[key])
    old, new = committed[key], current[key]
    if key == "model":
        return f"holds predictions of another model (SHA-256 {old[:12]}…, --model has {new[:12]}…);"
    if key == "prediction_columns":
        return "holds predictions with other columns, of another version of this program;"
    was, has = (f"--{key} {value}" if isinstance(value, str) else f"--{key}" if value else f"no --{key}" for value in (old, new))
    return f"was started with {was}, and this run has {has}; give the same again, or"


def reconcile(plan: Plan, stamps: pa.Table) -> pa.Table:
    """Check that every row of every usable file is in the output exactly once; return FILES_TABLE_SCHEMA in the files' order.

    `plan` lacks the files that could not be read, and `stamps` (`OutputFiles.stamps`) are read after all files were written.

    Raises:
        RowCountError: names the first file with missing or duplicate rows.
    """
    there = stamps.filter(stamps["planned"])
    if part := _first(all_but(plan.parts, there["output"])):
        rows = f"rows {part['first_row']:,} to {part['first_row'] + part['rows'] - 1:,}"
        raise RowCountError(f"{part['name']}: {rows} should be in {PREDICTIONS}/{part['output']}, and are not all there")
    counted = ("rows", "rejected")
    sums = there.group_by("name").aggregate([(name, "sum") for name in counted])
    places = pc.index_in(plan.files["name"], sums["name"])
    rows, rejected = (pc.fill_null(sums[f"{name}_sum"].take(places), 0) for name in counted)
    files = plan.files.select(["name", "rows", "error"])
    usable = pc.is_null(files["error"])
    if lost := _first(files.append_column("found", rows).filter(pc.and_(usable, pc.not_equal(files["rows"], rows)))):
        raise RowCountError(f"{lost['name']}: has {lost['rows']:,} rows, of which {lost['found']:,} are accounted for")
    status = pc.if_else(usable, "scored", "failed")
    failed = pc.if_else(usable, 0, files["rows"])
    scored = pc.subtract(rows, rejected)
    columns = (files["name"], files["rows"], scored, rejected, failed, status, files["error"])
    return pa.table(dict(zip(FILES_TABLE_SCHEMA.names, columns, strict=True)), FILES_TABLE_SCHEMA)
