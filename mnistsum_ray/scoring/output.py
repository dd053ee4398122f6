"""The output folder: what is in it, what earlier runs have committed there, and whether all rows are in it exactly once.

OUTPUT/predictions/, OUTPUT/rejected/      files of parts, complete under their names; data alone, so that every reader of
                                           Parquet can take the folder
OUTPUT/files.parquet, report.html, *.png   about the whole run, written after all predictions
OUTPUT/manifest.json                       written last: while it exists, the output is finished
OUTPUT/_lock                               names the run that writes here
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from mnistsum_ray.errors import MissingFileError, RequestError, RowCountError, UnusableFileError
from mnistsum_ray.reporting.console import Console, Progress
from mnistsum_ray.reporting.report import REPORT
from mnistsum_ray.scoring.counts import RowCounts
from mnistsum_ray.scoring.parts import PART_SCHEMA, PREDICTIONS, REJECTED, map_files, read_stamp
from mnistsum_ray.scoring.preflight import Plan
from mnistsum_ray.storage.folder import PARTIAL, OutputFolder
from mnistsum_ray.storage.location import Location, is_hidden

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
    {
        "output": pa.string(),  # relative to the folder of predictions, and to that of rejected rows
        # As in its stamp:
        "name": pa.string(),  # the input file
        "source": pa.string(),  # the input file in full
        "rows": pa.int64(),
        "rejected": pa.int64(),  # those of the rows that are in the file of rejected rows
        "planned": pa.bool_(),  # whether it is of a part of the plan
        "conflict": pa.string(),  # how the model or settings differ from those of the plan, if they do
    }
)
"""One row for each output file of predictions."""


@dataclass(frozen=True)
class OutputFiles:
    """The files in an output folder."""

    stamps: pa.Table
    """OUTPUT_SCHEMA of whole predictions, sorted by `output`."""
    counts: RowCounts
    """Of those that are of parts of the plan."""
    unfinished: list[str]
    """Names of files that a killed run has left: partial ones, and rejected rows without predictions."""
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
        with console.waiting_for(f"the listing of {folder.display}", lambda: "it is long, or the storage is slow"):
            listed = folder.files()
        for file in listed:
            name = file.path.removeprefix(folder.path).lstrip("/")
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
        outputs = sorted({*sizes[PREDICTIONS], *sizes[REJECTED]})
        if summaries and not outputs and not _is_finished(folder):
            errors += summaries  # other programs use these names too
        # The part that each output should be, and the sizes of its files.
        places = pc.index_in(pa.array(outputs, pa.string()), plan.parts["output"])
        files = plan.parts.take(places).append_column("file", pa.array(outputs, pa.string()))
        for top, of_top in sizes.items():
            files = files.append_column(top, pa.array(map(of_top.get, outputs), pa.int64()))
        counts = RowCounts()
        tables = [OUTPUT_SCHEMA.empty_table()]
        progress = Progress(console.progress, "output files read", len(outputs))
        for rows in map_files(partial(_read_output, folder, plan.spec), folder, files, progress):
            errors += [row["error"] for row in rows if "error" in row]
            unfinished += [row["unfinished"] for row in rows if "unfinished" in row]
            whole = [row for row in rows if "output" in row]
            counts.add(RowCounts.sum(row["counts"] for row in whole if row["planned"]))
            tables.append(pa.Table.from_pylist(whole, OUTPUT_SCHEMA))
        return cls(pa.concat_tables(tables), counts, unfinished, errors)


def _read_output(folder: Location, spec: dict[str, Any], file: dict[str, Any]) -> dict[str, Any]:
    """What OUTPUT_SCHEMA says of an output, with its `counts`; or what is `unfinished`; or an `error`.

    `file` has the name of the output as `file`, the sizes of its predictions and rejected rows, and
    the part that it should be. StorageError: the storage does not give a file.
    """
    stamps = {}
    for top in (PREDICTIONS, REJECTED):
        name = f"{top}/{file['file']}"
        if file[top] is not None:
            try:
                stamps[top] = read_stamp(folder, name, file[top])
            except UnusableFileError as error:
                return {"error": f"{name} {error}"}
    if PREDICTIONS not in stamps:
        return {"unfinished": f"{REJECTED}/{file['file']}"}
    stamp, scored, counts = stamps[PREDICTIONS]
    of_rejected, rejected, _ = stamps.get(REJECTED, (stamp, 0, ""))
    if (of_rejected, scored + rejected, rejected) != (stamp, stamp["rows"], stamp["rejected"]):
        lost = f"{scored:,} predictions and {rejected:,} rejected rows of {stamp['rows']:,} rows"
        return {"error": f"{PREDICTIONS}/{file['file']} has {lost}"}
    before = stamp["spec"]
    differences = (f"{flag} {before[flag]}, and this run has {value}" for flag, value in spec.items() if before[flag] != value)
    conflict = next(differences, None)
    is_planned = conflict is None and all(stamp[key] == file[key] for key in PART_SCHEMA.names)
    row = {key: stamp[key] for key in ("output", "name", "source", "rows", "rejected")}
    return row | {"planned": is_planned, "conflict": conflict, "counts": counts}


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
    """Delete unfinished files, and with `--overwrite` the earlier output; return what was in the
    output folder, and those of the plan's parts that are to be scored.

    Raises:
        RequestError: the folder holds other files, or predictions that this run must not be mixed
            with; or `--overwrite` would only delete. Nothing is deleted then.
    """
    output = OutputFiles.read(plan, console)
    if output.errors:
        raise RequestError(f"--output {plan.output.display}: {output.errors[0]}; move it away, or choose another folder")
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
    todo = all_but(plan.parts, done["output"])
    if todo.num_rows:
        unpublish(plan.held)
    return output, todo


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


def _check_compatible(plan: Plan, others: pa.Table) -> None:
    """Refuse, with a RequestError, to put predictions beside those of another model, of changed input
    files, or of parts that were cut differently; `others` are the stamps that are not of the plan."""
    where = f"--output {plan.output.display}"
    if other := _first(others.filter(pc.is_valid(others["conflict"]))):
        raise RequestError(f"{where}: was started with {other['conflict']}; give the same again, or {_START_OVER}")
    # The input may have moved, or its root may be another folder now: a file is the same if its name
    # or its full path is.
    names = plan.files["name"]
    sources = pc.binary_join_element_wise(plan.source(""), names, "")
    same = pc.or_(pc.is_in(others["name"], names), pc.is_in(others["source"], sources))
    if other := _first(others.filter(pc.or_(same, pc.is_in(others["output"], plan.parts["output"])))):
        raise RequestError(
            f"{where}: holds rows of {other['source']} as {other['output']}; the file has changed since, or this run has "
            f"another --max-rows-per-file or --input; give the same again, or {_START_OVER}"
        )


def _first(table: pa.Table) -> dict[str, Any] | None:
    """The first row of a table; None of an empty one."""
    return next(iter(table.slice(0, 1).to_pylist()), None)


def reconcile(plan: Plan, stamps: pa.Table) -> pa.Table:
    """Check that every row of every usable file is in the output exactly once, or raise a
    RowCountError; return FILES_TABLE_SCHEMA in the files' order.

    `stamps` (`OutputFiles.stamps`) are read after all files were written.
    """
    there = stamps.filter(stamps["planned"])
    if part := _first(all_but(plan.parts, there["output"])):
        rows = f"rows {part['first_row']:,} to {part['first_row'] + part['rows'] - 1:,}"
        raise RowCountError(f"{part['name']}: {rows} should be in {PREDICTIONS}/{part['output']}, and are not all there")
    sums = there.group_by("name").aggregate([("rows", "sum"), ("rejected", "sum")])
    names = plan.files["name"]
    sums = sums.take(pc.index_in(names, sums["name"]))
    rows, rejected = (pc.fill_null(sums[column], 0) for column in ("rows_sum", "rejected_sum"))
    known, errors = plan.files["rows"], plan.files["error"]
    usable = pc.is_null(errors)
    if lost := _first(plan.files.filter(pc.and_(usable, pc.not_equal(known, rows)))):
        raise RowCountError(f"{lost['name']}: not all of its {lost['rows']:,} rows are accounted for")
    failed = pc.if_else(usable, 0, known)
    status = pc.if_else(usable, "scored", "failed")
    columns = (names, known, pc.subtract(rows, rejected), rejected, failed, status, errors)
    return pa.table(dict(zip(FILES_TABLE_SCHEMA.names, columns, strict=True)), FILES_TABLE_SCHEMA)
